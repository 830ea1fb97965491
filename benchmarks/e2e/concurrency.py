"""Several live streams on one device: how long each waits for a chunk while the others want theirs."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from benchmarks.e2e.protocol import Bench, Regime
from benchmarks.e2e.timeline import RATES
from dsa_engine.engine.batch_runner import Runner
from dsa_engine.pipeline import changed


def concurrent(bench: Bench, regime: Regime) -> dict:
    """`regime.clips` endless streams of full windows, each asking for its next chunk as soon as it has one.

    Nothing is recorded until every stream has a full window, and all go on until the slowest has made regime.chunks
    more, so the load never changes. chunk_ms: from the wish for a chunk to its frames on the host, which a stream waits
    for while others are decoded and share its forwards (`Runner`). fps: of all streams together; a_stream: the mean.
    """
    pipe, runner, now = bench.pipe, Runner(), time.perf_counter
    if pipe.engine.dit.device.type == "cuda":
        config = changed(pipe.config, window=regime.window)
        pipe.engine.capture(height=bench.size[0], width=bench.size[1], frames=None, config=config)
    sessions = [
        pipe.session(
            prompt_embeds=bench.embeds[i % len(bench.embeds)],
            seed=bench.seed + i,
            window=regime.window,
            step_policy=bench.policy(regime, i),
        )
        for i in range(regime.clips)
    ]
    made, asked = Counter(), {}
    spans: list[tuple[float, int]] = []  # milliseconds and frames
    start = None

    def ask(session) -> None:
        asked[id(session)] = now()
        runner.add(session)

    for session in sessions:
        ask(session)
    while start is None or min(made.values()) < regime.skip + regime.chunks:
        for session in runner.forward():
            frames = len(session.finish().frames)
            made[id(session)] += 1
            if start is not None:
                spans.append((1e3 * (now() - asked[id(session)]), frames))
            elif len(made) == len(sessions) and min(made.values()) >= regime.skip:
                start = now()
            ask(session)
    wall = now() - start
    for session in sessions:
        runner.remove(session)
        session.close()
    return figures(spans, wall, len(sessions)) | {"rows": runner.batcher.capacity, "kv_frames": regime.window}


def figures(spans: list[tuple[float, int]], wall: float, sessions: int) -> dict:
    """spans: milliseconds and frames of each chunk; wall: seconds of all."""
    ms, fps = np.array([span for span, _ in spans]), sum(frames for _, frames in spans) / wall
    return {
        "sessions": sessions,
        "chunks": len(spans),
        "fps": fps,
        "a_stream": fps / sessions,
        "chunk_ms": {**{f"p{p}": np.percentile(ms, p) for p in (50, 95, 99)}, "max": ms.max()},
        "missed": {str(rate): sum(span > 1e3 * frames / rate for span, frames in spans) for rate in RATES},
    }
