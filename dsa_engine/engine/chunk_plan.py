"""What a chunk takes, as plain data: its forwards, how they are launched, and after which of them rows may stop.

`run_plan` is the one executor: a rollout on its own, CUDA graphs and the batch runner all run the launches it yields.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple


class RowSpec(NamedTuple):
    """One row of a forward: a denoising step of a slot's chunk or, with `commit`, the clean pass of its previous chunk.

    ahead: the row's chunk follows one that is committed in the same forward.
    """

    slot: int
    commit: bool = False
    ahead: bool = False


class Forward(NamedTuple):
    """One forward. commit: it commits the previous chunk; step: it takes a denoising step; decide: the stop flags
    afterwards say which slots go on."""

    commit: bool = False
    step: bool = True
    decide: bool = False

    def rows(self, slots: Sequence[int]) -> list[RowSpec]:
        """Its rows for some slots, commits first."""
        commits = [RowSpec(slot, commit=True) for slot in slots if self.commit]
        return commits + [RowSpec(slot, ahead=self.commit) for slot in slots if self.step]


class LaunchSpec(NamedTuple):
    """Forwards that are launched as one. loop: the last is repeated on the device until every row has stopped."""

    forwards: tuple[Forward, ...]
    loop: bool = False


def chunk_plan(min_steps: int, max_steps: int, commit: bool = False, recaches: int = 0) -> tuple[Forward, ...]:
    """The forwards of a chunk of `min_steps` to `max_steps` steps.

    commit: the first step also commits the previous chunk; recaches: earlier chunks to commit again first, one a
    forward.
    """
    steps = [Forward(commit and step == 1, decide=min_steps <= step < max_steps) for step in range(1, max_steps + 1)]
    return (*[Forward(commit=True, step=False)] * recaches, *steps)


def split_commits(plan: Iterable[Forward]) -> tuple[Forward, ...]:
    """The plan with each commit in a forward of its own, for where only one row fits."""
    return tuple(part for forward in plan for part in _split(forward))


def _split(forward: Forward) -> tuple[Forward, ...]:
    if not (forward.commit and forward.step):
        return (forward,)
    return Forward(commit=True, step=False), forward._replace(commit=False)


def lower(plan: Sequence[Forward], unroll: bool = False, loop: bool = False) -> tuple[LaunchSpec, ...]:
    """A plan as launches.

    unroll: steps up to a decision are one launch; loop: with a decision among them, all steps are one launch and the
    device decides. Otherwise, and for a commit without a step, each forward is its own.
    """
    loop = loop and any(forward.decide for forward in plan)
    launches, pending = [], []
    for forward in plan:
        pending.append(forward)
        if not forward.step or not (loop or unroll) or (forward.decide and not loop):
            launches.append(LaunchSpec(tuple(pending)))
            pending = []
    return (*launches, LaunchSpec(tuple(pending), loop)) if pending else tuple(launches)


def run_plan(
    launches: Iterable[LaunchSpec],
    slots: Sequence[int],
    on_forward_done: Callable[[Forward, Sequence[int]], None],
    stopped: Callable[[Sequence[int], list | None], Sequence[bool]],
    steps_taken: Callable[[Sequence[int]], Sequence[int]],
) -> Generator[tuple[LaunchSpec, list[int]], list | None, None]:
    """Run a plan for slots in lockstep: yields each launch with the slots that take part; the caller runs it, then
    resumes. A slot that has stopped takes no more part; the plan ends when all have.

    Args:
        on_forward_done: called for each forward of a launch, with the slots that took part, once it has run.
        stopped: called after a forward that decides, with the slots and what the caller sent: None, or the stop flags
            if it has read them already.
        steps_taken: called after a loop: how many steps each slot has taken.
    """
    live = list(slots)
    for launch in launches:
        state = yield launch, live
        if launch.loop:
            counts = steps_taken(live)
            for step, forward in enumerate(launch.forwards[: max(counts)]):
                on_forward_done(forward, [slot for slot, count in zip(live, counts) if count > step])
            return
        for forward in launch.forwards:
            on_forward_done(forward, live)
        if launch.forwards[-1].decide:
            live = [slot for slot, stop in zip(live, stopped(live, state)) if not stop]
            if not live:
                return
