"""Distribution matching distillation: the gradient that moves a few-step student's samples towards the teacher's.

Sources: DMD2 (arXiv 2405.14867) and Self-Forcing (arXiv 2506.08009, `model/dmd.py`). Pure functions over tensors.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def weight_motion(gradient: Tensor, weight: float) -> Tensor:
    """g + weight * D'D g, with D the difference of successive frames: [R, F, C, H, W] -> the same.

    What the frames of a chunk do to one another, their motion, is a small part of g. I + weight D'D is positive
    definite, so the direction still leads downhill and vanishes only where g does; a shift common to all frames is left
    as it is.
    """
    if not weight or gradient.shape[1] < 2:
        return gradient
    difference = gradient.diff(dim=1)
    edge = torch.zeros_like(gradient[:, :1])
    return gradient - weight * torch.cat((edge, difference, edge), dim=1).diff(dim=1)


def score_difference(real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """Per frame mean((fake_x0 - real_x0)^2): how far the student is from the teacher. [R, F, C, H, W] -> [R, F].

    With the student's own estimate for fake_x0 it is the square of the distance that the paper's head learns from.
    Unlike `dmd_loss` it is not divided by |x0 - real_x0|, which is large just where a sample is bad and would hide it.
    """
    return (fake_x0 - real_x0).square().mean(dim=(2, 3, 4)).detach()


class LevelNorm(nn.Module):
    """Divides losses by their running mean at the same noise level: a bad frame stands out, not a noisy one.

    mean [levels] (a buffer, saved with a checkpoint) holds the means of equal parts of (0, 1], the same in all
    processes.
    """

    mean: Tensor

    def __init__(self, levels: int = 8, decay: float = 0.98):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(levels))

    @torch.no_grad()
    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """loss [R, F], sigma [R] in (0, 1] -> loss / running mean of its level, [R, F]."""
        level = (sigma * len(self.mean)).long().clamp(max=len(self.mean) - 1)
        sums = loss.new_zeros(2, len(self.mean))  # of losses, of rows
        sums[0].index_add_(0, level, loss.mean(dim=1))
        sums[1].index_add_(0, level, torch.ones_like(sigma))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        mean = sums[0] / sums[1].clamp_min(1)
        decay = torch.where(self.mean > 0, self.decay, 0.0)  # the first loss of a level is its first mean
        self.mean.copy_(torch.where(sums[1] > 0, decay * self.mean + (1 - decay) * mean, self.mean))
        return loss / self.mean[level, None].clamp_min(1e-12)
