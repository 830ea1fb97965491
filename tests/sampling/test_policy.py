"""Step policies: what they decide, what they refuse, and that a budget keeps its deadline in a simulated world."""

from __future__ import annotations

import pytest

from dsa_engine import Budget, Change, Confidence, Fixed, PerChunk, Policy, Relative
from dsa_engine.sampling.policy import parse_policy

LIMIT = 4


def steps_taken(policy, values, chunk=0) -> int:
    """Run the loop that `denoise_chunk` runs on made-up values, one list of frames per step."""
    for step, read in enumerate(values, 1):
        if step == LIMIT or policy.should_stop(chunk, step, read, LIMIT):
            return step
    raise AssertionError("more values needed")


RISING = [[0.2, 0.9], [0.5, 0.9], [0.7, 0.8], [0.95, 0.99]]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_fixed_takes_n_whatever_the_confidence(n):
    assert steps_taken(Fixed(n).start(LIMIT), RISING) == n


def test_per_chunk_follows_its_list_and_holds_the_last():
    policy = PerChunk([4, 2, 1, 3]).start(LIMIT)
    assert [steps_taken(policy, RISING, chunk) for chunk in range(6)] == [4, 2, 1, 3, 3, 3]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(threshold=0.6), 3),  # the least sure frame decides: .2, .5, .7
        (dict(threshold=0.5), 2),
        (dict(threshold=0.5, frame_reduce="max"), 1),
        (dict(threshold=0.65, frame_reduce="mean"), 2),  # means .55, .7
        (dict(threshold=0.0), 1),
        (dict(threshold=0.0, min_steps=3), 3),
        (dict(threshold=1.0), 4),
        (dict(threshold=1.0, max_steps=2), 2),
    ],
)
def test_confidence_stops_at_the_threshold(options, expected):
    assert steps_taken(Confidence(**options).start(LIMIT), RISING) == expected


FALLING = [None, [0.01, 0.5], [0.2, 0.1], [0.0, 0.0]]  # changes: none is known after the first step


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(threshold=0.5), 2),  # the most changed frame decides: .5, .2
        (dict(threshold=0.49), 3),
        (dict(threshold=0.2, max_steps=2), 2),
        (dict(threshold=0.02, frame_reduce="min"), 2),
        (dict(threshold=0.16, frame_reduce="mean"), 3),  # means .255, .15
        (dict(threshold=0.0), 4),
        (dict(threshold=float("inf")), 2),
        (dict(threshold=9, min_steps=3), 3),
        (dict(threshold=0.0, max_steps=1), 1),
    ],
)
def test_change_stops_when_the_estimate_stands_still(options, expected):
    assert steps_taken(Change(**options).start(LIMIT), FALLING) == expected


def test_change_knows_nothing_after_one_step_but_obeys_a_schedule_of_one():
    assert not Change(9.0).start(2).should_stop(0, 1, None, 2)
    assert Change(9.0).start(1).should_stop(0, 1, None, 1)


def test_each_policy_says_what_it_reads():
    policies = Fixed(1), PerChunk([1]), Confidence(), Relative(), Budget(16), Change(0.1)
    assert [policy.signal for policy in policies] == [None, None, *["confidence"] * 3, "change"]


@pytest.mark.parametrize(
    "policy, words",
    [
        (Fixed(0), ["n=0", "from 1 to 4", "nearest is 1"]),
        (Fixed(5), ["n=5", "from 1 to 4", "nearest is 4"]),
        (Fixed(2.0), ["n=2.0", "whole number"]),
        (Fixed(True), ["n=True", "whole number"]),
        (PerChunk([]), ["counts=[]"]),
        (PerChunk([2, 9]), ["counts[1]=9", "nearest is 4"]),
        (Confidence(1.5), ["threshold=1.5", "[0, 1]", "nearest is 1.0"]),
        (Confidence(-0.1), ["threshold=-0.1", "nearest is 0.0"]),
        (Confidence(float("nan")), ["threshold=nan", "[0, 1]"]),
        (Confidence(0.5, min_steps=0), ["min_steps=0", "nearest is 1"]),
        (Confidence(0.5, max_steps=7), ["max_steps=7", "nearest is 4"]),
        (Confidence(0.5, min_steps=3, max_steps=2), ["max_steps=2", "min_steps=3", "nearest is 3"]),
        (Confidence(0.5, frame_reduce="median"), ["median", "min, mean, max"]),
        (Relative(0), ["min_steps=0", "nearest is 1"]),
        (Relative(3, 2), ["max_steps=2", "min_steps=3", "nearest is 3"]),
        (Relative(frame_reduce="median"), ["median", "min, mean, max"]),
        (Relative(on_prompt_switch="forget"), ["on_prompt_switch='forget'", "keep, reset"]),
        (Change(-0.5), ["threshold=-0.5", "at least 0", "nearest is 0.0"]),
        (Change(float("nan")), ["threshold=nan", "at least 0"]),
        (Change("low"), ["threshold='low'", "a number"]),
        (Change(0.1, min_steps=5), ["min_steps=5", "nearest is 4"]),
        (Change(0.1, frame_reduce="median"), ["median", "min, mean, max"]),
        (Budget(0), ["target_fps=0", "above 0"]),
        (Budget(float("inf")), ["target_fps=inf", "above 0"]),
        (Budget(16, ceiling=2.0), ["ceiling=2.0", "nearest is 1.0"]),
    ],
)
def test_bad_values_name_the_value_the_rule_and_the_nearest(policy, words):
    with pytest.raises(ValueError) as error:
        policy.start(LIMIT)
    for word in words:
        assert word in str(error.value)


def play(policy: Budget, step_seconds, chunks: int, frames: int = 12) -> list[int]:
    """Steps of each chunk in a world where step k of any chunk yields confidence k / 4."""
    counts = []
    for chunk in range(chunks):
        count = steps_taken(policy, [[k / LIMIT] for k in range(1, LIMIT + 1)], chunk)
        policy.observe(count * step_seconds(chunk), frames)
        counts.append(count)
    return counts


@pytest.mark.parametrize("step_seconds, affordable", [(0.10, 4), (0.25, 3), (0.3, 2.5), (0.375, 2), (0.75, 1)])
def test_budget_settles_at_the_steps_that_the_deadline_affords(step_seconds, affordable):
    """12 frames at 16 fps are 0.75 s a chunk; never later than a deadline and the chunk that ran over."""
    counts = play(Budget(16, ceiling=1.0).start(LIMIT), lambda chunk: step_seconds, 60)
    late = [sum(counts[: n + 1]) * step_seconds - (n + 1) * 0.75 for n in range(60)]
    assert max(late) <= 0.75 + LIMIT * step_seconds
    assert sum(counts[20:]) / 40 == pytest.approx(affordable, abs=0.1)


def test_budget_keeps_up_through_a_slow_spell_and_recovers():
    policy = Budget(16, ceiling=1.0).start(LIMIT)
    counts = play(policy, lambda chunk: 0.5 if 20 <= chunk < 40 else 0.1, 80)
    assert sum(counts[25:40]) / 15 < 2 < 4 == counts[10] == counts[79]
    assert policy.lag <= 0


def test_streams_do_not_share_a_budget():
    given = Budget(16)
    one, other = given.start(LIMIT), given.start(LIMIT)
    one.observe(100.0, 12)
    assert one.threshold < other.threshold == given.threshold == given.ceiling


@pytest.mark.parametrize(
    "text, expected",
    [
        ("fixed:3", Fixed(3)),
        ("confidence:0.8", Confidence(0.8)),
        ("relative", Relative()),
        ("relative:mean", Relative(frame_reduce="mean")),
        ("change:0.02", Change(0.02)),
        ("budget:16fps", Budget(16.0)),
        ("budget:12.5", Budget(12.5)),
        ("per-chunk:4,2,1,3", PerChunk([4, 2, 1, 3])),
    ],
)
def test_command_line_forms(text, expected):
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fixed",
        "fixed:",
        "fixed:x",
        "magic:3",
        "per-chunk:1,,2",
        "confidence:high",
        "change:",
        "relative:",
        "relative:0.5",
    ],
)
def test_bad_command_line_forms(text):
    with pytest.raises(ValueError, match="fixed:N"):
        parse_policy(text)


def test_a_policy_with_the_earlier_names_still_decides():
    class Old(Policy):
        reads = "confidence"

        def check(self, limit):
            pass

        def done(self, chunk, step, values, limit):
            return step == limit or values[0] > 0.5

    assert Old.signal == "confidence" and steps_taken(Old().start(LIMIT), [[0.1], [0.6], [0.2]]) == 2


def test_another_threshold_is_a_copy_and_needs_a_policy_of_confidence():
    policy, budget = Confidence(0.5, min_steps=2), Budget(16, ceiling=0.9)
    assert policy.with_threshold(0.7) == Confidence(0.7, min_steps=2) and policy.threshold == 0.5
    assert budget.with_threshold(0.6).ceiling == 0.6 and budget.ceiling == 0.9
    with pytest.raises(ValueError, match="threshold=1.5.*nearest is 1.0"):
        policy.with_threshold(1.5)
    for other in (Fixed(2), PerChunk([1]), Change(0.1), Relative()):
        with pytest.raises(ValueError, match="no confidence threshold"):
            other.with_threshold(0.5)
