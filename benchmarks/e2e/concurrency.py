"""Several live streams on one device: how long each waits for a chunk while the others want theirs."""

from __future__ import annotations

import time
from collections import Counter

from benchmarks.e2e.protocol import Bench, Scenario
from benchmarks.e2e.timeline import latencies, missed
from dsa_engine.engine.batch_runner import BatchRunner


def concurrent(bench: Bench, scenario: Scenario) -> dict:
    """`scenario.clips` endless streams of full windows, each asking for its next chunk as soon as it has one.

    Nothing is recorded until every stream has a full window, and all go on until the slowest has made scenario.chunks
    more, so the load never changes. chunk_ms: from the request of a chunk to its frames on the host, during which
    others are decoded and share its forwards (`BatchRunner`). fps: of all streams together; a_stream: the mean.
    """
    bench.capture(scenario)
    sessions = [bench.session(scenario, i, bench.policy(scenario, i)) for i in range(scenario.clips)]
    runner, made, requested = BatchRunner(), Counter(), {}
    spans: list[tuple[float, int]] = []  # milliseconds and frames
    start = None
    for session in sessions:
        requested[session] = time.perf_counter()
        runner.add(session)
    while start is None or min(made.values()) < scenario.skip + scenario.chunks:
        for session in runner.forward():
            frames = len(session.finish().frames)
            now = time.perf_counter()
            made[session] += 1
            if start is not None:
                spans.append((1e3 * (now - requested[session]), frames))
            elif len(made) == len(sessions) and min(made.values()) >= scenario.skip:
                start = now
            requested[session] = time.perf_counter()
            runner.add(session)
    wall = time.perf_counter() - start
    for session in sessions:
        runner.remove(session)
        session.close()
    return figures(spans, wall, len(sessions)) | {"rows": runner.scheduler.capacity, "kv_frames": scenario.window}


def figures(spans: list[tuple[float, int]], wall: float, sessions: int) -> dict:
    """spans: milliseconds and frames of each chunk; wall: seconds of all."""
    fps = sum(frames for _, frames in spans) / wall
    return {
        "sessions": sessions,
        "chunks": len(spans),
        "fps": fps,
        "a_stream": fps / sessions,
        "chunk_ms": latencies([ms for ms, _ in spans]),
        "missed": missed(spans),
    }
