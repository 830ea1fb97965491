"""Plans as data, and their executor with forwards that only count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.engine.chunk_plan import Forward, RowSpec, chunk_plan, run_plan


def test_a_fixed_count_decides_nothing():
    assert chunk_plan(1, 1) == (Forward(),)
    assert chunk_plan(3, 3) == (Forward(), Forward(), Forward())


def test_the_commit_rides_with_the_first_step_or_comes_before_it():
    assert chunk_plan(1, 2, commit=True) == (Forward(commit=True, decide=True), Forward())
    assert chunk_plan(1, 2, commit=True, merge=False) == (
        Forward(commit=True, step=False),
        Forward(decide=True),
        Forward(),
    )
    assert chunk_plan(2, 2, commit=False, merge=False) == (Forward(), Forward())


ranges = st.integers(1, 4).flatmap(lambda max_steps: st.tuples(st.integers(1, max_steps), st.just(max_steps)))


@given(ranges, st.booleans(), st.booleans())
def test_decisions_lie_between_least_and_most(bounds, commit, merge):
    min_steps, max_steps = bounds
    plan = chunk_plan(min_steps, max_steps, commit, merge)
    steps = [node for node in plan if node.step]
    assert len(steps) == max_steps and sum(node.commit for node in plan) == commit
    assert [k for k, node in enumerate(steps, 1) if node.decide] == list(range(min_steps, max_steps))


@given(st.data(), ranges, st.booleans(), st.booleans())
def test_every_slot_takes_its_own_count(data, bounds, commit, merge):
    """Against a table of how many steps each slot wants: it gets them, in order, and costs nothing after."""
    min_steps, max_steps = bounds
    slots = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    wanted = {slot: data.draw(st.integers(min_steps, max_steps)) for slot in slots}
    taken, forwards = dict.fromkeys(slots, 0), []

    def forward(rows):
        forwards.append(list(rows))
        for row in rows:
            taken[row.slot] += not row.commit

    def stopped(live):
        return [taken[slot] >= wanted[slot] for slot in live]

    seen = [
        (node, list(live))
        for node, live in run_plan(chunk_plan(min_steps, max_steps, commit, merge), slots, forward, stopped)
    ]
    assert taken == wanted
    assert len(seen) == len(forwards) == max(wanted.values()) + (commit and not merge)
    assert sum(row.commit for rows in forwards for row in rows) == commit * len(slots)
    if commit and merge:
        assert forwards[0] == [RowSpec(s, commit=True) for s in slots] + [RowSpec(s, ahead=True) for s in slots]
    assert not any(row.ahead for rows in forwards[commit and merge :] for row in rows)
