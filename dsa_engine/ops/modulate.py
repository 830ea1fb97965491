"""Adaptive LayerNorm, the gated residual, and the activation of the feed-forward.

shift, scale and gate are one vector a frame, [B, F, C] with T = F * S, or [1, 1, C] for all (a plain LayerNorm's bias
and its weight minus one); they are float32 or x's dtype. Everything is float32 inside.
"""

from __future__ import annotations

from torch import Tensor

from dsa_engine.kernel_types import RowwiseFP8
from dsa_engine.ops.dispatch import resolve
from dsa_engine.ops.support import E4M3


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False) -> Tensor | RowwiseFP8:
    """LayerNorm(x) * (1 + scale) + shift, no affine. x [B, T, C] -> [B, T, C] in x's dtype; fp8: as `RowwiseFP8`."""
    _check("modulate", x, shift, scale)
    return resolve("modulate", x, stored=E4M3 if fp8 else None)(x, shift, scale, eps, fp8)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y. x, y [B, T, C]."""
    _check("gate_residual", x, gate, like=y)
    return resolve("gate_residual", x)(x, y, gate)


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor | RowwiseFP8]:
    """The end of one sub-layer and the norm of the next, in one pass: r = x + gate * y, and modulate(r, shift, scale).

    gate None is 1. Returns r [B, T, C] in x's dtype and the modulated norm of the r that was returned (rounded), in x's
    dtype; fp8: that one as `RowwiseFP8`.
    """
    _check("residual_modulate", x, shift, scale, *([] if gate is None else [gate]), like=y)
    return resolve("residual_modulate", x, stored=E4M3 if fp8 else None)(x, y, gate, shift, scale, eps, fp8)


def gelu_bias(x: Tensor, bias: Tensor, fp8: bool = False) -> Tensor | RowwiseFP8:
    """gelu(x + bias) with the tanh approximation, as in Wan. x [..., C], bias [C] -> x's shape and dtype; fp8: as
    `RowwiseFP8`."""
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"gelu_bias: bias {list(bias.shape)} must be [{x.shape[-1]}], the last dim of x")
    return resolve("gelu_bias", x, stored=E4M3 if fp8 else None)(x, bias, fp8)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias) with the tanh approximation, in the product's own epilogue where torch's library has one.

    x [..., K], weight [N, K], bias [N], all of one dtype -> [..., N].
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
