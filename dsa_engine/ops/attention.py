"""Block-causal attention over a cache of past frames, and attention to the prompt."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import implementation


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, length: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(D)) V over the first `length` frames of each row's cache slot.

    The chunk's own keys and values are in the cache already (`norm_rope_append`), so every query of the chunk sees the
    valid past and the whole chunk: block-causal. Keys are stored rotated and softmax does not care about their order,
    so it does not matter where in the ring a frame lies. Frames at `length` and beyond are never used; they may be NaN.

    q: [B, T, H, D]; k_cache, v_cache: [N, W, S, H, D] of one layer; slot, length: [B] integers on the device.
    Returns [B, T, H, D] in q's dtype.
    """
    if q.ndim != 4 or k_cache.ndim != 5 or q.shape[2:] != k_cache.shape[3:]:
        raise ValueError(
            f"attention: q {list(q.shape)} and cache {list(k_cache.shape)} must be [B, T, H, D] and [N, W, S, H, D] "
            "with the same H and D"
        )
    if k_cache.shape != v_cache.shape or slot.shape != q.shape[:1] or length.shape != q.shape[:1]:
        raise ValueError(
            f"attention: caches {list(k_cache.shape)} and {list(v_cache.shape)} must be alike, and slot "
            f"{list(slot.shape)} and length {list(length.shape)} must be [{q.shape[0]}], one for each row of q"
        )
    return implementation("attention")(q, k_cache, v_cache, slot, length)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the prompt's keys, all of them: q [B, T, H, D], k, v [B, L, H, D]."""
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or k.shape != v.shape:
        raise ValueError(
            f"cross_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must agree in B, H and D"
        )
    return implementation("sdpa")(q, k, v)
