"""Turns a head's confidences into what users ask for: thresholds with names, and the error that a confidence means.

All of it is measured on rollouts that the head was not fitted to. They take every step, so a chunk's past is that of
all steps; with a threshold in force fewer are taken, and the mean steps come out a little different.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dsa_engine.evaluation.statistics import import_scipy
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.training.head_dataset import HeadDataset

SHARES = {"fast": 1 / 6, "balanced": 0.3, "quality": 0.5}  # of the steps after the first: 1.5, 1.9 and 2.5 of 4
ROWS = 4096  # frames per GEMM


@torch.no_grad()
def logits(head: ConfidenceHead, rollouts: HeadDataset) -> Tensor:
    """The head's logit for every frame after every step, computed as the engine does: [C, N, S, F] float32, CPU."""
    device = next(head.parameters()).device
    parts = [head.logits(part.to(device)).cpu() for part in rollouts.features.flatten(0, 3).split(ROWS)]
    return torch.cat(parts).view(rollouts.features.shape[:4])


def confidence_by_step(head: ConfidenceHead, rollouts: HeadDataset) -> np.ndarray:
    """The chunk's confidence (the minimum over its frames) after each step: [C * N, S], clip by clip."""
    return logits(head, rollouts).sigmoid().amin(dim=3).flatten(0, 1).numpy()


def steps_taken(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Steps that a threshold would have taken: the first step that reaches it, else all. [chunks, S] -> [chunks]."""
    reached = confidence >= threshold
    reached[:, -1] = True
    return reached.argmax(axis=1) + 1


def mean_steps(confidence: np.ndarray, threshold: float) -> float:
    """Mean of `steps_taken`. confidence [chunks, S]."""
    return float(steps_taken(confidence, threshold).mean())


def thresholds(confidence: np.ndarray, targets: Mapping[str, float] | None = None) -> dict[str, float]:
    """The threshold whose mean steps come nearest to each target, rounded to three digits.

    confidence [chunks, S]; targets: mean steps per chunk by name, default 1 + share (S - 1) with the shares of SHARES.
    """
    if targets is None:
        targets = {name: 1 + share * (confidence.shape[1] - 1) for name, share in SHARES.items()}
    candidates = np.unique(np.round(np.quantile(confidence, np.linspace(0, 1, 401)), 3))
    means = np.array([mean_steps(confidence, c) for c in candidates])
    return {name: float(candidates[np.abs(means - target).argmin()]) for name, target in targets.items()}


def calibration(confidence: np.ndarray, distance: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """What a confidence means: the expected distance to the full-step estimate, never rising with the confidence.

    confidence, distance: arrays of one shape, a value per frame and step. The frames go into up to `bins` bins of
    about equal count by their confidence, equal ones into the same bin. Per bin, by rising confidence: `confidence` and
    `distance`, its means; `expected`, the falling isotonic regression of the distances; `count`, its frames.
    """
    confidence, distance = np.ravel(confidence).astype(float), np.ravel(distance).astype(float)
    if confidence.shape != distance.shape or not confidence.size or bins < 1:
        raise ValueError(
            f"{confidence.size} confidences, {distance.size} distances, {bins} bins: must be as many confidences as "
            "distances, and at least 1 of each"
        )
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]))
    _, index, count = np.unique(np.searchsorted(edges, confidence), return_inverse=True, return_counts=True)
    means = [np.bincount(index, weights=x) / count for x in (confidence, distance)]
    fit = import_scipy().optimize.isotonic_regression(means[1], weights=count, increasing=False)
    columns = zip(*(column.tolist() for column in (*means, fit.x, count)))
    return [dict(zip(("confidence", "distance", "expected", "count"), row)) for row in columns]
