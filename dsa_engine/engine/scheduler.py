"""The step scheduler: whose rows share the next forward of the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

from dsa_engine.checks import check_int


class ScheduledRow(NamedTuple):
    """One row of a forward: step 1, 2, ... of a session's chunk, or, as step 0, the commit of its previous chunk."""

    key: Hashable
    step: int
    commit: bool


@dataclass
class PendingChunk:
    """The rest of one chunk of a queued session."""

    key: Hashable
    commit: bool  # the previous chunk is still to be committed
    deadline: float
    last_served: int  # number of forwards when it was added or last served
    replays: int = 0  # earlier chunks to commit again first, one a forward
    step: int = 0  # the last one scheduled

    def rows(self, capacity: int) -> list[ScheduledRow]:
        """Rows of its next forward: the commit goes with the first step, or alone if only one row fits."""
        if self.replays:
            return [ScheduledRow(self.key, 0, True)]
        commit = [ScheduledRow(self.key, 0, True)] if self.commit else []
        return [*commit, ScheduledRow(self.key, self.step + 1, False)][:capacity]


class StepScheduler:
    """Packs the rows of many sessions, each at its own step, into forwards of at most `capacity` rows.

        scheduler.add(key, commit)      a session requests its next chunk
        rows = scheduler.next()         the model runs these rows
        scheduler.complete(done)        these chunks are complete; the others of the forward stay for their next step

    Order: the session that has been skipped by more forwards since it was added or last served; among equals the
    earliest deadline, then the one added or served first. In this order a forward takes every session whose rows still
    fit, so no usable row stays free, and a skipped session precedes all that were served and all new ones.

    Fairness: at the first forward that could include a session, let W be the rows of the session and of those before
    it. It is served at the latest in the

        ceil(W / c)-th forward, c = capacity, or capacity - 1 if capacity is odd and the session needs two rows.

    Proof: none gets ahead of it later, so those before it use all rows of a forward without it, or all but one if it
    needs two. In that case they are all pairs from then on, and pairs fill an even capacity: it happens once. Of an odd
    capacity they leave one row each time. A session that recaches is served so once per chunk.

    State is plain data, to be copied or pickled at any time; it has no clock and no thread.
    """

    def __init__(self, capacity: int):
        check_int("capacity", capacity)
        self.capacity = capacity
        self._pending: dict[Hashable, PendingChunk] = {}  # in the order they were added or last served
        self._before: dict[Hashable, PendingChunk] = {}  # the latest forward
        self._in_flight: list[PendingChunk] = []  # in the forward that is neither completed nor aborted
        self._forwards = 0

    def add(self, key: Hashable, commit: bool, deadline: float | None = None, replays: int = 0) -> None:
        """A session requests its next chunk.

        commit: the previous chunk is to be committed, in the forward of the first step or, with a capacity of 1, in one
        before it. deadline: any number, only compared with other sessions'; None is later than all. replays: earlier
        chunks to commit again first, one a forward. Raises ValueError for a key that is queued already and for a
        deadline of NaN.
        """
        if key in self._pending:
            raise ValueError(f"session {key!r} already waits or runs: its chunk must be done or removed first")
        if deadline is not None and math.isnan(deadline):
            raise ValueError(f"deadline={deadline!r} of session {key!r}: must be a number, or None")
        self._pending[key] = PendingChunk(
            key, commit, math.inf if deadline is None else deadline, self._forwards, replays
        )

    def remove(self, key: Hashable) -> None:
        """Drop a session, even in mid-forward. Raises ValueError for an unknown key."""
        if key not in self._pending:
            raise ValueError(f"session {key!r} neither waits nor runs: nothing to remove")
        del self._pending[key]

    def next(self) -> list[ScheduledRow]:
        """The rows of the next forward: commits first, then steps, both in order of service; [] without requests.

        Raises RuntimeError while the previous forward is neither completed nor aborted.
        """
        if self._in_flight:
            raise RuntimeError(f"the forward of sessions {[p.key for p in self._in_flight]!r} must be reported first")
        self._before = {key: replace(pending) for key, pending in self._pending.items()}
        self._forwards += 1
        forward: list[ScheduledRow] = []
        for pending in sorted(self._pending.values(), key=lambda pending: (pending.last_served, pending.deadline)):
            rows = pending.rows(self.capacity)
            if len(forward) + len(rows) <= self.capacity:
                forward += rows
                if pending.replays:
                    pending.replays -= 1
                else:
                    pending.commit, pending.step = False, rows[-1].step
                pending.last_served = self._forwards
                self._pending[pending.key] = self._pending.pop(pending.key)  # to the end
                self._in_flight.append(pending)
        return sorted(forward, key=lambda row: not row.commit)

    def abort(self) -> None:
        """The forward has failed: everything is as before `next`."""
        self._pending, self._in_flight = self._before, []
        self._forwards -= 1

    def complete(self, done: Collection[Hashable]) -> None:
        """The forward has run: drop the sessions whose chunk is done; one removed in between may be among them.

        Raises ValueError, and changes nothing, for a key that had no step in this forward.
        """
        out = {pending.key: pending for pending in self._in_flight if pending.step}
        for key in done:
            if key not in out:
                raise ValueError(f"session {key!r} cannot be done: it had no step in this forward, only {[*out]!r} had")
        for key in done:
            if self._pending.get(key) is out[key]:  # not removed, nor added anew
                del self._pending[key]
        self._in_flight = []

    @property
    def waiting(self) -> list[Hashable]:
        """Keys of the sessions without a step of their chunk so far."""
        return [pending.key for pending in self._pending.values() if not pending.step]

    @property
    def running(self) -> list[Hashable]:
        """Keys of the others."""
        return [pending.key for pending in self._pending.values() if pending.step]

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._pending
