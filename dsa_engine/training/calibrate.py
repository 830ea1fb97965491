"""Turns the head's confidences into thresholds with names, by rolling out held-out clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.policy import Fixed
from dsa_engine.synthetic import Caption
from dsa_engine.training.evaluate import roll

TARGETS = {"fast": 1.5, "balanced": 1.9, "quality": 2.5}  # mean steps a chunk


def confidence_by_step(pipe: Pipeline, captions: Sequence[Sequence[Caption]], seed: int = 0) -> np.ndarray:
    """The chunk's confidence (its least sure frame's) after each step of a rollout that never stops: [chunks, S]."""
    seen: list[np.ndarray] = []

    def keep(step: Step) -> None:
        seen.append(step.confidence.amin(dim=1).numpy())

    roll(pipe, captions, Fixed(pipe.max_steps), seed, on_step=keep)
    return np.stack(seen).reshape(-1, pipe.max_steps, len(captions)).transpose(0, 2, 1).reshape(-1, pipe.max_steps)


def mean_steps(confidence: np.ndarray, threshold: float) -> float:
    """Steps a chunk that a threshold would have taken: the first step that reaches it, else all. [chunks, S]."""
    reached = confidence >= threshold
    reached[:, -1] = True
    return float((reached.argmax(axis=1) + 1).mean())


def thresholds(confidence: np.ndarray, targets: Mapping[str, float] = TARGETS) -> dict[str, float]:
    """The threshold whose mean steps come nearest to each target, rounded to three digits."""
    candidates = np.unique(np.round(np.quantile(confidence, np.linspace(0, 1, 401)), 3))
    means = np.array([mean_steps(confidence.copy(), c) for c in candidates])
    return {name: float(candidates[np.abs(means - target).argmin()]) for name, target in targets.items()}
