"""Statistics of the evaluation: intervals, rank measures, curves, a distance of distributions. Needs scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES, LEVEL = 4000, 0.95
BLOCK = 2_000_000  # distances at a time


def import_scipy():
    """The package scipy, which only training and evaluation use; ImportError names the extra that brings it."""
    try:
        import scipy.optimize
        import scipy.spatial.distance
        import scipy.stats
    except ImportError as error:
        raise ImportError(f"training and evaluation need scipy: pip install 'dsa-engine[train]' ({error})") from error
    return scipy


def mean_interval(values: np.ndarray, weights: np.ndarray | None = None, seed: int = 0) -> tuple[float, float, float]:
    """Weighted mean of values [n], and the ends of its 95 % percentile bootstrap interval over the n clips.

        mean = sum_i w_i v_i / sum_i w_i;   each of 4000 resamples draws n clips with replacement

    weights: e.g. how many hard chunks a clip has; clips of weight 0 do not count, whatever their value (NaN too).
    The same seed draws the same clips, so intervals of paired differences come from differences per clip, not from two
    intervals. NaN throughout where no clip has weight.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    values, weights = np.asarray(values, float)[weights > 0], weights[weights > 0]
    if len(values) < 2:  # nothing to resample
        return (float(values[0]) if len(values) else float("nan"),) * 3
    interval = (
        import_scipy()
        .stats.bootstrap(
            (values * weights, weights),
            lambda weighted, weights, axis: weighted.sum(axis) / weights.sum(axis),
            paired=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=seed,
        )
        .confidence_interval
    )
    return float(np.average(values, weights=weights)), float(interval.low), float(interval.high)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays of one shape. NaN where one is constant."""
    a, b = np.ravel(a), np.ravel(b)
    if (a == a[0]).all() or (b == b[0]).all():  # scipy would warn
        return float("nan")
    return float(import_scipy().stats.spearmanr(a, b).statistic)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties count half. NaN where there is only one kind.

    scores, positive (bool): arrays of one shape. The Mann-Whitney U statistic over the number of pairs.
    """
    scores, positive = np.ravel(scores), np.ravel(positive)
    yes, no = scores[positive], scores[~positive]
    if not len(yes) or not len(no):
        return float("nan")
    return float(import_scipy().stats.mannwhitneyu(yes, no).statistic / (len(yes) * len(no)))


def between(xs: Sequence[float], ys: np.ndarray, x: float) -> np.ndarray | None:
    """The curve through the points (xs[i], ys[i]) at x, linear between its two neighbours; None outside of the curve.

    ys [points, ...]: e.g. a value per clip, so that the result can still be paired clip by clip. xs in any order;
    of points with the same x, their mean.
    """
    levels, inverse = np.unique(np.asarray(xs, float), return_inverse=True)
    if not levels[0] <= x <= levels[-1]:
        return None
    ys = np.stack([np.asarray(ys, float)[inverse == i].mean(axis=0) for i in range(len(levels))])
    right = int(np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)) if len(levels) > 1 else 0
    left = max(right - 1, 0)
    share = (x - levels[left]) / (levels[right] - levels[left]) if right > left else 0.0
    return (1 - share) * ys[left] + share * ys[right]


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of two samples [n, d] and [m, d], in their unit; 0 for equal distributions.

    The unbiased estimate: pairs of a point with itself do not count, so it is a little below 0 about as often as above
    where the distributions are equal. It sees any difference of distributions, a lack of variety too (Székely and
    Rizzo, "Energy statistics", 2013).
    """
    a, b = (np.asarray(x, float) for x in (a, b))
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"samples of {len(a)} and {len(b)} points: both must have at least 2, the nearest legal value")
    n, m = len(a), len(b)
    return 2 * _distances(a, b) / (n * m) - _distances(a, a) / (n * (n - 1)) - _distances(b, b) / (m * (m - 1))


def _distances(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the distances of all pairs, some rows at a time."""
    rows, cdist = max(1, BLOCK // len(b)), import_scipy().spatial.distance.cdist
    return float(sum(cdist(a[i : i + rows], b).sum() for i in range(0, len(a), rows)))


def spread(values: np.ndarray, targets: Sequence[float]) -> list[float]:
    """Thresholds, to 3 digits, at which stopping at values >= threshold takes about `targets` mean steps.

    values [chunks, S]: larger is more confident; -inf where stopping is not possible; after step S all stop.
    """
    finite = values[np.isfinite(values)]
    candidates = np.unique([float(f"{c:.3g}") for c in np.quantile(finite, np.linspace(0, 1, 401))])
    reached = values[:, :-1, None] >= candidates
    steps = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, values.shape[1]).mean(axis=0)
    return sorted({float(candidates[np.abs(steps - target).argmin()]) for target in targets})
