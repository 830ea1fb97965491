"""The batcher: whose rows share the next forward of the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One row of a forward: step 1, 2, ... of a session's chunk, or, as step 0, the commit of its chunk before."""

    key: Hashable
    step: int
    commit: bool


@dataclass
class Want:
    """What a session in the queue wants: the rest of one chunk."""

    key: Hashable
    commit: bool  # the chunk before is still to be committed
    deadline: float
    since: int  # forwards that had been made when it came, or with the one that served it last
    replays: int = 0  # chunks that are still to be committed anew, each in a forward before
    step: int = 0  # the last one it was given

    def rows(self, capacity: int) -> list[Row]:
        """Those of its next forward: the commit rides with the first step, or goes alone where only one row fits."""
        if self.replays:
            return [Row(self.key, 0, True)]
        commit = [Row(self.key, 0, True)] if self.commit else []
        return [*commit, Row(self.key, self.step + 1, False)][:capacity]


class Batcher:
    """Puts the rows of many sessions, each at a step of its own, into forwards of at most `capacity` rows.

        batcher.add(key, commit)      a session wants its next chunk
        rows = batcher.next()         the model runs these rows
        batcher.report(done)          these chunks are complete; the others of the forward stay for their next step

    Order: who has been left out of more forwards since it came or was last served; among equals the earliest deadline,
    then who was added or served first. In this order a forward takes everyone whose rows still fit, so no row stays
    free that somebody could use, and who is left out comes before all that were served and all that are new.

    Fairness: when the first forward is made that a session could be in, let W be the rows of the session and of those
    before it. It is served in that forward or a later one, at most the

        ceil(W / c)-th, where c = capacity, or capacity - 1 if that is odd and the session wants two rows.

    For nobody gets before it afterwards, so those before it use all rows of a forward without it, or all but one when
    one is too few for it. In that case they are all pairs from then on, and pairs fill an even capacity: it happens
    once. Of an odd capacity they leave one row each time. A session that replays is served so once for each chunk.

    State is plain data, to be copied or pickled at any time; there is no clock and no thread in it.
    """

    def __init__(self, capacity: int):
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity={capacity!r}: must be a whole number of rows, 1 or more; nearest is 1")
        self.capacity = capacity
        self._wants: dict[Hashable, Want] = {}  # by when they were added or last served
        self._out: list[Want] = []  # whose rows are in the forward that is not yet reported
        self._forwards = 0

    def add(self, key: Hashable, commit: bool, deadline: float | None = None, replays: int = 0) -> None:
        """A session wants its next chunk.

        commit: the chunk before is to be committed, in the forward of the first step, or, with a capacity of 1, in a
        forward before it. deadline: any number, only compared with other sessions'; None is later than all. replays:
        chunks to be committed anew, one a forward, before all that. Raises ValueError for a key that is here already
        and for a deadline of NaN.
        """
        if key in self._wants:
            raise ValueError(f"session {key!r} already waits or runs: its chunk must be done or removed first")
        if deadline is not None and math.isnan(deadline):
            raise ValueError(f"deadline={deadline!r} of session {key!r}: must be a number, or None")
        self._wants[key] = Want(key, commit, math.inf if deadline is None else deadline, self._forwards, replays)

    def remove(self, key: Hashable) -> None:
        """Forget a session, also one whose rows are out. Raises ValueError for a key that is not here."""
        if key not in self._wants:
            raise ValueError(f"session {key!r} neither waits nor runs: nothing to remove")
        del self._wants[key]

    def next(self) -> list[Row]:
        """The rows of the next forward: commits first, then steps, both in order of service; [] if nobody wants one.

        Raises RuntimeError while the forward before has not been reported.
        """
        if self._out:
            raise RuntimeError(f"the forward of sessions {[w.key for w in self._out]!r} must be reported first")
        self._forwards += 1
        forward: list[Row] = []
        for want in sorted(self._wants.values(), key=lambda want: (want.since, want.deadline)):
            rows = want.rows(self.capacity)
            if len(forward) + len(rows) <= self.capacity:
                forward += rows
                if want.replays:
                    want.replays -= 1
                else:
                    want.commit, want.step = False, rows[-1].step
                want.since = self._forwards
                self._wants[want.key] = self._wants.pop(want.key)  # to the end
                self._out.append(want)
        return sorted(forward, key=lambda row: not row.commit)

    def report(self, done: Collection[Hashable]) -> None:
        """After the forward: the sessions whose chunk is done leave. One that was removed in between may be named.

        Raises ValueError, and changes nothing, for a key that had no step in this forward.
        """
        out = {want.key: want for want in self._out if want.step}
        for key in done:
            if key not in out:
                raise ValueError(f"session {key!r} cannot be done: it had no step in this forward, only {[*out]!r} had")
        for key in done:
            if self._wants.get(key) is out[key]:  # not removed, nor added anew
                del self._wants[key]
        self._out = []

    @property
    def waiting(self) -> list[Hashable]:
        """Keys of the sessions that have not been given a step of their chunk."""
        return [want.key for want in self._wants.values() if not want.step]

    @property
    def running(self) -> list[Hashable]:
        """Keys of the sessions that have been given one or more."""
        return [want.key for want in self._wants.values() if want.step]

    def __len__(self) -> int:
        return len(self._wants)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._wants
