"""The step scheduler by example, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
from hypothesis import strategies as st

from dsa_engine.engine.scheduler import ScheduledRow, StepScheduler

COUNTS = st.integers(1, 4)
DEADLINES = st.none() | st.integers(0, 3) | st.just(-math.inf)
CAPACITIES = st.integers(1, 6)


def keys(rows: list[ScheduledRow]) -> str:
    """The sessions in the order of their step rows, those with a commit in capitals."""
    commits = {row.key for row in rows if row.commit}
    return "".join(row.key.upper() if row.key in commits else row.key for row in rows if not row.commit)


def filled(capacity: int, sessions: str) -> StepScheduler:
    """A scheduler that was asked by each of the sessions; capitals have a commit."""
    scheduler = StepScheduler(capacity)
    for name in sessions:
        scheduler.add(name.lower(), name.isupper())
    return scheduler


def test_a_chunk_that_stops_early_makes_room_in_the_very_next_forward():
    scheduler = filled(2, "abc")
    assert keys(scheduler.next()) == "ab"
    scheduler.complete("a")
    assert scheduler.next() == [ScheduledRow("c", 1, False), ScheduledRow("b", 2, False)]
    scheduler.complete("c")
    assert scheduler.next() == [ScheduledRow("b", 3, False)]


def test_sessions_at_different_steps_share_a_forward_and_commits_ride_with_first_steps():
    scheduler = filled(4, "ab")
    assert scheduler.next() == [ScheduledRow("a", 1, False), ScheduledRow("b", 1, False)]
    scheduler.complete("a")
    scheduler.add("a", commit=True)
    assert scheduler.next() == [ScheduledRow("a", 0, True), ScheduledRow("b", 2, False), ScheduledRow("a", 1, False)]


def test_without_deadlines_sessions_take_turns():
    scheduler, order = filled(2, "abcde"), ""
    for _ in range(5):
        order += keys(scheduler.next())
        scheduler.complete("")
    assert order == "abcdeabcde"


@pytest.mark.parametrize(
    "capacity, sessions, forwards",
    [
        (2, "aB", ["a", "B", "ab"]),  # B does not fit beside a, and goes first the next time
        (2, "aBc", ["ac", "B", "ac"]),  # c takes the row that B could not use
        (2, "aBcd", ["ac", "B", "da", "cb"]),
        (2, "aBC", ["a", "B", "C"]),  # C is served in forward ceil(5 / 2), as late as the rule allows
        (3, "ABC", ["A", "Ba", "Cb"]),  # here in forward ceil(6 / (3 - 1)), later than ceil(6 / 3)
        (3, "aBC", ["aB", "Ca", "bca"]),
        (3, "ABc", ["Ac", "Ba", "cba"]),
        (4, "abcDE", ["abc", "DE", "abcd"]),
    ],
)
def test_two_rows_that_do_not_fit_in_the_last_free_one(capacity, sessions, forwards):
    scheduler = filled(capacity, sessions)
    for expected in forwards:
        assert keys(scheduler.next()) == expected
        scheduler.complete("")


def test_with_one_row_the_commit_is_a_forward_of_its_own_before_the_first_step():
    scheduler = filled(1, "A")
    assert scheduler.next() == [ScheduledRow("a", 0, True)]
    with pytest.raises(ValueError, match="'a'"):  # no step yet, so no chunk
        scheduler.complete("a")
    assert scheduler.waiting == ["a"]
    scheduler.complete("")
    assert scheduler.next() == [ScheduledRow("a", 1, False)]
    scheduler.complete("a")
    assert len(scheduler) == 0


def test_the_earliest_deadline_goes_first_among_equals():
    scheduler = StepScheduler(2)
    for key, deadline in {"a": None, "b": 9.0, "c": 2.0, "d": 9.0, "e": -1}.items():
        scheduler.add(key, False, deadline)
    for expected in ("ec", "bd", "ae"):  # a has been left out twice; of the others e is the most urgent
        assert keys(scheduler.next()) == expected
        scheduler.complete("")


def test_urgent_newcomers_do_not_starve_who_has_no_deadline():
    scheduler = StepScheduler(1)
    scheduler.add("patient", False)
    scheduler.add(0, False, 0.0)
    served = []
    for now in range(1, 5):
        served += [row.key for row in scheduler.next()]
        scheduler.complete(served[-1:])
        scheduler.add(now, False, -float(now))
    assert served == [0, "patient", 1, 2]


def test_waiting_until_the_first_step_then_running_until_done():
    scheduler = filled(2, "abC")
    assert (scheduler.waiting, scheduler.running, len(scheduler)) == (["a", "b", "c"], [], 3)
    scheduler.next()
    assert (scheduler.waiting, scheduler.running, len(scheduler)) == (["c"], ["a", "b"], 3)
    scheduler.complete("b")
    assert (scheduler.waiting, scheduler.running, len(scheduler)) == (["c"], ["a"], 2)
    assert "a" in scheduler and "b" not in scheduler


def test_a_session_that_leaves_makes_room_at_once():
    scheduler = filled(1, "abc")
    scheduler.remove("a")
    assert keys(scheduler.next()) == "b"
    scheduler.remove("b")  # while its row is out
    scheduler.complete("")
    assert keys(scheduler.next()) == "c"


def test_a_session_closed_and_opened_anew_during_a_forward_is_not_ended_by_its_report():
    scheduler = filled(1, "a")
    scheduler.next()
    scheduler.remove("a")
    scheduler.add("a", commit=False)
    scheduler.complete("a")
    assert scheduler.next() == [ScheduledRow("a", 1, False)]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("out", [False, True])
def test_a_copy_goes_on_as_the_original_would(clone, out):
    scheduler = filled(3, "aBcD")
    scheduler.complete([row.key for row in scheduler.next()][:1])
    if out:
        scheduler.next()
    other = clone(scheduler)
    for done in ("c" if out else "", "", "d"):
        results = []
        for each in (scheduler, other):
            if out:
                each.complete(done)
            results.append(each.next())
            if not out:
                each.complete("")
        assert results[0] == results[1] != []


def test_errors_name_the_key_and_change_nothing():
    scheduler = filled(2, "abc")
    with pytest.raises(ValueError, match="'b' already"):
        scheduler.add("b", commit=True)
    with pytest.raises(ValueError, match="'x' neither"):
        scheduler.remove("x")
    with pytest.raises(ValueError, match="nan of session 'x'"):
        scheduler.add("x", commit=False, deadline=math.nan)
    with pytest.raises(ValueError, match="'a' cannot be done"):
        scheduler.complete("a")  # no forward is out
    scheduler.next()
    with pytest.raises(RuntimeError, match="'a', 'b'"):
        scheduler.next()
    with pytest.raises(ValueError, match="'a' already"):
        scheduler.add("a", commit=False)
    with pytest.raises(ValueError, match=r"'c' cannot be done: .*\['a', 'b'\]"):
        scheduler.complete("ac")
    scheduler.complete("a")
    assert scheduler.next() == [ScheduledRow("c", 1, False), ScheduledRow("b", 2, False)]


def test_nobody_wants_a_forward():
    scheduler = StepScheduler(2)
    assert scheduler.next() == [] == scheduler.next()
    scheduler.complete([])


@pytest.mark.parametrize("capacity", [0, -3, 1.5, True, None, "4"])
def test_a_capacity_is_a_whole_number_of_rows(capacity):
    with pytest.raises(ValueError, match="must be a whole number of at least 1; nearest is [12]"):
        StepScheduler(capacity)


def test_an_aborted_forward_is_scheduled_again():
    scheduler = filled(3, "abcd")
    scheduler.complete({row.key for row in scheduler.next()} & set("a"))
    before = copy.deepcopy([*scheduler._pending.items()])
    rows = scheduler.next()
    scheduler.abort()
    assert [*scheduler._pending.items()] == before and scheduler.next() == rows
