"""Thresholds with names, and what they promise about the mean number of steps; the error that a confidence means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import Confidence, Fixed
from dsa_engine.training.calibrate import calibration, confidence_by_step, mean_steps, thresholds
from dsa_engine.training.head_dataset import collect


def test_mean_steps_counts_as_the_policy_does():
    confidence = np.random.default_rng(0).random((200, 4))
    for threshold in (0.0, 0.3, 0.7, 1.0):
        policy = Confidence(threshold)
        counts = [next(k for k in range(1, 5) if policy.should_stop(0, k, [row[k - 1]], 4)) for row in confidence]
        assert mean_steps(confidence, threshold) == pytest.approx(np.mean(counts))


def test_thresholds_reach_their_targets():
    confidence = np.sort(np.random.default_rng(1).random((4000, 4)), axis=1)
    found = thresholds(confidence, {"low": 1.5, "high": 3.0})
    assert mean_steps(confidence, found["low"]) == pytest.approx(1.5, abs=0.02)
    assert mean_steps(confidence, found["high"]) == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize("steps, wanted", [(4, [1.5, 1.9, 2.5]), (2, [7 / 6, 1.3, 1.5]), (8, [13 / 6, 3.1, 4.5])])
def test_the_presets_share_out_any_number_of_steps(steps, wanted):
    confidence = np.sort(np.random.default_rng(2).random((4000, steps)), axis=1)
    found = thresholds(confidence)
    assert list(found) == ["fast", "balanced", "quality"]
    assert [mean_steps(confidence, value) for value in found.values()] == pytest.approx(wanted, abs=0.05)


def test_confidences_are_those_of_the_clips_chunks_and_steps(pipe):
    """The last step's are what the pipeline itself reports for its exits, row by row (clip, chunk)."""
    prompts = ["a red circle moves sideways", "a blue square jumps"]
    found = confidence_by_step(pipe.engine.head, collect(pipe, prompts, chunks=2, seed=5))
    assert found.shape == (4, 4)
    made = pipe(prompts, seed=5, num_frames=6, step_policy=Fixed(4), output_type="latent")
    np.testing.assert_allclose(found[:, -1], np.min(made.confidence, axis=2).ravel(), atol=1e-4)


@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0, 5)), min_size=1, max_size=60))
def test_what_is_expected_is_the_falling_sequence_of_the_closed_form(pairs):
    """f_i = min over a <= i of max over b >= i of the mean of v_a..v_b (Robertson and others, 1988)."""
    confidence, distance = np.array(pairs).T
    table = calibration(confidence / 12, distance)
    values, weights = ([row[name] for row in table] for name in ("distance", "count"))
    n = len(table)

    def mean(a: int, b: int) -> float:
        return np.average(values[a : b + 1], weights=weights[a : b + 1])

    expected = [min(max(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    np.testing.assert_allclose([row["expected"] for row in table], expected, atol=1e-9)


def test_a_calibration_gives_back_the_error_that_a_confidence_has():
    rng = np.random.default_rng(3)
    confidence = rng.random((200, 5, 3, 10))
    distance = (1 - confidence) ** 2 * rng.exponential(size=confidence.shape)
    table = calibration(confidence, distance)
    assert len(table) == 10 and sum(row["count"] for row in table) == confidence.size
    for row in table:
        assert row["expected"] == pytest.approx((1 - row["confidence"]) ** 2, abs=0.05)
    edges = np.quantile(confidence, np.linspace(0, 1, 11))
    inside = (confidence > edges[3]) & (confidence <= edges[4])
    assert table[3]["distance"] == pytest.approx(distance[inside].mean(), rel=1e-6)


def test_a_calibration_never_rises_and_keeps_the_mean():
    """Where the truth rises with the confidence, all bins become one: the mean of all frames."""
    confidence = np.linspace(0, 1, 100)
    table = calibration(confidence, confidence**2)
    assert [row["expected"] for row in table] == pytest.approx([np.mean(confidence**2)] * 10)
    measured = [row["distance"] for row in table]
    assert measured == sorted(measured)


def test_equal_confidences_share_a_bin():
    table = calibration(np.repeat([0.2, 0.7], [95, 5]), np.ones(100))
    assert [(row["confidence"], row["count"]) for row in table] == [(pytest.approx(0.2), 95), (pytest.approx(0.7), 5)]
    assert calibration(np.full(3, 0.5), np.array([1.0, 2.0, 3.0])) == [
        {"confidence": 0.5, "distance": 2.0, "expected": 2.0, "count": 3}
    ]


@pytest.mark.parametrize("confidences, distances, bins", [(3, 4, 10), (0, 0, 10), (3, 3, 0)])
def test_a_calibration_of_nothing_is_refused(confidences, distances, bins):
    with pytest.raises(ValueError, match=f"{confidences} confidences, {distances} distances, {bins} bins"):
        calibration(np.ones(confidences), np.ones(distances), bins)
