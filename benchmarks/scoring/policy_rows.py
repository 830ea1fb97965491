"""The rows of the quality benchmark: which step policies are rolled out, on which clips, in which process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dsa_engine import Change, Confidence, Fixed, PerChunk, Pipeline, Policy, Relative
from dsa_engine.evaluation.rollouts import (
    BATCH_CLIPS,
    Table,
    Trace,
    ground_truth,
    held_out,
    roll_out,
    roll_out_teacher,
    tabulate,
    trace,
)
from dsa_engine.evaluation.statistics import spread
from dsa_engine.kernel_types import REDUCE
from dsa_engine.pipeline_inputs import override_config

SPREAD = np.linspace(1.1, 3.5, 10)  # mean steps at which the confidence policy is tried beside its presets
SPREAD_CHANGE = (2.1, 2.4, 2.8, 3.2, 3.6)
EXITS = (0.8, 0.6, 0.45, 0.3, 0.15)  # of `random`, after each step
BY_INDEX = ([2, 1], [4, 1], [4, 2, 1], [4, 2], [4, 3])  # the last count holds


@dataclass(frozen=True)
class Clips:
    """Which clips every row is rolled out on: prompts are always the same, seed is that of the noise."""

    clips: int
    chunks: int
    seed: int

    @property
    def captions(self):
        return held_out(self.clips, self.chunks)


@dataclass(frozen=True)
class Source:
    """A model, by name or folder, the file of another head for it, and how it is run."""

    model: str
    head: Path | None = None
    quantization: str | None = None
    commit: str | None = None
    dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.model, self.quantization, self.commit and f"commit {self.commit}")))


@dataclass(frozen=True)
class Job:
    """One row to roll out. policy: a Policy, one per clip, or "trace", "teacher", "truth"; options of the teacher."""

    source: Source
    policy: Policy | Sequence[Policy] | str
    options: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of a job: scores, confidence [B, N, F] at the exits, seconds of the rollout without the scoring."""

    table: Table
    confidence: np.ndarray
    seconds: float
    trace: Trace | None = None


@lru_cache(maxsize=4)
def load(source: Source) -> Pipeline:
    pipe = Pipeline.from_pretrained(
        source.model, head=source.head, dtype=source.dtype, quantization=source.quantization
    )
    pipe.engine.config = override_config(pipe.config, commit=source.commit)
    return pipe


def measure(job: Job, clips: Clips) -> Result:
    """Roll out and score; also what a worker process runs."""
    pipe, captions, seen = load(job.source), clips.captions, None
    start = time.perf_counter()
    if job.policy == "trace":
        rolled, seen = trace(pipe, captions, clips.seed)
    elif job.policy == "teacher":
        rolled = roll_out_teacher(pipe, captions, shift=pipe.config.shift, seed=clips.seed, **dict(job.options))
    elif job.policy == "truth":
        rolled = ground_truth(pipe, captions, clips.seed)
    else:
        rolled = roll_out(pipe, captions, job.policy, clips.seed, batch=BATCH_CLIPS)
    seconds = time.perf_counter() - start
    return Result(tabulate(captions, rolled), rolled.confidence, seconds, seen)


def run(jobs: dict[str, Job], clips: Clips, workers: ProcessPoolExecutor | None, bar: tqdm) -> dict[str, Result]:
    """The result of every job, by its name; in this process where there are no workers."""
    results, futures = {}, {}
    if workers:
        futures = {workers.submit(measure, job, clips): name for name, job in jobs.items()}
    for item in as_completed(futures) if workers else jobs:
        name = futures[item] if workers else item
        bar.set_postfix_str(name)
        results[name] = item.result() if workers else measure(jobs[name], clips)
        bar.update()
    return {name: results[name] for name in jobs}


def random_exits(p: float, clips: Clips, limit: int) -> list[PerChunk]:
    """Counts of steps, drawn before anything is seen: P(k) = p (1 - p)^(k - 1) for k < limit, the rest at limit."""
    drawn = np.random.default_rng([clips.seed, round(1e6 * p)]).geometric(p, size=(clips.clips, clips.chunks))
    return [PerChunk(counts) for counts in np.minimum(drawn, limit).tolist()]


def known_jobs(source: Source, clips: Clips, limit: int, brief: bool = False) -> dict[str, Job]:
    """The rows whose policy does not depend on what the model shows; the last fixed one is traced."""
    jobs = {f"fixed:{limit}": Job(source, "trace")}
    jobs |= {f"fixed:{n}": Job(source, Fixed(n)) for n in range(limit - 1, 0, -1)}
    if brief:
        return jobs
    jobs |= {f"random:{p}": Job(source, random_exits(p, clips, limit)) for p in EXITS}
    by_index = sorted({tuple(min(count, limit) for count in counts) for counts in BY_INDEX})
    jobs |= {f"by_index:{','.join(map(str, c))}": Job(source, PerChunk(list(c))) for c in by_index}
    return jobs


def chosen_jobs(source: Source, seen: Trace, named: Sequence[float], brief: bool = False) -> dict[str, Job]:
    """Confidence at the named thresholds and a spread, x0_change at a spread: placed by what the trace shows. And the
    relative rule, which has nothing to place."""
    if brief:
        return {f"confidence:{t}": Job(source, Confidence(t)) for t in sorted(set(named))}
    limit = seen.confidence.shape[2]
    confidence = seen.confidence.min(axis=3).reshape(-1, limit)
    jobs = {f"confidence:{t}": Job(source, Confidence(t)) for t in sorted({*named, *spread(confidence, SPREAD)})}
    jobs |= {f"relative:{how}": Job(source, Relative(frame_reduce=how)) for how in REDUCE}
    if limit > 2:
        stillness = -seen.change.max(axis=3).reshape(-1, limit - 1)
        stillness = np.pad(stillness, ((0, 0), (1, 0)), constant_values=-np.inf)  # nothing is known after step 1
        jobs |= {f"x0_change:{-t}": Job(source, Change(-t)) for t in spread(stillness, SPREAD_CHANGE)}
    return jobs


def curves(results: dict[str, Result], limit: int) -> dict[str, list[Table]]:
    """The operating points of each kind of policy, joined to the fixed counts that all baselines can be set to.

    x0_change cannot stop after step 1 but by max_steps=1: below 2 mean steps its curve is a mixture of 1 and 2 fixed.
    """
    ends = {"fixed": (), "random": (1, limit), "by_index": (1, limit), "x0_change": (1, 2, limit)}
    names = {k: [n for n in results if n.startswith(k + ":")] + [f"fixed:{n}" for n in e] for k, e in ends.items()}
    ran = [kind for kind in names if any(name.startswith(kind + ":") for name in results)]
    return {kind: [results[name].table for name in names[kind]] for kind in ran}
