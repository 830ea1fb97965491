"""The evaluation's statistics against their definitions written out naively, and on cases with a known answer."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from dsa_engine.evaluation import statistics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_mean_interval_against_a_plain_loop(rng):
    values, weights = rng.normal(size=30), rng.integers(1, 5, size=30)
    mean, low, high = statistics.mean_interval(values, weights, seed=3)
    assert mean == pytest.approx(sum(v * w for v, w in zip(values, weights)) / sum(weights))
    drawn = np.random.default_rng(3).integers(30, size=(statistics.RESAMPLES, 30)).tolist()
    means = [sum(values[i] * weights[i] for i in clips) / sum(weights[i] for i in clips) for clips in drawn]
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())
    assert low < mean < high


def test_mean_interval_has_the_width_that_the_central_limit_gives(rng):
    values = rng.normal(size=2000)
    mean, low, high = statistics.mean_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(2000), rel=0.06)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-engine\[train\]'"):
        statistics.auc(np.arange(4), np.arange(4) > 1)


def test_one_clip_is_its_own_interval():
    assert statistics.mean_interval(np.array([0.25])) == (0.25, 0.25, 0.25)


def test_clips_without_weight_do_not_count():
    assert statistics.mean_interval(np.array([1.0, np.nan, 1.0]), np.array([2, 0, 1])) == (1.0, 1.0, 1.0)
    assert all(math.isnan(x) for x in statistics.mean_interval(np.ones(2), np.zeros(2)))


def ranks(values: np.ndarray) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def test_spearman_is_pearson_of_ranks(rng):
    a, b = rng.integers(6, size=(2, 40)).astype(float)
    assert statistics.spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert statistics.spearman(a.reshape(8, 5), np.exp(a).reshape(8, 5)) == pytest.approx(1)
    assert statistics.spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(statistics.spearman(a, np.ones(40)))


def test_auc_counts_the_pairs(rng):
    scores, positive = rng.integers(5, size=40) / 5, rng.random(40) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert statistics.auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert statistics.auc(np.arange(4), np.arange(4) > 1) == 1
    assert math.isnan(statistics.auc(scores, np.ones(40, bool)))


def test_between_follows_the_curve_of_each_clip(rng):
    xs, ys = [3.0, 1.0, 2.5], rng.random((3, 7))
    for x in (1.0, 1.3, 2.5, 2.9, 3.0):
        naive = [np.interp(x, [1.0, 2.5, 3.0], ys[[1, 2, 0], clip]) for clip in range(7)]
        np.testing.assert_allclose(statistics.between(xs, ys, x), naive)
    assert statistics.between(xs, ys, 0.99) is None and statistics.between(xs, ys, 3.01) is None


def test_between_joins_points_at_the_same_place(rng):
    ys = rng.random((3, 2))
    np.testing.assert_allclose(statistics.between([1.0, 1.0, 2.0], ys, 1.0), (ys[0] + ys[1]) / 2)
    np.testing.assert_allclose(statistics.between([1.0, 1.0], ys[:2], 1.0), (ys[0] + ys[1]) / 2)


def test_energy_distance_counts_the_pairs(rng):
    a, b = rng.normal(size=(11, 3)), rng.normal(1.0, size=(14, 3))

    def mean(x, y, same):
        pairs = [math.dist(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)]
        return sum(pairs) / len(pairs)

    naive = 2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)
    assert statistics.energy_distance(a, b) == pytest.approx(naive)
    assert statistics.energy_distance(b, a) == pytest.approx(naive)


def test_energy_distance_is_near_zero_only_for_equal_distributions(rng):
    a, same = rng.normal(size=(2, 600, 2))
    shifted, narrow = same + 0.5, 0.5 * same
    assert abs(statistics.energy_distance(a, same)) < 0.02
    assert statistics.energy_distance(a, shifted) > 0.05 and statistics.energy_distance(a, narrow) > 0.05
    with pytest.raises(ValueError, match="at least 2"):
        statistics.energy_distance(a[:1], same)


def test_blocks_of_rows_change_nothing(rng, monkeypatch):
    a, b = rng.normal(size=(50, 2)), rng.normal(size=(40, 2))
    whole = statistics.energy_distance(a, b)
    monkeypatch.setattr(statistics, "BLOCK", 100)
    assert statistics.energy_distance(a, b) == pytest.approx(whole)


def test_spread_places_thresholds_at_the_mean_steps_asked_for(rng):
    values = np.sort(rng.random((3000, 4)), axis=1)
    found = statistics.spread(values, [1.2, 2.0, 3.0])

    def steps(threshold):
        return np.mean([next((k for k in (1, 2, 3) if row[k - 1] >= threshold), 4) for row in values[:1000]])

    assert [steps(t) for t in found] == pytest.approx([1.2, 2.0, 3.0], abs=0.1)
    assert found == sorted(found) and all(t == float(f"{t:.3g}") for t in found)


def test_spread_where_the_first_step_cannot_stop(rng):
    values = np.concatenate((np.full((500, 1), -np.inf), rng.random((500, 3))), axis=1)
    assert len(statistics.spread(values, [1.0, 2.0])) == 1  # the nearest to both is to stop after step 2
