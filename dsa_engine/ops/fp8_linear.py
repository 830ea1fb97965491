"""FP8 (e4m3) GEMM: one scale per token of the input, one per output channel of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine.kernel_types import RowwiseFP8
from dsa_engine.ops.dispatch import resolve
from dsa_engine.ops.support import E4M3


def quantize(x: Tensor) -> RowwiseFP8:
    """Row-wise FP8: scale = max|row| / 448 (1 where that is 0), values = x / scale rounded to nearest even.

    Args:
        x: [..., C].
    """
    return resolve("quantize", x, stored=E4M3)(x)


def fp8_linear(x: Tensor | RowwiseFP8, weight: RowwiseFP8, bias: Tensor | None = None, dtype=torch.bfloat16) -> Tensor:
    """x weight^T + bias with e4m3 operands and float32 accumulation.

    Args:
        x: [..., K], or already quantized (`modulate`, `residual_modulate`, `gelu_bias` with fp8=True).
        weight: [N, K], one scale per output channel.
        bias: [N].
        dtype: Of the result.

    Returns:
        [..., N] in `dtype`.

    Raises:
        ValueError: Shapes disagree.
    """
    x = x if isinstance(x, RowwiseFP8) else quantize(x)
    if weight.values.ndim != 2 or x.values.shape[-1] != weight.values.shape[1]:
        raise ValueError(
            f"fp8_linear: x {list(x.values.shape)} and weight {list(weight.values.shape)} must be [..., K] and [N, K]"
        )
    return resolve("fp8_linear", x.values)(x, weight, bias, dtype)
