"""Step policies: how many denoising steps does a chunk get?

A policy decides after every step whether the chunk is done, and observes afterwards how long it took. Each row of a
batch and each session holds its own copy (`start`), so an adaptive policy such as `Budget` adapts to its own stream.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from dsa_engine.checks import check_choice, check_unit


class ExitRule(NamedTuple):
    """Stop after `max_steps`, or after at least `min_steps` once the reduced confidence reaches `threshold`.

    threshold: None is the reduced confidence at which the chunk before was left, 1.0 before the first.
    """

    min_steps: int
    max_steps: int
    reduce: str = "min"
    threshold: float | None = 2.0  # above every confidence


class Policy(ABC):
    """Decides how many steps a chunk takes. `limit` is the number of noise levels: no chunk can take more steps.

    signal: the values a decision needs, one per latent frame of the chunk. "confidence": the head's, in (0, 1), 1 is
    confident. "change": mean((x0_k - x0_{k-1})^2) between the estimates of this and the previous step, in latent units
    of variance about 1. None: no values, so nothing is fetched from the device.
    """

    signal: Literal["confidence", "change"] | None = None
    threshold_field: str | None = None  # what `with_threshold` sets

    def __init_subclass__(cls, **kwargs):
        """Policies written for the earlier names `done` and `reads` keep working."""
        super().__init_subclass__(**kwargs)
        for old, new in (("done", "should_stop"), ("reads", "signal")):
            if old in vars(cls) and new not in vars(cls):
                setattr(cls, new, vars(cls)[old])

    def start(self, limit: int) -> Policy:
        """A checked copy for one stream."""
        self.check(limit)
        return copy.deepcopy(self)

    def with_threshold(self, threshold: float) -> Policy:
        """A copy with another confidence threshold.

        Raises ValueError for a policy that has none and for a threshold outside [0, 1].
        """
        if self.threshold_field is None:
            raise ValueError(f"threshold={threshold}: {self} has no confidence threshold; Confidence and Budget do")
        check_unit(self.threshold_field, threshold)
        policy = copy.copy(self)
        setattr(policy, self.threshold_field, threshold)
        return policy

    @abstractmethod
    def check(self, limit: int) -> None:
        """Raise ValueError with the nearest legal value where the policy does not fit a schedule of `limit` steps."""

    @abstractmethod
    def should_stop(self, chunk: int, step: int, values: Sequence[float] | None, limit: int) -> bool:
        """After `step` steps (1, 2, ...) of chunk `chunk` (0, 1, ...): stop here?

        values: the policy's `signal`, one value per frame; None without a signal, and for "change" after step 1.
        """

    def rule(self, chunk: int, limit: int) -> ExitRule | None:
        """The same decisions for one chunk in a form that the device evaluates; None if only the host can decide."""
        return None

    def observe(self, seconds: float, frames: int) -> None:  # noqa: B027 most policies do not adapt
        """A chunk of `frames` video frames took `seconds` in total."""


def _check_count(name: str, count: int, limit: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ValueError(f"{name}={count!r}: must be a whole number of steps from 1 to {limit}")
    if not 1 <= count <= limit:
        raise ValueError(
            f"{name}={count}: must be from 1 to {limit}, the length of the step list; nearest is "
            f"{min(max(count, 1), limit)}"
        )


@dataclass
class Fixed(Policy):
    """Every chunk takes n steps. The first n levels of the schedule are used: the exit estimate of step n is kept."""

    n: int

    def check(self, limit: int) -> None:
        _check_count("n", self.n, limit)

    def should_stop(self, chunk, step, values, limit) -> bool:
        return step >= self.n

    def rule(self, chunk, limit) -> ExitRule:
        return ExitRule(self.n, self.n)


@dataclass
class PerChunk(Policy):
    """Chunk i takes counts[i] steps; chunks after the end of the list take its last count."""

    counts: Sequence[int]

    def check(self, limit: int) -> None:
        if not self.counts:
            raise ValueError("counts=[]: must hold at least one number of steps, e.g. [4, 2, 1, 3]")
        for i, count in enumerate(self.counts):
            _check_count(f"counts[{i}]", count, limit)

    def should_stop(self, chunk, step, values, limit) -> bool:
        return step >= self.counts[min(chunk, len(self.counts) - 1)]

    def rule(self, chunk, limit) -> ExitRule:
        count = self.counts[min(chunk, len(self.counts) - 1)]
        return ExitRule(count, count)


def _check_range(min_steps: int, max_steps: int | None, frame_reduce: str, limit: int) -> None:
    _check_count("min_steps", min_steps, limit)
    if max_steps is not None:
        _check_count("max_steps", max_steps, limit)
        if max_steps < min_steps:
            raise ValueError(
                f"max_steps={max_steps} with min_steps={min_steps}: must not be less; nearest is {min_steps}"
            )
    check_choice("frame_reduce", frame_reduce, REDUCE)


def _mean(values: Sequence[float]) -> float:
    """In float32, as the device takes it: else the two could differ on what is at least a threshold."""
    return (torch.tensor(values, dtype=torch.float32).sum() / len(values)).item()


REDUCE: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "mean": _mean, "max": max}


@dataclass
class Confidence(Policy):
    """Stop as soon as the chunk's confidence reaches `threshold`, within [min_steps, max_steps].

    The chunk's confidence is its least confident frame's (`frame_reduce="min"`; "mean" and "max" are the others).
    max_steps None is the whole schedule. threshold 0 always stops at min_steps; 1 stops early only at full confidence.
    """

    threshold: float = 0.5
    min_steps: int = 1
    max_steps: int | None = None
    frame_reduce: str = "min"

    signal = "confidence"
    threshold_field = "threshold"

    def check(self, limit: int) -> None:
        check_unit("threshold", self.threshold)
        _check_range(self.min_steps, self.max_steps, self.frame_reduce, limit)

    def should_stop(self, chunk, step, values, limit) -> bool:
        if step >= (limit if self.max_steps is None else self.max_steps):
            return True
        return step >= self.min_steps and REDUCE[self.frame_reduce](values) >= self.threshold

    def rule(self, chunk, limit) -> ExitRule:
        max_steps = limit if self.max_steps is None else self.max_steps
        return ExitRule(self.min_steps, max_steps, self.frame_reduce, self.threshold)


@dataclass
class Relative(Policy):
    """Go on while the chunk's confidence is below that at which the chunk before was left, within [min_steps,
    max_steps].

        stop chunk i after step k  iff  k >= max_steps, or k >= min_steps and r(c_i,k) >= p_i
        p_0 = 1,   p_i+1 = r(c_i) at the exit of chunk i,   r = min, mean or max over the chunk's frames

    This is Algorithm 1 of Dynamic Step Allocation (arXiv 2606.04432), told by two summaries of it that agree; the paper
    itself was not read. It has no threshold. The first chunk takes max_steps unless its confidence is 1. After a chunk
    that was left very confident the next one takes many steps, and one that was left at max_steps with little
    confidence lets the next one leave early. So where confidence rises up to the last step, as a head fitted to the
    error makes it, nearly every chunk takes nearly all steps.

    Args:
        min_steps, max_steps: of a chunk; max_steps None is the whole schedule.
        frame_reduce: "min", "mean" or "max", of a chunk's frames.
        on_prompt_switch: "keep" compares the first chunk under another prompt with the chunk before, as any other (the
            summaries say nothing of prompts); "reset" compares it with 1, as a clip's first. A switch that is
            interpolated over several chunks is one, at the first of them.
        previous: p of the chunk in the making where the host decides; else the device knows it (`Rollout`).
    """

    min_steps: int = 1
    max_steps: int | None = None
    frame_reduce: str = "min"
    on_prompt_switch: str = "keep"
    previous: float = field(init=False, default=1.0)

    signal = "confidence"

    def check(self, limit: int) -> None:
        _check_range(self.min_steps, self.max_steps, self.frame_reduce, limit)
        check_choice("on_prompt_switch", self.on_prompt_switch, ("keep", "reset"))

    def follow(self, confidence: Sequence[float]) -> None:
        """The next chunk is compared with one that was left at this confidence, one value per frame."""
        self.previous = REDUCE[self.frame_reduce](confidence)

    def should_stop(self, chunk, step, values, limit) -> bool:
        if step >= (limit if self.max_steps is None else self.max_steps):
            return True
        return step >= self.min_steps and REDUCE[self.frame_reduce](values) >= self.previous

    def rule(self, chunk, limit) -> ExitRule:
        max_steps = limit if self.max_steps is None else self.max_steps
        return ExitRule(self.min_steps, max_steps, self.frame_reduce, None)


@dataclass
class Convergence(Policy):
    """Stop as soon as a step has changed the estimate by no more than `threshold`, within [min_steps, max_steps].

    The chunk's change is that of its most changed frame (`frame_reduce="max"`; "mean" and "min" are the others), in the
    unit of `Policy.signal`. It needs no confidence head, but detects convergence one step late: the first change is
    known after step 2, so only max_steps=1 stops a chunk earlier. max_steps None is the whole schedule.
    """

    threshold: float
    min_steps: int = 1
    max_steps: int | None = None
    frame_reduce: str = "max"

    signal = "change"

    def check(self, limit: int) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not self.threshold >= 0:
            hint = "; nearest is 0.0" if number and self.threshold < 0 else ", e.g. 0.02"
            raise ValueError(f"threshold={self.threshold!r}: must be a number of at least 0{hint}")
        _check_range(self.min_steps, self.max_steps, self.frame_reduce, limit)

    def should_stop(self, chunk, step, values, limit) -> bool:
        if step >= (limit if self.max_steps is None else self.max_steps):
            return True
        if step < self.min_steps or values is None:
            return False
        return REDUCE[self.frame_reduce](values) <= self.threshold


Change = Convergence  # the earlier public name


@dataclass
class Budget(Policy):
    """A `Confidence` policy whose threshold falls as the stream falls behind frames / target_fps seconds a chunk.

        threshold = ceiling * (1 - clamp(lag / deadline, 0, 1))

    `lag` is how late the stream is, in seconds: a stream on time keeps the ceiling, one that is a whole deadline late
    takes min_steps until it has caught up; in between it settles where steps and deadline balance. Lag is clamped at
    minus one deadline, so idle time does not accumulate as credit.
    """

    target_fps: float
    ceiling: float = 0.9
    min_steps: int = 1
    max_steps: int | None = None
    frame_reduce: str = "min"
    lag: float = field(init=False, default=0.0)
    threshold: float = field(init=False)

    signal = "confidence"
    threshold_field = "ceiling"

    def __post_init__(self):
        self.threshold = self.ceiling

    def _rule(self) -> Confidence:
        return Confidence(self.threshold, self.min_steps, self.max_steps, self.frame_reduce)

    def check(self, limit: int) -> None:
        check_unit("ceiling", self.ceiling)
        self._rule().check(limit)
        fps = self.target_fps
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            raise ValueError(f"target_fps={fps!r}: must be a number of frames per second above 0, e.g. 16")

    def should_stop(self, chunk, step, values, limit) -> bool:
        return self._rule().should_stop(chunk, step, values, limit)

    def rule(self, chunk, limit) -> ExitRule:
        return self._rule().rule(chunk, limit)

    def observe(self, seconds: float, frames: int) -> None:
        deadline = frames / self.target_fps
        self.lag = max(self.lag + seconds - deadline, -deadline)
        self.threshold = self.ceiling * (1 - min(max(self.lag / deadline, 0.0), 1.0))


def parse_policy(text: str) -> Policy:
    """A policy from its command-line form: `fixed:4`, `confidence:0.8`, `relative`, `relative:mean`, `change:0.02`,
    `budget:16fps` or `per-chunk:4,2,1,3`."""
    kind, _, value = text.partition(":")
    if text == "relative":
        return Relative()
    if kind == "relative" and value in REDUCE:
        return Relative(frame_reduce=value)
    try:
        if kind == "fixed":
            return Fixed(int(value))
        if kind == "per-chunk":
            return PerChunk([int(v) for v in value.split(",")])
        if kind == "confidence":
            return Confidence(float(value))
        if kind == "change":
            return Change(float(value))
        if kind == "budget":
            return Budget(float(value.removesuffix("fps")))
    except ValueError as error:
        raise ValueError(f"steps {text!r}: {value!r} is not a number; {POLICY_FORMS}") from error
    raise ValueError(f"steps {text!r}: {POLICY_FORMS}")


POLICY_FORMS = (
    "must be fixed:N, confidence:THRESHOLD, relative, relative:min|mean|max, change:THRESHOLD, budget:FPSfps or "
    "per-chunk:N,N,..., e.g. fixed:4"
)
