"""How alike the clips of two pipelines are that make them from the same prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dsa_engine import Fixed, Pipeline
from dsa_engine.evaluation.rollouts import BATCH_CLIPS, Captions, roll_out
from dsa_engine.sampling.denoise import Step

WHITE = 255.0


def likeness(one: Pipeline, others: Mapping[str, Pipeline], captions: Captions, seed: int) -> dict[str, dict]:
    """PSNR in dB of the others' latents (peak: the one's largest magnitude) and frames (peak: 255), by their names.

    All steps are taken. Noise stands for one of many clips, and the least rounding may turn it into another that is as
    good, an object elsewhere: few such clips make most of the mean square, so the median over clips stands beside it;
    first: the median of the first chunk alone, which has no past that could differ.
    """
    latents, frames = all_steps(one, captions, seed)
    chunks, found = len(captions[0]), {}
    for name, other in others.items():
        latents2, frames2 = all_steps(other, captions, seed)
        squares = {
            "latents": ((latents2 - latents) ** 2, float(np.abs(latents).max())),
            "frames": ((frames2.astype(np.float32) - frames) ** 2, WHITE),
        }
        found[name] = {what: figures(square, peak, chunks) for what, (square, peak) in squares.items()}
    return found


def figures(squares: np.ndarray, peak: float, chunks: int) -> dict[str, float]:
    """squares [B, T, ...]; NaN where nothing differs."""
    first = squares[:, : squares.shape[1] // chunks]
    by_clip, by_first = ([decibels(peak, clip) for clip in part] for part in (squares, first))
    found = {"all": decibels(peak, squares), "median": float(np.median(by_clip)), "first": float(np.median(by_first))}
    return {name: value if math.isfinite(value) else math.nan for name, value in found.items()}


def decibels(peak: float, squares: np.ndarray) -> float:
    """Infinite where nothing differs."""
    mean = float(squares.mean(dtype=np.float64))
    return 10 * math.log10(peak**2 / mean) if mean else math.inf


def all_steps(pipe: Pipeline, captions: Captions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, N * F, C, h, w] and frames uint8 [B, T, H, W, 3] of rollouts that never stop early."""
    made: dict[tuple[int, int], np.ndarray] = {}

    def keep(step: Step) -> None:  # the last step's stays
        made.update(((row, step.chunk), x0.float().cpu().numpy()) for row, x0 in zip(step.rows, step.x0))

    frames = roll_out(pipe, captions, Fixed(pipe.max_steps), seed, on_step=keep, batch=BATCH_CLIPS).frames
    clips = [np.concatenate([made[row, i] for i in range(len(clip))]) for row, clip in enumerate(captions)]
    return np.stack(clips), frames
