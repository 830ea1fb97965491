"""How alike the clips of two pipelines are that make them from the same prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dsa_engine import Fixed, Pipeline
from dsa_engine.evaluation.rollouts import BATCH_CLIPS, Captions, roll_out
from dsa_engine.sampling.denoise import Step

WHITE = 255.0


def psnr(one: Pipeline, others: Mapping[str, Pipeline], captions: Captions, seed: int) -> dict[str, dict]:
    """PSNR in dB of the others' latents (peak: the one's largest magnitude) and frames (peak: 255), by their names.

    All steps are taken. A rounding difference can make the model generate a different but equally valid clip; a few
    such clips dominate the MSE, so the per-clip median is reported as well. first: the median of the first chunk, which
    has no past that could differ.
    """
    latents, frames = all_steps(one, captions, seed)
    chunks, found = len(captions[0]), {}
    for name, other in others.items():
        latents2, frames2 = all_steps(other, captions, seed)
        found[name] = {
            "latents": psnr_figures((latents2 - latents) ** 2, float(np.abs(latents).max()), chunks),
            "frames": psnr_figures((frames2.astype(np.float32) - frames) ** 2, WHITE, chunks),
        }
    return found


def psnr_figures(squares: np.ndarray, peak: float, chunks: int) -> dict[str, float]:
    """squares [B, T, ...]: of the differences; NaN where there are none."""

    def decibels(part: np.ndarray) -> float:
        mean = float(part.mean(dtype=np.float64))
        return 10 * math.log10(peak**2 / mean) if mean else math.inf

    first = squares[:, : squares.shape[1] // chunks]
    found = {"all": decibels(squares), "median": np.median([decibels(clip) for clip in squares])}
    found["first"] = np.median([decibels(clip) for clip in first])
    return {name: float(value) if math.isfinite(value) else math.nan for name, value in found.items()}


def all_steps(pipe: Pipeline, captions: Captions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, N * F, C, h, w] and frames uint8 [B, T, H, W, 3] of rollouts that never stop early."""
    estimates: dict[tuple[int, int], np.ndarray] = {}

    def keep(step: Step) -> None:  # the last step's stays
        estimates.update(((row, step.chunk), x0.float().cpu().numpy()) for row, x0 in zip(step.rows, step.x0))

    frames = roll_out(pipe, captions, Fixed(pipe.max_steps), seed, on_step=keep, batch=BATCH_CLIPS).frames
    clips = [np.concatenate([estimates[row, i] for i in range(len(clip))]) for row, clip in enumerate(captions)]
    return np.stack(clips), frames
