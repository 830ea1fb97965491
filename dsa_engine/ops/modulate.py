"""Adaptive LayerNorm and the gated residual, with one modulation per frame."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import implementation


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, no affine, in float32. x [B, T, C]; shift, scale [B, F, C], T = F * S."""
    return implementation("modulate")(x, shift, scale, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in float32. x, y [B, T, C]; gate [B, F, C], T = F * S."""
    return implementation("gate_residual")(x, y, gate)
