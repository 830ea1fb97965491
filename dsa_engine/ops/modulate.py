"""Adaptive LayerNorm, the gated residual, and the activation of the feed-forward.

shift, scale and gate have one vector per frame, [B, F, C] with T = F * S, or [1, 1, C] for all (a plain LayerNorm's
bias and its weight minus one), in float32 or x's dtype. Everything is float32 inside. Wrong shapes raise ValueError.
"""

from __future__ import annotations

from torch import Tensor

from dsa_engine.kernel_types import RowwiseFP8
from dsa_engine.ops.dispatch import resolve
from dsa_engine.ops.support import E4M3


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False) -> Tensor | RowwiseFP8:
    """LayerNorm(x) * (1 + scale) + shift, LayerNorm without affine.

    Args:
        x: [B, T, C].
        shift: [B, F, C] or [1, 1, C].
        scale: Like shift.
        eps: Of the LayerNorm.
        fp8: Return row-wise FP8 instead of x's dtype.

    Returns:
        [B, T, C].
    """
    _check("modulate", x, shift, scale)
    return resolve("modulate", x, stored=E4M3 if fp8 else None)(x, shift, scale, eps, fp8)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y.

    Args:
        x: [B, T, C].
        y: Like x.
        gate: [B, F, C] or [1, 1, C].
    """
    _check("gate_residual", x, gate, like=y)
    return resolve("gate_residual", x)(x, y, gate)


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor | RowwiseFP8]:
    """The end of one sub-layer and the norm of the next in one pass: r = x + gate * y, and modulate(r, shift, scale).

    Args:
        x: [B, T, C].
        y: Like x.
        gate: [B, F, C] or [1, 1, C]; None: 1.
        shift: [B, F, C] or [1, 1, C].
        scale: Like shift.
        eps: Of the LayerNorm.
        fp8: Return the norm as row-wise FP8.

    Returns:
        r [B, T, C] in x's dtype, and the modulated norm of that (rounded) r.
    """
    _check("residual_modulate", x, shift, scale, *([] if gate is None else [gate]), like=y)
    return resolve("residual_modulate", x, stored=E4M3 if fp8 else None)(x, y, gate, shift, scale, eps, fp8)


def gelu_bias(x: Tensor, bias: Tensor, fp8: bool = False) -> Tensor | RowwiseFP8:
    """gelu(x + bias) with the tanh approximation, as in Wan.

    Args:
        x: [..., C].
        bias: [C].
        fp8: Return row-wise FP8 instead of x's dtype.
    """
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu_bias: bias {list(bias.shape)} must be [{x.shape[-1]}], the last dim of x")
    return resolve("gelu_bias", x, stored=E4M3 if fp8 else None)(x, bias, fp8)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias) with the tanh approximation, in the GEMM's epilogue where cuBLASLt has one.

    Args:
        x: [..., K].
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype.

    Returns:
        [..., N].
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_gelu: x {list(x.shape)}, weight {list(weight.shape)} and bias {list(bias.shape)} must be "
            "[..., K], [N, K] and [N]"
        )
    return resolve("linear_gelu", x)(x, weight, bias)


def _check(op: str, x: Tensor, *per_frame: Tensor, like: Tensor | None = None) -> None:
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{op}: x {list(x.shape)} and y {list(like.shape)} must be alike")
    for m in per_frame:
        fits = m.ndim == 3 and m.shape[2] == x.shape[2] and m.shape[0] in (1, x.shape[0])
        if not fits or x.shape[1] % m.shape[1]:
            raise ValueError(
                f"{op}: x {list(x.shape)} and modulation {list(m.shape)} must be [B, F * S, C] and [B, F, C]"
            )
