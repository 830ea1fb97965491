"""Fits a confidence head to a frozen student: self-refinement, no labels, minutes on a CPU.

What is reliable? An estimate that further steps would not change. With x_k the estimate of a frame after k of S steps
and d_k = mean((x_k - x_S)^2), the head learns

    confidence = sigmoid(log(TOLERANCE / d_k) / SOFTNESS)

so 0.5 means: about TOLERANCE away from where the remaining steps would take it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.policy import Fixed
from dsa_engine.synthetic import Caption
from dsa_engine.training.evaluate import roll

TOLERANCE = 0.1  # of latents whose variance is 1
SOFTNESS = 1.0


def refinement(estimates: Tensor) -> Tensor:
    """d_k for k < S: estimates [S, B, F, C, H, W] -> [S - 1, B, F]."""
    return (estimates[:-1] - estimates[-1]).square().mean(dim=(3, 4, 5))


def target(distance: Tensor) -> Tensor:
    """The confidence that a distance deserves, in (0, 1)."""
    return (torch.log(TOLERANCE / distance.clamp_min(1e-8)) / SOFTNESS).sigmoid()


class Recorder:
    """Stands in for the head during a rollout, and keeps what the head would have read."""

    def __init__(self, head: ConfidenceHead):
        self.head, self.features = head, []

    def __call__(self, hidden: Tensor, time: Tensor) -> Tensor:
        self.features.append(self.head.features(hidden, time))
        return hidden.new_zeros(time.shape[:2])


def collect(pipe: Pipeline, captions: Sequence[Sequence[Caption]], seed: int) -> tuple[Tensor, Tensor]:
    """Features [n, 3 dim] and distances [n] of every frame after every step but the last, on full rollouts."""
    steps, estimates = pipe.max_steps, []
    head, recorder = pipe.engine.head, Recorder(pipe.engine.head)

    def keep(step: Step) -> None:
        estimates.append(step.x0)

    pipe.engine.head = recorder
    try:
        roll(pipe, captions, Fixed(steps), seed, on_step=keep)
    finally:
        pipe.engine.head = head
    by_chunk = torch.stack(estimates).unflatten(0, (-1, steps))
    distance = torch.stack([refinement(chunk) for chunk in by_chunk])  # [chunks, S - 1, B, F]
    features = torch.stack(recorder.features).unflatten(0, (-1, steps))[:, :-1]
    return features.flatten(0, 3).clone(), distance.flatten().clone()


def fit_head(pipe: Pipeline, captions: Sequence[Sequence[Caption]], seed: int = 0, iterations: int = 600) -> float:
    """Train the pipeline's head in place on rollouts of these captions; returns the last training loss.

    Binary cross-entropy against the soft target, Adam with a falling rate, random batches of 1024 frames.
    """
    features, distance = collect(pipe, captions, seed)
    wanted = target(distance)
    generator = torch.Generator().manual_seed(seed)
    mlp = pipe.engine.head.mlp.requires_grad_(True)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        rows = torch.randint(len(features), (1024,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(mlp(features[rows]).squeeze(-1), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mlp.requires_grad_(False)
    return loss.item()
