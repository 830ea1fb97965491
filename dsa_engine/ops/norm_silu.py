"""Between two convolutions of the Wan VAE: bias, RMSNorm over the channels, SiLU; and bias with residual.

Channels come last, as in memory (`channels_last_3d`); everything is float32 inside. The biases are those of the
previous convolution, for which cuDNN would need another pass over memory. Wrong shapes raise ValueError.
"""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import resolve


def norm_silu(
    x: Tensor, weight: Tensor, silu: bool = True, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """SiLU(z) with z = (x + bias) * sqrt(C) / max(||x + bias||, 1e-12) * weight, the norm over the last dim.

    Args:
        x: [B, ..., C].
        weight: [C].
        silu: False: return z itself.
        bias: [C] or None.
        out: Written and returned: a tensor like x whose rows of the batch may lie apart, as in a part of longer clips.

    Returns:
        A tensor of x's shape and dtype.
    """
    _check("norm_silu", x, weight, *([] if bias is None else [bias]))
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"norm_silu: out {list(out.shape)} of {out.dtype} must be {list(x.shape)} of {x.dtype}, as x")
    return resolve("norm_silu", x)(x, weight, silu, bias, out)


def bias_residual(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + (y + bias), rounded once.

    Args:
        x: [B, ..., C].
        y: Like x.
        bias: [C].
    """
    _check("bias_residual", x, bias)
    if x.shape != y.shape:
        raise ValueError(f"bias_residual: x {list(x.shape)} and y {list(y.shape)} must be alike")
    return resolve("bias_residual", x)(x, y, bias)


def _check(op: str, x: Tensor, *vectors: Tensor) -> None:
    wrong = [list(v.shape) for v in vectors if v.shape != x.shape[-1:]]
    if x.ndim < 2 or wrong:
        given = f" and a vector {wrong[0]}" if wrong else ""
        raise ValueError(f"{op}: x {list(x.shape)}{given} must be [B, ..., C] and [C]")
