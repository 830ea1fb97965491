"""The chunks of a stream as they came, with what every stage took: how they are recorded, their figures, their picture.

A stage is what lies between two marks of a `Stopwatch`: denoise, commit (where it is a stage of its own), decode to
uint8 on the device, copy to the host. Marks are CUDA events on a GPU and the host's clock elsewhere; nothing waits for
the device inside a run but the copy of the frames itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.common.timing import mark
from dsa_engine.engine import session as session_module
from dsa_engine.engine.session import Session, to_uint8
from dsa_engine.files import atomic_write

RATES = (16, 24, 30)  # frames a second that are usual for video


class Stopwatch:
    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.marks = []
        self.mark("")

    def mark(self, stage: str) -> None:
        """The stage that ends here."""
        self.marks.append((stage, mark() if self.cuda else time.perf_counter()))

    def synchronise(self) -> None:
        """Wait for the device; never inside a run."""
        if self.cuda:
            torch.cuda.synchronize()


@dataclass
class Chunk:
    """steps: taken; frames: of pixels, 0 where none were decoded; forwards: latent frames of keys of each forward of
    the model, the commit among them; marks: of the stopwatch."""

    steps: int
    frames: int
    forwards: list[int]
    marks: list[tuple[str, Any]]

    @cached_property
    def ms(self) -> dict[str, float]:
        """Milliseconds by stage."""
        return {stage: _ms(before, now) for (_, before), (stage, now) in pairwise(self.marks)}

    @property
    def total(self) -> float:
        return sum(self.ms.values())


def _ms(start: Any, stop: Any) -> float:
    return 1e3 * (stop - start) if isinstance(start, float) else start.elapsed_time(stop)


class Stream(Protocol):
    def next(self) -> Chunk: ...

    def close(self) -> None: ...


class BeforeCopy(TorchFunctionMode):
    """Calls `seen` when a tensor is copied to the host."""

    def __init__(self, seen: Callable[[], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cpu, torch.Tensor.copy_):  # from a GPU into page-locked memory
            self.seen()
        return func(*args, **(kwargs or {}))


class EngineStream:
    """A session's chunks by `next_chunk`, as everybody gets them, with marks put between its stages.

    pixels: False makes latents only.
    """

    def __init__(self, session: Session, watch: Stopwatch, pixels: bool = True):
        self.session, self.rollout, self.watch, self.pixels = session, session.rollout, watch, pixels
        self.before = 0  # frames of keys that the chunk before saw last: its commit sees as many
        self.denoise, self.rollout.denoise = self.rollout.denoise, self._denoise

    def next(self) -> Chunk:
        rollout = self.rollout
        keys = min(rollout.position + rollout.config.chunk_frames, rollout.cache.window)
        commit = [self.before] * (self.before > 0 and rollout.config.commit == "clean")
        self.watch.start()
        if self.pixels:
            with patch.object(session_module, "to_uint8", self._to_uint8):
                chunk = self.session.next_chunk()
            self.watch.mark("copy")
            frames, steps = len(chunk.frames), chunk.steps
        else:
            result = rollout.denoise()
            rollout.accept(result.latents)
            frames, steps = 0, result.steps[0]
        self.before = keys
        return Chunk(steps, frames, commit + [keys] * steps, self.watch.marks)

    def _denoise(self, on_step=None):
        result = self.denoise(on_step)
        self.watch.mark("denoise")
        return result

    def _to_uint8(self, pixels: torch.Tensor) -> np.ndarray:
        with BeforeCopy(lambda: self.watch.mark("decode")):
            frames = to_uint8(pixels)
        if self.watch.marks[-1][0] != "decode":
            raise RuntimeError(
                "to_uint8 has made no copy to the host by Tensor.cpu or copy_: where decoding ends is not known"
            )
        return frames

    def close(self) -> None:
        self.session.close()


@dataclass
class Run:
    """Chunks of one stream. wall: milliseconds by the host's clock from the first one's start to the last one's frames;
    processor: of this process's processor time; first_frame: from the wish for a stream to the frames of its first
    chunk; dit: the same chunks again without commits and pixels."""

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
        return sum(c.ms.get(name, 0.0) for c in self.chunks for name in names)


def play(open_stream: Callable[[], Stream], count: int, skip: int = 0) -> Run:
    """A new stream's chunks skip .. skip + count - 1; those before are made, but not in the record."""
    start = time.perf_counter()
    stream = open_stream()
    chunks, first, begun, used = [], 0.0, time.perf_counter(), time.process_time()
    for i in range(skip + count):
        if i == skip:
            begun, used = time.perf_counter(), time.process_time()
        chunks.append(stream.next())
        first = first or 1e3 * (time.perf_counter() - start)
    wall, processor = 1e3 * (time.perf_counter() - begun), 1e3 * (time.process_time() - used)
    stream.close()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the marks of a run that copies nothing may still be to come
    return Run(chunks[skip:], wall, processor, first)


# Figures. A round is a list of runs, one a clip; every round has the same clips.


def rates(runs: Sequence[Run]) -> dict[str, float]:
    """Frames a second by how much of the work is counted. Without a run of its own, dit is the denoise stage."""
    frames = 1e3 * sum(r.frames for r in runs)
    dit = sum((r.dit or r).stage("denoise") for r in runs)
    both = sum(r.stage("denoise", "commit") for r in runs)
    pixels = sum(r.stage("denoise", "commit", "decode") for r in runs)
    wall = sum(r.wall for r in runs)
    return {"dit": frames / dit, "dit_commit": frames / both, "decode": frames / pixels, "delivered": frames / wall}


def figures(rounds: Sequence[Sequence[Run]], whole: bool) -> dict:
    """Of one contestant: fps, the median over rounds of each rate, and the lowest and highest delivered rate of a clip;
    chunks with what is known of them. whole: the runs begin with the clip's first chunk, which has its own latency
    (`first_frame_ms`) and is not among the others'."""
    runs = [run for one in rounds for run in one]
    by_round = [rates(one) for one in rounds]
    alone = sorted(1e3 * r.frames / r.wall for r in runs)
    later = [c for r in runs for c in r.chunks[whole and len(r.chunks) > 1 :]]
    taken = [c.steps for r in runs for c in r.chunks]
    spans, wall = np.array([c.total for c in later]), sum(r.wall for r in runs)
    fps = {name: median(r[name] for r in by_round) for name in by_round[0]}
    return {
        "fps": fps,
        "fps_range": [alone[0], alone[-1]],
        "first_frame_ms": median(r.first_frame for r in runs) if whole else None,
        "chunk_ms": {**{f"p{p}": np.percentile(spans, p) for p in (50, 95, 99)}, "max": spans.max()},
        "jitter_ms": spans.std(),
        "real_time": {str(rate): fps["delivered"] / rate for rate in RATES},
        "missed": {str(rate): sum(c.total > 1e3 * c.frames / rate for c in later) for rate in RATES},
        "deadlines": len(later),
        "mean_steps": np.mean(taken),
        "steps_histogram": {str(n): count for n, count in sorted(Counter(taken).items())},
        "chunks": len(taken),
        "clock": {"wall_ms": wall, "stages_over_wall": sum(c.total for r in runs for c in r.chunks) / wall},
    }


def ratio(ours: Sequence[Sequence[Run]], theirs: Sequence[Sequence[Run]]) -> dict:
    """How many times the frames a second, run by run of the same clip, one made right after the other: by the wall
    clock, and by processor time, which other work on the machine does not lengthen (None where a GPU does the work)."""
    pairs = [pair for round_ in zip(ours, theirs) for pair in zip(*round_)]
    wall = sorted(b.wall / b.frames / (a.wall / a.frames) for a, b in pairs)
    cpu = not torch.cuda.is_initialized()
    busy = [b.processor / b.frames / (a.processor / a.frames) for a, b in pairs] if cpu else None
    return {"median": median(wall), "low": wall[0], "high": wall[-1], "processor": busy and median(busy)}


def columns(rounds: Sequence[Sequence[Run]]) -> dict[str, list]:
    """The last round's first clip chunk by chunk. riding: what a commit adds to the denoise stage that it rides along
    with, as far as a second pass without commits can tell: the median over all runs at this place in the clip."""
    run, runs = rounds[-1][0], [run for one in rounds for run in one]
    table = {"kv_frames": [c.forwards[-1] for c in run.chunks], "steps": [c.steps for c in run.chunks]}
    table |= {stage: [c.ms[stage] for c in run.chunks] for stage in run.chunks[0].ms}
    if run.dit is None:
        return table
    added = [[a.ms["denoise"] - b.ms["denoise"] for a, b in zip(r.chunks, r.dit.chunks)] for r in runs]
    rides = [len(c.forwards) > c.steps for c in run.chunks]
    return table | {"riding": [max(0.0, median(ms)) if there else 0.0 for there, *ms in zip(rides, *added)]}


COLORS = {"denoise": "#1f5fbf", "commit": "#c98b2b", "decode": "#3b8f5a", "copy": "#9a6fb0"}
LINES = {"eager": ("#a03030", "-"), "compile": ("#a03030", "--")}


def bars(table: dict[str, list]) -> dict[str, np.ndarray]:
    """Milliseconds to stack, by stage."""
    found = {stage: np.array(table[stage]) for stage in COLORS if stage in table}
    if "riding" in table:
        found["commit"] = np.minimum(np.array(table["riding"]), found["denoise"])
        found["denoise"] = found["denoise"] - found["commit"]
    return {stage: found[stage] for stage in COLORS if stage in found}


def draw(result: dict, path: Path) -> None:
    """Each chunk's stages as a stack with its steps above, over the baselines' chunks: a clip, and the steady state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((11, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (regime, tables) in zip(figure.subplots(2, 1), result["timeline"].items()):
        own = tables["policy"]
        place, base = np.arange(len(own["steps"])), np.zeros(len(own["steps"]))
        for stage, height in bars(own).items():
            label = "commit of the chunk before" if stage == "commit" and "riding" in own else stage
            axes.bar(place, height, 0.8, bottom=base, color=COLORS[stage], label=label)
            base = base + height
        for x, top, steps in zip(place, base, own["steps"]):
            axes.annotate(str(steps), (x, top), (0, 2), textcoords="offset points", ha="center", size=8)
        for name in (n for n in LINES if n in tables):
            total = sum(bars(tables[name]).values())
            color, style = LINES[name]
            label = f"baseline {name}, {max(tables[name]['steps'])} steps"
            axes.plot(place, total, color=color, ls=style, lw=1.5, marker=".", ms=4, label=label)
        ticks = place[:: max(1, len(place) // 16)]
        axes.set_xticks(ticks, [f"{i}\n{own['kv_frames'][i]}" for i in ticks], size=8)
        axes.set(ylabel="ms a chunk", xlim=(-0.7, len(place) - 0.3))
        axes.set_title(f"{regime}; steps above the bars", size=10, loc="left")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    axes.set_xlabel("chunk, and latent frames of keys and values that it sees")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=7, fontsize=8)
    fps = f"{result['fps']['decode']:.1f} frames a second"
    figure.suptitle(f"{result['model']} on {result['device']}, {result['policy']}: {fps}", size=11)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
