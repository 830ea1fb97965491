"""Adaptive LayerNorm and the gated residual, with one modulation per frame."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import implementation


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, no affine, in float32. x [B, T, C]; shift, scale [B, F, C], T = F * S."""
    _check("modulate", x, shift, scale)
    return implementation("modulate")(x, shift, scale, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y in float32. x, y [B, T, C]; gate [B, F, C], T = F * S."""
    _check("gate_residual", x, gate)
    if x.shape != y.shape:
        raise ValueError(f"gate_residual: x {list(x.shape)} and y {list(y.shape)} must be alike")
    return implementation("gate_residual")(x, y, gate)


def _check(op: str, x: Tensor, *per_frame: Tensor) -> None:
    for m in per_frame:
        if m.ndim != 3 or (m.shape[0], m.shape[2]) != (x.shape[0], x.shape[2]) or x.shape[1] % m.shape[1]:
            raise ValueError(
                f"{op}: x {list(x.shape)} and modulation {list(m.shape)} must be [B, F * S, C] and [B, F, C]"
            )
