"""The step scheduler in a simulated world: every stream is served, in order, and within the stated bound."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine.engine.scheduler import ScheduledRow, StepScheduler

COUNTS = st.integers(1, 4)
DEADLINES = st.none() | st.integers(0, 3) | st.just(-math.inf)
CAPACITIES = st.integers(1, 6)


@dataclass(frozen=True)
class Stream:
    """A session as the world brings it: it asks for one chunk after the other, each of a number of steps."""

    steps: tuple[int, ...]
    commit: bool = False  # before its first chunk; every later chunk has one to commit
    deadline: float | None = None
    arrival: int = 0  # comes before this forward is made
    late: bool = False  # or while it is out
    leaves: int | None = None  # is closed while this forward is out
    replays: int = 0  # chunks that are committed anew before each chunk that has one to commit

    def rows(self) -> list[tuple[int, bool]]:
        """(step, commit) of all it should be given, in order."""
        commits = [self.commit, *(True for _ in self.steps[1:])]
        before = [(0, True)] * (1 + self.replays)
        return [r for n, c in zip(self.steps, commits) for r in before * c + [(s, False) for s in range(1, n + 1)]]


@dataclass
class Account:
    """The test's own account of one wanted chunk, kept apart from the scheduler's."""

    stream: Stream
    chunk: int
    number: int  # rises with everyone that is added or served
    given: list[ScheduledRow] = field(default_factory=list)
    first: int | None = None  # the forward since which it contends for its next rows
    due: int | None = None  # the forward by which it must have them

    @property
    def complete(self) -> bool:
        return bool(self.given) and self.given[-1].step == self.stream.steps[self.chunk]

    @property
    def place(self) -> tuple[int, float, int]:
        deadline = self.stream.deadline
        return self.first, math.inf if deadline is None else deadline, self.number

    def needs(self, capacity: int) -> int:
        return 2 if self.commits and len(self.given) == self.stream.replays and capacity > 1 else 1

    @property
    def commits(self) -> bool:
        return self.stream.commit or self.chunk > 0


@dataclass
class Forward:
    """wanted: rows that each session asked for, those served among them; due: the last forward that keeps the rule."""

    wanted: dict[int, int]
    due: dict[int, int]
    rows: list[ScheduledRow]

    @property
    def served(self) -> set[int]:
        return {row.key for row in self.rows}


class World:
    """Streams, by their index, on a scheduler; `history` holds every forward, `given` every stream's rows."""

    def __init__(self, capacity: int, streams: list[Stream]):
        self.capacity, self.streams, self.scheduler = capacity, streams, StepScheduler(capacity)
        self.accounts: dict[int, Account] = {}
        self.history: list[Forward] = []
        self.given: list[list[tuple[int, bool]]] = [[] for _ in streams]
        self.number = 0

    def run(self) -> World:
        last = max(stream.arrival for stream in self.streams)
        limit = last + 1 + sum(len(stream.rows()) for stream in self.streams)  # a forward with no row only waits
        while self.accounts or len(self.history) <= last:
            assert len(self.history) < limit, "forwards go by without a row"
            self.forward(len(self.history))
        assert len(self.scheduler) == 0
        return self

    def forward(self, now: int) -> None:
        self.arrive(now, late=False)
        wanted = self.contend(now)
        due = {key: account.due for key, account in self.accounts.items()}
        rows = self.scheduler.next()
        self.history.append(Forward(wanted, due, rows))
        served = sorted((self.accounts[key] for key in {row.key for row in rows}), key=lambda account: account.place)
        for row in rows:
            self.accounts[row.key].given.append(row)
            self.given[row.key].append((row.step, row.commit))
        for account in served:  # in the order of service, which the rows do not show: commits stand first
            account.first, account.number = None, self.tick()
        self.arrive(now, late=True)
        done = [key for key in self.history[-1].served if self.accounts[key].complete]
        for key in [key for key in self.accounts if self.streams[key].leaves == now]:
            self.scheduler.remove(key)
            del self.accounts[key]
        self.scheduler.complete(done)  # also those that were removed: the model does not know that they are gone
        for key in [key for key in done if key in self.accounts]:
            account = self.accounts.pop(key)
            if account.chunk + 1 < len(account.stream.steps):
                self.add(key, account.chunk + 1)
        assert {*self.scheduler.waiting, *self.scheduler.running} == self.accounts.keys()

    def arrive(self, now: int, late: bool) -> None:
        for key, stream in enumerate(self.streams):
            if (stream.arrival, stream.late) == (now, late):
                self.add(key, 0)

    def add(self, key: int, chunk: int) -> None:
        account = self.accounts[key] = Account(self.streams[key], chunk, self.tick())
        replays = account.stream.replays * account.commits
        self.scheduler.add(key, account.commits, account.stream.deadline, replays)

    def tick(self) -> int:
        self.number += 1
        return self.number

    def contend(self, now: int) -> dict[int, int]:
        """Rows wanted by everyone here; who newly contends is told its last forward by the rule of the docstring."""
        new = [account for account in self.accounts.values() if account.first is None]
        for account in new:
            account.first = now
        for account in new:
            before = [other for other in self.accounts.values() if other.place <= account.place]
            rows, own = sum(other.needs(self.capacity) for other in before), account.needs(self.capacity)
            account.due = now + math.ceil(rows / (self.capacity - (self.capacity % 2 if own == 2 else 0))) - 1
        return {key: account.needs(self.capacity) for key, account in self.accounts.items()}


STEPS = st.lists(COUNTS, min_size=1, max_size=3).map(tuple)
LEAVES = st.none() | st.integers(0, 12)
STREAM = st.builds(Stream, STEPS, st.booleans(), DEADLINES, st.integers(0, 8), st.booleans(), LEAVES, st.integers(0, 2))
STREAMS = st.lists(STREAM, min_size=1, max_size=9)
CROWD = st.lists(st.builds(Stream, STEPS, st.booleans(), DEADLINES), min_size=1, max_size=9)  # all there from the start


@given(CAPACITIES, STREAMS)
@settings(max_examples=100)
def test_every_stream_gets_exactly_its_rows_in_order(capacity, streams):
    world = World(capacity, streams).run()
    for stream, given_rows in zip(streams, world.given):
        expected = stream.rows()
        assert given_rows == (expected if stream.leaves is None else expected[: len(given_rows)])


@given(CAPACITIES, STREAMS)
@settings(max_examples=100)
def test_a_forward_holds_at_most_its_capacity_with_commits_first(capacity, streams):
    for forward in World(capacity, streams).run().history:
        assert len(forward.rows) <= capacity
        assert [row.commit for row in forward.rows] == sorted((row.commit for row in forward.rows), reverse=True)
        commits = [row.key for row in forward.rows if row.commit]
        steps = {row.key: row.step for row in forward.rows if not row.commit}
        assert len(commits) + len(steps) == len(forward.rows) == len(set(forward.rows))
        if capacity > 1:
            assert all(steps.get(key, 1) == 1 for key in commits)  # replays go alone
            both = [key for key in commits if key in steps]
            assert [key for key in steps if key in commits] == both  # one order of service for both


@given(CAPACITIES, STREAMS)
@settings(max_examples=100)
def test_no_row_stays_free_that_somebody_could_use(capacity, streams):
    for forward in World(capacity, streams).run().history:
        free = capacity - len(forward.rows)
        assert {key for key, rows in forward.wanted.items() if key not in forward.served and rows <= free} == set()


@given(CAPACITIES, STREAMS)
@settings(max_examples=400)
def test_everyone_is_served_within_the_stated_number_of_forwards(capacity, streams):
    for now, forward in enumerate(World(capacity, streams).run().history):
        overdue = {key for key, due in forward.due.items() if due <= now}
        assert overdue <= forward.served, f"forward {now}"


@given(CAPACITIES, STREAMS)
@settings(max_examples=100)
def test_who_is_left_out_comes_before_all_that_were_served_and_all_that_are_new(capacity, streams):
    """Left out once more, it is for others that were left out: all the rest have too few rows to be of use to it."""
    history = World(capacity, streams).run().history
    for before, after in zip(history, history[1:]):
        left = before.wanted.keys() - before.served
        for key in (left & after.wanted.keys()) - after.served:
            assert sum(row.key not in left for row in after.rows) < after.wanted[key]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.booleans(), st.integers(0, 3))
def test_with_enough_rows_all_take_the_steps_of_the_longest(steps, commit, spare):
    capacity = len(steps) * (1 + commit) + spare
    world = World(capacity + (capacity == 1), [Stream((n,), commit) for n in steps]).run()
    assert len(world.history) == max(steps)


@given(CAPACITIES, CROWD)
def test_the_forwards_of_a_crowd_stay_within_the_bound_of_any_greedy_order(capacity, streams):
    """For single rows: a forward without the last stream is full of others', so there are (all - own) / capacity."""
    streams = [Stream(stream.steps[:1], False, stream.deadline) for stream in streams]
    world, steps = World(capacity, streams).run(), [stream.steps[0] for stream in streams]
    assert len(world.history) >= max(max(steps), math.ceil(sum(steps) / capacity))
    assert len(world.history) <= max(n + (sum(steps) - n) // capacity for n in steps)


@given(CROWD)
def test_a_capacity_of_one_row_is_never_idle(streams):
    assert len(World(1, streams).run().history) == sum(len(stream.rows()) for stream in streams)


@given(CAPACITIES, st.lists(COUNTS, min_size=1, max_size=8), st.integers(1, 3))
def test_shares_differ_by_one_step_at_most(capacity, steps, rounds):
    """Streams without end, commits or deadlines. Who is served with whom must not decide who is served more often."""
    scheduler, had = StepScheduler(capacity), Counter()
    for key in range(len(steps)):
        scheduler.add(key, False)
        had[key] = 0
    for _ in range(rounds * len(steps)):
        had.update(row.key for row in scheduler.next())
        scheduler.complete([])
        assert max(had.values()) - min(had.values()) <= 1
