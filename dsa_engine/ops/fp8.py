"""The two ways a tensor is held in FP8 (e4m3: 3 bits of mantissa, up to +-448)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rowwise(NamedTuple):
    """Input or weight of a product, one scale a row: value = scale * values.

    values [..., C] e4m3; scale [..., 1] float32.
    """

    values: Tensor
    scale: Tensor


class CacheScales(NamedTuple):
    """What the numbers of an FP8 KV cache stand for: key = k * stored + shift, value = v * stored.

    k, v: [N, H] float32, one scale a slot and head; shift: [N, H, D] float32, a vector that is taken from every key of
    a head before it is stored ("smoothed K"). It adds the same to all scores of a query, so softmax cancels it and
    attention never reads it. Source: SageAttention (arXiv 2410.02367), section 4.2.
    """

    k: Tensor
    v: Tensor
    shift: Tensor
