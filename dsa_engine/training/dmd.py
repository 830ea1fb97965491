"""Distribution matching distillation: the gradient that moves a few-step student's samples towards the teacher's.

Sources: DMD2 (arXiv 2405.14867) and Self-Forcing (arXiv 2506.08009, `model/dmd.py`). Pure functions over tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALL_BUT_ROWS = (1, 2, 3, 4)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + scale * (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def dmd_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake_x0 - real_x0) / mean|x0 - real_x0|, the mean over each row.

    x0: the student's sample; real_x0, fake_x0: what the teacher's and the critic's denoisers make of it after noise was
    added. All [R, F, C, H, W]. The direction is the difference of the two scores, so it vanishes where the student's
    distribution is the teacher's; the divisor makes all noise levels weigh alike (DMD, equation 8).
    """
    scale = (x0 - real_x0).abs().mean(dim=ALL_BUT_ROWS, keepdim=True).clamp_min(1e-3)
    return ((fake_x0 - real_x0) / scale).detach()


def dmd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Per frame 0.5 * mean((x0 - stop(x0 - g))^2), whose derivative by x0 is g / n. [R, F, C, H, W] -> [R, F]."""
    target = (x0 - gradient).detach()
    return 0.5 * (x0 - target).square().mean(dim=(2, 3, 4))


class LevelNorm:
    """Divides losses by their running mean at the same noise level: a hard frame stands out, not a noisy one."""

    def __init__(self, levels: int = 8, decay: float = 0.98):
        self.mean = torch.ones(levels)
        self.decay = decay

    def __call__(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """loss [R, F], sigma [R] in (0, 1] -> loss / running mean of its level, [R, F]."""
        level = (sigma * len(self.mean)).long().clamp(max=len(self.mean) - 1)
        for i in level.unique().tolist():
            mean = loss[level == i].mean()
            self.mean[i] = self.decay * self.mean[i] + (1 - self.decay) * mean
        return loss / self.mean[level, None]
