"""Block-causal attention over a cache of past frames, and attention to the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops.dispatch import resolve


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, keys: Tensor, scales: CacheScales | None = None
) -> Tensor:
    """softmax(q K^T / sqrt(D)) V over some frames of each row's cache slot.

    The chunk's own keys and values are already in the cache (`norm_rope_append`), so attending to the valid past and
    the whole chunk is block-causal. Keys are stored rotated and softmax is order-independent, so a frame's position in
    the ring does not matter.

    Args:
        q: Queries [B, T, H, D].
        k_cache: Keys of one layer [N, W, S, H, D].
        v_cache: Values, like k_cache.
        slot: Cache slot of each row [B], integers on the device; rows may share one.
        keys: [B, R, 2] integers on the device: R runs of frames [start, stop) per row, which may be empty and must not
            overlap. Frames outside are never used and may be NaN.
        scales: Scales of an e4m3 cache; None for any other dtype.

    Returns:
        [B, T, H, D] in q's dtype, zeros for a row without keys.

    Raises:
        ValueError: Shapes disagree, or scales and cache dtype do not match.
    """
    if q.ndim != 4 or k_cache.ndim != 5 or q.shape[2:] != k_cache.shape[3:]:
        raise ValueError(
            f"attention: q {list(q.shape)} and cache {list(k_cache.shape)} must be [B, T, H, D] and [N, W, S, H, D] "
            "with the same H and D"
        )
    runs = keys.shape[1] if keys.ndim == 3 else 1
    if k_cache.shape != v_cache.shape or slot.shape != q.shape[:1] or keys.shape != (q.shape[0], runs, 2):
        raise ValueError(
            f"attention: caches {list(k_cache.shape)} and {list(v_cache.shape)} must be equal, and slot "
            f"{list(slot.shape)} and keys {list(keys.shape)} must be [{q.shape[0]}] and [{q.shape[0]}, runs, 2], one "
            "for each row of q"
        )
    check_scales("attention", k_cache, scales)
    return resolve("attention", q, q.shape[-1], k_cache.dtype)(q, k_cache, v_cache, slot, keys, scales)


def check_scales(op: str, k_cache: Tensor, scales: CacheScales | None) -> None:
    """Raises ValueError unless scales are given for an e4m3 cache, and only then."""
    if (k_cache.dtype == torch.float8_e4m3fn) != (scales is not None):
        raise ValueError(
            f"{op}: cache of {k_cache.dtype} {'without' if scales is None else 'with'} scales: e4m3 has "
            "them, no other dtype has"
        )


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor | None = None, repeat: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the prompt's keys.

    Wan attends to all `text_len` keys, and those of the zero padding are equal. n equal keys are exactly one key with a
    bias of log(n), so one replaces them all.

    Args:
        q: Queries [B, T, H, D].
        k: Keys of the prompt [B, L, H, D].
        v: Values, like k.
        used: Number of keys of each row [B], integers >= 1 on the device; later keys are never used and may be NaN.
        repeat: How often the last used key counts [B], float32 on the device: its bias is log(repeat), all others' 0.
            `used` and `repeat` None: all keys, once.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: Shapes disagree, or only one of `used` and `repeat` is given.
    """
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or k.shape != v.shape:
        raise ValueError(
            f"cross_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must agree in B, H and D"
        )
    if (used is None) != (repeat is None) or (used is not None and not used.shape == repeat.shape == q.shape[:1]):
        raise ValueError(
            f"cross_attention: used and repeat must both be [{q.shape[0]}], one for each row, or both None"
        )
    return resolve("cross_attention", q, q.shape[-1])(q, k, v, used, repeat)
