"""What follows a forward: the estimate of the clean chunk, and its re-noising to the next level."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import implementation


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x - sigma * v (flow matching: x = (1 - sigma) x0 + sigma noise, v = noise - x0).

    x, velocity [B, F, C, H, W]; sigma [B, F].
    """
    return implementation("velocity_to_x0")(x, velocity, sigma)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise: the input of the next step. x0, noise [B, F, C, H, W]; sigma [B, F]."""
    return implementation("renoise")(x0, noise, sigma)
