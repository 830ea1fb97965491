"""Thresholds with names: what they promise about the mean number of steps."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_engine import Confidence
from dsa_engine.synthetic import Caption
from dsa_engine.training.calibrate import confidence_by_step, mean_steps, thresholds
from dsa_engine.training.evaluate import roll


def test_mean_steps_counts_as_the_policy_does():
    confidence = np.random.default_rng(0).random((200, 4))
    for threshold in (0.0, 0.3, 0.7, 1.0):
        policy = Confidence(threshold)
        counts = [next(k for k in range(1, 5) if policy.done(0, k, [row[k - 1]], 4)) for row in confidence]
        assert mean_steps(confidence.copy(), threshold) == pytest.approx(np.mean(counts))


def test_thresholds_reach_their_targets():
    confidence = np.sort(np.random.default_rng(1).random((4000, 4)), axis=1)
    found = thresholds(confidence, {"low": 1.5, "high": 3.0})
    assert mean_steps(confidence.copy(), found["low"]) == pytest.approx(1.5, abs=0.02)
    assert mean_steps(confidence.copy(), found["high"]) == pytest.approx(3.0, abs=0.02)


def test_confidences_are_those_of_the_rows_chunks_and_steps(pipe):
    """Row by row and chunk by chunk what single clips show, in the order (chunk, clip)."""
    red, blue = Caption("red", "circle", "sideways"), Caption("blue", "square", "jumping")
    both = confidence_by_step(pipe, [[red, red], [blue, red]], seed=5)
    assert both.shape == (4, 4)
    alone = [confidence_by_step(pipe, [clip], seed=5 + i) for i, clip in enumerate(([red, red], [blue, red]))]
    np.testing.assert_allclose(both, np.stack(alone, axis=1).reshape(4, 4), atol=1e-4)
    assert roll(pipe, [[red, red]], Confidence(1.0), seed=5).confidence.min(axis=2)[0] == pytest.approx(alone[0][:, -1])
