"""What a chunk takes, as plain data: which forwards, with which rows, and after which of them who goes on is decided.

The eager executor below and the CUDA graphs (`engine/graphs.py`) run the same plan, so that what the one does on a CPU
is what the other does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class RowSpec(NamedTuple):
    """One row of a forward: a denoising step of a slot's chunk or, with `commit`, the clean pass of the chunk before.

    ahead: the row's chunk follows one that is committed in the same forward.
    """

    slot: int
    commit: bool = False
    ahead: bool = False


class Forward(NamedTuple):
    """One forward. commit: the chunk before is committed in it; step: a denoising step is taken; decide: after it the
    stop flags say who goes on."""

    commit: bool = False
    step: bool = True
    decide: bool = False


def chunk_plan(
    min_steps: int, max_steps: int, commit: bool = False, merge: bool = True, replays: int = 0
) -> tuple[Forward, ...]:
    """The forwards of a chunk of `min_steps` to `max_steps` steps. commit: the chunk before has yet to be committed; merge: in
    the same forward as the first step, else in one of its own; replays: chunks that are committed anew before it."""
    steps = [Forward(decide=min_steps <= step < max_steps) for step in range(1, max_steps + 1)]
    if commit and merge:
        steps[0] = steps[0]._replace(commit=True)
    return tuple([Forward(commit=True, step=False)] * (replays + (commit and not merge)) + steps)


def run_plan(
    plan: Sequence[Forward],
    slots: Sequence[int],
    forward: Callable[[Sequence[RowSpec]], None],
    stopped: Callable[[Sequence[int]], Sequence[bool]],
) -> Iterator[tuple[Forward, list[int]]]:
    """Run a plan for some slots in step, forward by forward; yields each node with the slots that took part, after it.

    A slot that has stopped takes no more part; when all have, nothing is left to run. stopped(slots) is asked after a
    node that decides.
    """
    live = list(slots)
    for node in plan:
        commits = [RowSpec(slot, commit=True) for slot in slots] if node.commit else []
        forward(commits + [RowSpec(slot, ahead=node.commit) for slot in live if node.step])
        yield node, live
        if node.decide:
            live = [slot for slot, stop in zip(live, stopped(live)) if not stop]
            if not live:
                return
