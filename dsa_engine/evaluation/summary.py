"""Figures of an evaluation: of each policy, of its paired differences to others, and of the head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsa_engine.evaluation import statistics
from dsa_engine.evaluation.rollouts import HARD, Table, Trace, mean_scores

KINDS = ("first", "cut", "jumping", "soft", "same")


def per_clip(table: Table) -> np.ndarray:
    """Share of valid frames of each clip [B]."""
    return table.valid.mean(axis=(1, 2))


def figures(table: Table, limit: int, teacher: Table | None = None) -> dict:
    """All figures of one policy, see `mean_scores`; NaN where there is nothing to measure.

    passes: forwards per chunk, the steps and the commit, which the last chunk of a clip does not need; ratio: steps of
    hard over those of easy chunks; steps_histogram: chunks that took 1 .. limit steps; ci: 95 % interval of valid
    over clips; quarters: valid by quarter of the clip, none below 4 chunks; distance: to the teacher's chunks.
    """
    values = mean_scores(table)
    valid, low, high = statistics.mean_interval(per_clip(table))
    quarters = np.array_split(table.valid, 4, axis=1) if table.valid.shape[1] >= 4 else []
    return {
        "mean_steps": values["steps"],
        "passes": values["steps"] + 1 if values["steps"] else 0.0,
        "steps_easy": values["steps_easy"],
        "steps_hard": values["steps_hard"],
        "ratio": values["steps_hard"] / values["steps_easy"] if values["steps_easy"] else math.nan,
        "steps_histogram": np.bincount(table.steps.ravel(), minlength=limit + 1)[1:].tolist(),
        "valid": valid,
        "ci": [low, high],
        "valid_easy": values["valid_easy"],
        "valid_hard": values["valid_hard"],
        "all_valid": values["clip"],
        **{name: values[name] for name in ("motion", "mse", "texture", "steady")},
        "quarters": [float(part.mean()) for part in quarters],
        "distance": None if teacher is None else distance(table, teacher),
    }


def distance(table: Table, other: Table) -> dict[str, float]:
    """Energy distances of two sets of chunks, in px: of their mean positions, and of their displacements per frame."""
    positions, moves = [], []
    for xy in (table.xy, other.xy):
        positions.append(xy.mean(axis=2).reshape(-1, 2))
        moves.append(np.diff(xy, axis=2).reshape(len(positions[-1]), -1))
    return {"place": statistics.energy_distance(*positions), "move": statistics.energy_distance(*moves)}


def difference(values: np.ndarray, weights: np.ndarray | None = None) -> dict:
    """Mean of paired differences, one per clip, and its 95 % interval."""
    mean, low, high = statistics.mean_interval(values, weights)
    return {"difference": mean, "ci": [low, high]}


def versus(table: Table, others: Mapping[str, Table], curves: Mapping[str, Sequence[Table]]) -> dict[str, dict | None]:
    """valid of one policy minus that of others, and of curves of operating points at equal mean steps; paired by clip.

    A curve is linear, clip by clip, between its two points next in mean steps; None where it does not reach.
    """
    against = {name: per_clip(other) for name, other in others.items()}
    for name, points in curves.items():
        steps, valid = [p.steps.mean() for p in points], np.stack([per_clip(p) for p in points])
        against[name] = statistics.between(steps, valid, table.steps.mean())
    return {name: None if v is None else difference(per_clip(table) - v) for name, v in against.items()}


def compare(one: Table, other: Table) -> dict:
    """valid and valid_hard of `other` minus those of `one` on the same clips, and the mean steps of both."""
    hard = np.broadcast_to(one.hard[..., None], one.valid.shape)
    change, count = other.valid.astype(float) - one.valid, hard.sum(axis=(1, 2))
    return {
        "mean_steps": [float(one.steps.mean()), float(other.steps.mean())],
        "valid": difference(change.mean(axis=(1, 2))),
        "valid_hard": difference((change * hard).sum(axis=(1, 2)) / np.maximum(count, 1), count),
    }


def head_figures(seen: Trace, exits: Sequence[tuple[np.ndarray, Table]], default: Table) -> dict:
    """Does the head know which chunks are hard and which estimates are done? Ranks only, so its scale does not matter.

    auc_hard: of 1 - the chunk's confidence (the minimum over its frames) after step 1, hard chunks against the others;
    spearman: of -confidence with the distance to the last estimate, frames of all steps but the last, also by step;
    correlation: of -confidence with the template error of the same frame, over `exits`: (confidence [B, N, F], table)
    of fixed counts, also by count. default: a table at the default threshold, for the steps by kind of chunk;
    steps_event: mean of first, cut and jumping chunks; steps_quiet: of those that just go on.
    """
    doubt, distance, limit = -seen.confidence[:, :, :-1], seen.distance, seen.confidence.shape[2]
    exit_doubt, error = np.stack([-c for c, _ in exits]), np.stack([t.fit for _, t in exits])
    by_kind = {kind: default.steps[default.kind == kind] for kind in KINDS}

    def mean(steps: np.ndarray) -> float:
        return float(steps.mean()) if steps.size else math.nan

    return {
        "auc_hard": statistics.auc(1 - seen.confidence[:, :, 0].min(axis=2), default.hard),
        "spearman": statistics.spearman(doubt, distance),
        "spearman_by_step": [statistics.spearman(doubt[:, :, k], distance[:, :, k]) for k in range(limit - 1)],
        "correlation": statistics.spearman(exit_doubt, error),
        "correlation_by_step": [statistics.spearman(a, b) for a, b in zip(exit_doubt, error)],
        "steps_event": mean(default.steps[np.isin(default.kind, HARD)]),
        "steps_quiet": mean(by_kind["same"]),
        "steps_by_kind": {
            kind: {"histogram": np.bincount(steps, minlength=limit + 1)[1:].tolist(), "mean": mean(steps)}
            for kind, steps in by_kind.items()
        },
    }


def rounded(value: Any, digits: int = 5) -> Any:
    """Ready for JSON: floats to 5 significant digits, NaN as null, numpy's scalars as plain ones."""
    if isinstance(value, dict):
        return {str(k): rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    if isinstance(value, np.generic):
        return rounded(value.item(), digits)
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}")
    return value
