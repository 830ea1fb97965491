"""What ops and kernels pass to each other besides plain tensors: FP8 formats, and the two ends of a denoising step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowwiseFP8(NamedTuple):
    """Input or weight of a product, one scale a row: value = scale * values.

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
    """The DiT's last layer: LayerNorm, modulation and product. shift, scale [B, F, C]; weight [P, C], bias [P], where
    P = p * p * c holds a patch of p x p latent pixels with c channels each, channels innermost."""

    shift: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor


class HeadWeights(NamedTuple):
    """The confidence head's MLP, 3 C -> M with SiLU -> 1: weight1 [M, 3 C], bias1 [M], weight2 [1, M], bias2 [1]."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


class StopRule(NamedTuple):
    """When a row is done: step >= most, or step >= least and the reduced confidence of its frames >= threshold.

    All [B] on the device: step, least, most int32, step counting the one that ends now; reduce int32, an index of
    `REDUCE`; threshold float32.
    """

    step: Tensor
    least: Tensor
    most: Tensor
    reduce: Tensor
    threshold: Tensor


class Epilogue(NamedTuple):
    """x0 [B, F, c, H, W], the estimate of the clean chunk; x, the same re-noised to the next level, made for every row,
    also for those that stop; state [B, F + 1] float32: the frames' confidences (NaN without a head), then 1 to stop or
    0 to go on."""

    x0: Tensor
    x: Tensor
    state: Tensor
