"""Plans and launches as data, and their executor with forwards that only count."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.engine.chunk_plan import Forward, LaunchSpec, RowSpec, chunk_plan, lower, run_plan, split_commits


def test_a_fixed_count_decides_nothing():
    assert chunk_plan(1, 1) == (Forward(),)
    assert chunk_plan(3, 3) == (Forward(), Forward(), Forward())


def test_the_commit_rides_with_the_first_step_or_comes_before_it():
    merged = (Forward(commit=True, decide=True), Forward())
    assert chunk_plan(1, 2, commit=True) == merged
    assert split_commits(merged) == (Forward(commit=True, step=False), Forward(decide=True), Forward())
    assert split_commits(chunk_plan(2, 2)) == (Forward(), Forward())


def test_recaches_come_first_and_never_with_a_step():
    alone = Forward(commit=True, step=False)
    assert chunk_plan(1, 1, commit=True, recaches=2) == (alone, alone, Forward(commit=True))
    assert split_commits((alone, Forward(commit=True))) == (alone, alone, Forward())


def test_a_known_count_is_one_launch_where_steps_are_unrolled():
    plan = chunk_plan(3, 3, commit=True)
    assert lower(plan, unroll=True) == lower(plan, unroll=True, loop=True) == (LaunchSpec(plan),)
    assert lower(plan) == lower(plan, loop=True) == tuple(LaunchSpec((forward,)) for forward in plan)


def test_after_the_least_count_it_is_a_step_at_a_time_or_one_loop():
    plan = chunk_plan(2, 4, commit=True)
    assert [len(part.forwards) for part in lower(plan, unroll=True)] == [2, 1, 1]
    assert [len(part.forwards) for part in lower(plan)] == [1, 1, 1, 1]
    assert lower(plan, loop=True) == lower(plan, unroll=True, loop=True) == (LaunchSpec(plan, loop=True),)


def test_a_commit_of_its_own_is_a_launch_of_its_own():
    plan = split_commits(chunk_plan(1, 2, commit=True))
    assert [(len(part.forwards), part.loop) for part in lower(plan, loop=True)] == [(1, False), (2, True)]


ranges = st.integers(1, 5).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))


@given(ranges, st.booleans(), st.booleans())
def test_decisions_lie_between_least_and_most(bounds, commit, split):
    min_steps, max_steps = bounds
    plan = chunk_plan(min_steps, max_steps, commit)
    plan = split_commits(plan) if split else plan
    steps = [forward for forward in plan if forward.step]
    assert len(steps) == max_steps and sum(forward.commit for forward in plan) == commit
    assert [k for k, forward in enumerate(steps, 1) if forward.decide] == list(range(min_steps, max_steps))


@given(st.data(), ranges, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_every_slot_takes_its_own_count(data, bounds, commit, split, unroll, loop):
    """Against a table of how many steps each slot wants: it gets them, in order, and costs nothing after; the same
    forwards of the same slots whatever is launched at once."""
    plan = chunk_plan(*bounds, commit)
    plan = split_commits(plan) if split else plan
    slots = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    counts = {slot: data.draw(st.integers(*bounds)) for slot in slots}
    taken, forwards, done = dict.fromkeys(slots, 0), [], []

    def stopped(live, state):
        assert state is None
        return [taken[slot] >= counts[slot] for slot in live]

    launches = lower(plan, unroll, loop)
    seen = run_plan(launches, slots, lambda *of: done.append(of), stopped, lambda live: [taken[slot] for slot in live])
    for launch, live in seen:
        for forward in launch.forwards:
            if launch.loop and all(taken[slot] >= counts[slot] for slot in live):
                break
            rows = forward.rows(live)  # of a loop, those that have stopped run idle
            forwards.append([row for row in rows if row.commit or taken[row.slot] < counts[row.slot]])
            for row in forwards[-1]:
                taken[row.slot] += not row.commit
    assert taken == counts
    assert len(forwards) == max(counts.values()) + (commit and split)
    assert [(forward, forward.rows(live)) for forward, live in done] == list(zip(plan, forwards))
    assert sum(row.commit for rows in forwards for row in rows) == commit * len(slots)
    if commit and not split:
        assert forwards[0] == [RowSpec(s, commit=True) for s in slots] + [RowSpec(s, ahead=True) for s in slots]
    assert not any(row.ahead for rows in forwards[commit and not split :] for row in rows)
    assert tuple(itertools.chain.from_iterable(launch.forwards for launch in launches)) == plan


def test_what_the_caller_sends_is_what_is_asked():
    asked = []
    run = run_plan(lower(chunk_plan(1, 2)), [3], lambda *_: None, lambda *of: asked.append(of) or [False], None)
    assert next(run) == (LaunchSpec((Forward(decide=True),)), [3])
    assert run.send("flags") == (LaunchSpec((Forward(),)), [3])
    assert asked == [([3], "flags")]
