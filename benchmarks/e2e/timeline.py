"""The chunks of a stream with the time of each stage: how they are recorded, their figures, their plot.

Stages are denoise, commit (0 where it rides along with the first step), decode to pixels on the device, and copy, to
uint8 on the host. The first three are the engine's own (`Chunk.timings`): CUDA events on a GPU, the host's clock
elsewhere. copy is what remains of the host's time for the chunk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import torch

from benchmarks.common.plot import png_figure
from dsa_engine.engine.session import Session

RATES = (16, 24, 30)  # usual frame rates of video
COLORS = {"denoise": "#1f5fbf", "commit": "#c98b2b", "decode": "#3b8f5a", "copy": "#9a6fb0"}  # by stage
LINE_STYLES = {"eager": "-", "compile": "--"}


@dataclass
class Chunk:
    """frames: of pixels; forwards: latent frames of keys that each forward of the model sees, the commit's included;
    ms: by stage."""

    steps: int
    frames: int
    forwards: list[int]
    ms: dict[str, float]

    @classmethod
    def delivered(cls, steps: int, frames: int, forwards: list[int], ms: dict[str, float], start: float) -> Chunk:
        """Now; start: of the request, by `time.perf_counter`."""
        elapsed = 1e3 * (time.perf_counter() - start)
        return cls(steps, frames, forwards, ms | {"copy": elapsed - sum(ms.values())})

    @property
    def total(self) -> float:
        return sum(self.ms.values())


class Stream(Protocol):
    def next(self) -> Chunk: ...

    def close(self) -> None: ...


class EngineStream:
    def __init__(self, session: Session):
        self.session = session
        self.keys = 0  # latent frames that the previous chunk saw last: its commit sees as many

    def next(self) -> Chunk:
        rollout, previous = self.session.rollout, self.keys
        self.keys = min(rollout.position + rollout.config.chunk_frames, rollout.cache.window)
        commit = [previous] * (previous > 0 and rollout.config.commit == "clean")
        start = time.perf_counter()
        chunk = self.session.next_chunk()
        ms = {stage: chunk.timings[stage] for stage in ("denoise", "commit", "decode")}
        return Chunk.delivered(chunk.steps, len(chunk.frames), commit + [self.keys] * chunk.steps, ms, start)

    def close(self) -> None:
        self.session.close()


@dataclass
class Run:
    """Chunks of one stream. wall: milliseconds by the host's clock from the first one's start to the last one's frames;
    processor: milliseconds of this process's CPU time; first_frame: from opening the stream to the frames of its first
    chunk; dit: the same chunks again, without commits."""

    chunks: list[Chunk]
    wall: float
    processor: float
    first_frame: float
    dit: Run | None = None

    @property
    def frames(self) -> int:
        return sum(c.frames for c in self.chunks)

    def stage(self, *names: str) -> float:
        """Milliseconds of some stages over all chunks."""
        return sum(c.ms[name] for c in self.chunks for name in names)


def play(open_stream: Callable[[], Stream], count: int, skip: int = 0) -> Run:
    """Chunks skip .. skip + count - 1 of a new stream; the earlier ones are generated, but not recorded."""
    opened = time.perf_counter()
    stream = open_stream()
    chunks, first_frame = [], 0.0
    for i in range(skip + count):
        if i == skip:
            wall, processor = time.perf_counter(), time.process_time()
        chunks.append(stream.next())
        first_frame = first_frame or time.perf_counter() - opened
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    stream.close()
    return Run(chunks[skip:], 1e3 * wall, 1e3 * processor, 1e3 * first_frame)


# Figures. A round is a list of runs, one per clip; every round has the same clips.


def rates(runs: Sequence[Run]) -> dict[str, float]:
    """Frames per second by how much of the work is counted. Without a run of its own, dit is the denoise stage."""
    frames = 1e3 * sum(r.frames for r in runs)
    return {
        "dit": frames / sum((r.dit or r).stage("denoise") for r in runs),
        "dit_commit": frames / sum(r.stage("denoise", "commit") for r in runs),
        "decode": frames / sum(r.stage("denoise", "commit", "decode") for r in runs),
        "delivered": frames / sum(r.wall for r in runs),
    }


def latencies(ms: Sequence[float]) -> dict[str, float]:
    return {**{f"p{p}": np.percentile(ms, p) for p in (50, 95, 99)}, "max": max(ms)}


def missed(chunks: Sequence[tuple[float, int]]) -> dict[str, int]:
    """How many (milliseconds, frames) took longer than they play, by frame rate."""
    return {str(rate): sum(ms > 1e3 * frames / rate for ms, frames in chunks) for rate in RATES}


def figures(rounds: Sequence[Sequence[Run]], whole: bool) -> dict:
    """Of one subject: fps, the median over rounds of each rate, the lowest and highest delivered rate of a clip, and
    figures of its chunks. whole: the runs begin with the clip's first chunk, whose latency is `first_frame_ms`; it is
    left out of the others'."""
    runs = [run for one in rounds for run in one]
    by_round = [rates(one) for one in rounds]
    alone = [1e3 * r.frames / r.wall for r in runs]
    later = [c for r in runs for c in r.chunks[whole and len(r.chunks) > 1 :]]
    spans, steps = [c.total for c in later], [c.steps for r in runs for c in r.chunks]
    fps, wall = {name: median(r[name] for r in by_round) for name in by_round[0]}, sum(r.wall for r in runs)
    return {
        "fps": fps,
        "fps_range": [min(alone), max(alone)],
        "first_frame_ms": median(r.first_frame for r in runs) if whole else None,
        "chunk_ms": latencies(spans),
        "jitter_ms": np.std(spans),
        "real_time": {str(rate): fps["delivered"] / rate for rate in RATES},
        "missed": missed([(c.total, c.frames) for c in later]),
        "deadlines": len(later),
        "mean_steps": np.mean(steps),
        "steps_histogram": {str(n): count for n, count in sorted(Counter(steps).items())},
        "chunks": len(steps),
        "clock": {"wall_ms": wall, "stages_over_wall": sum(c.total for r in runs for c in r.chunks) / wall},
    }


def ratio(ours: Sequence[Sequence[Run]], theirs: Sequence[Sequence[Run]]) -> dict:
    """Speed-up run by run of the same clip, one played right after the other: by the wall clock, and by CPU time, which
    other work on the machine does not lengthen (None where a GPU does the work)."""
    pairs = [pair for round_ in zip(ours, theirs) for pair in zip(*round_)]
    wall = [b.wall / b.frames / (a.wall / a.frames) for a, b in pairs]
    busy = [b.processor / b.frames / (a.processor / a.frames) for a, b in pairs]
    processor = None if torch.cuda.is_initialized() else median(busy)
    return {"median": median(wall), "low": min(wall), "high": max(wall), "processor": processor}


def columns(rounds: Sequence[Sequence[Run]]) -> dict[str, list]:
    """The last round's first clip chunk by chunk. riding: what a commit adds to the denoise stage that it rides along
    with, estimated by the pass without commits: the median over all runs at this chunk of the clip."""
    run, runs = rounds[-1][0], [run for one in rounds for run in one]
    table = {"kv_frames": [c.forwards[-1] for c in run.chunks], "steps": [c.steps for c in run.chunks]}
    table |= {stage: [c.ms[stage] for c in run.chunks] for stage in COLORS}
    if run.dit is None:
        return table
    added = [[a.ms["denoise"] - b.ms["denoise"] for a, b in zip(r.chunks, r.dit.chunks)] for r in runs]
    rides = [len(c.forwards) > c.steps and not c.ms["commit"] for c in run.chunks]
    return table | {"riding": [max(0.0, median(ms)) if there else 0.0 for there, *ms in zip(rides, *added)]}


def stacked(table: dict[str, list]) -> dict[str, np.ndarray]:
    """Milliseconds by stage, the commits that ride along taken out of denoise."""
    parts = {stage: np.array(table[stage]) for stage in COLORS}
    riding = np.minimum(table.get("riding", 0.0), parts["denoise"])
    return parts | {"denoise": parts["denoise"] - riding, "commit": parts["commit"] + riding}


def draw(result: dict, path: Path) -> None:
    """Each chunk's stages as a stack with its steps above, and the baselines as lines: a clip, and the steady state."""
    with png_figure(path, 11, 6.4) as figure:
        for axes, (scenario, tables) in zip(figure.subplots(2, 1), result["timeline"].items()):
            own = tables["policy"]
            index, base = np.arange(len(own["steps"])), np.zeros(len(own["steps"]))
            for stage, height in stacked(own).items():
                label = "commit of the previous chunk" if stage == "commit" else stage
                axes.bar(index, height, 0.8, bottom=base, color=COLORS[stage], label=label)
                base = base + height
            for x, top, steps in zip(index, base, own["steps"]):
                axes.annotate(str(steps), (x, top), (0, 2), textcoords="offset points", ha="center", size=8)
            for name, style in ((n, s) for n, s in LINE_STYLES.items() if n in tables):
                label = f"baseline {name}, {max(tables[name]['steps'])} steps"
                total = sum(stacked(tables[name]).values())
                axes.plot(index, total, color="#a03030", ls=style, lw=1.5, marker=".", ms=4, label=label)
            ticks = index[:: max(1, len(index) // 16)]
            axes.set_xticks(ticks, [f"{i}\n{own['kv_frames'][i]}" for i in ticks], size=8)
            axes.set(ylabel="ms per chunk", xlim=(-0.7, len(index) - 0.3), axisbelow=True)
            axes.set_title(f"{scenario}; steps above the bars", size=10, loc="left")
            axes.grid(axis="y", alpha=0.25)
        axes.set_xlabel("chunk, and latent frames of keys and values that it sees")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=7, fontsize=8)
        fps = f"{result['fps']['decode']:.1f} frames per second"
        figure.suptitle(f"{result['model']} on {result['device']}, {result['policy']}: {fps}", size=11)
