"""What ops and kernels pass to each other besides plain tensors: FP8 formats, and the two ends of a denoising step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowwiseFP8(NamedTuple):
    """Input or weight of a GEMM with one scale per row: value = scale * values.

    values [..., C] e4m3; scale [..., 1] float32.
    """

    values: Tensor
    scale: Tensor


class CacheScales(NamedTuple):
    """Scales of an FP8 KV cache, [N, H] float32, one per slot and head: key = k * stored, value = v * stored."""

    k: Tensor
    v: Tensor


REDUCE = ("min", "mean", "max")  # `StopRule.reduce` holds the index


class FinalLayer(NamedTuple):
    """The DiT's last layer: LayerNorm, modulation and a linear layer. Its P = p * p * c outputs per token are a patch
    of p x p latent pixels with c channels each, channels innermost."""

    shift: Tensor  # [B, F, C]
    scale: Tensor  # [B, F, C]
    weight: Tensor  # [P, C]
    bias: Tensor  # [P]


class HeadWeights(NamedTuple):
    """The confidence head's MLP: linear 3 C -> M, SiLU, linear M -> 1."""

    weight1: Tensor  # [M, 3 C]
    bias1: Tensor  # [M]
    weight2: Tensor  # [1, M]
    bias2: Tensor  # [1]


class StopRule(NamedTuple):
    """When a row stops: step >= max_steps, or step >= min_steps and its frames' reduced confidence >= threshold.

    All [B] on the device, int32 but for the threshold.
    """

    step: Tensor  # steps taken, the current one included
    min_steps: Tensor
    max_steps: Tensor
    reduce: Tensor  # index of `REDUCE`
    threshold: Tensor  # float32


class Epilogue(NamedTuple):
    """The end of a denoising step, `ops.epilogue`."""

    x0: Tensor  # [B, F, c, H, W], the estimate of the clean chunk
    x: Tensor  # x0 re-noised to the next level, for every row, also those that stop
    state: Tensor  # [B, F + 1] float32: confidence of each frame (NaN without a head), then 1 to stop or 0 to go on
