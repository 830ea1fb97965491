"""RMSNorm of queries and keys, rotary embedding, and the append to the KV cache."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops.attention import check_scales
from dsa_engine.ops.dispatch import resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32.

    Args:
        x: [..., C].
        weight: [C].
        eps: Added to the mean square.
    """
    return resolve("rms_norm", x)(x, weight, eps)


def norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width (before the head split, as in Wan), then RoPE of each neighbouring pair.

    Args:
        q: Queries [B, T, C].
        k: Keys, like q.
        weight_q: [C].
        weight_k: [C].
        cos: [B, T, D/2] float32 (`models.rope.rope_table`).
        sin: Like cos.
        eps: Of the norm.

    Returns:
        q and k as [B, T, H, D] in their dtype, H = C / D.
    """
    return resolve("norm_rope", q, 2 * cos.shape[-1])(q, k, weight_q, weight_k, cos, sin, eps)


def norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    write: Tensor,
    scales: CacheScales | None = None,
) -> Tensor:
    """`norm_rope`, and K and V written to frames `write` of each row's cache slot.

    Args:
        q: [B, T, C], T = F * S, last dim contiguous; views of one [B, T, 3 C] are fine.
        k: Like q.
        v: Like q.
        weight_q: [C].
        weight_k: [C].
        cos: [B, T, D/2] float32.
        sin: Like cos.
        eps: Of the norm.
        k_cache: Keys of one layer [N, W, S, H, D], written in place.
        v_cache: Values, like k_cache.
        slot: Cache slot of each row [B], integers on the device.
        write: Frames to write [B, F], integers on the device.
        scales: Scales of an e4m3 cache, which stores key / k and value / v, clamped to +-448, rounded to nearest even;
            None for any other dtype.

    Returns:
        The rotated queries [B, T, H, D].

    Raises:
        ValueError: Shapes disagree, or scales and cache dtype do not match.
    """
    if q.shape != k.shape or q.shape != v.shape or q.shape[1] != write.shape[1] * k_cache.shape[2]:
        raise ValueError(
            f"norm_rope_append: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must all be [B, F * S, C], "
            f"with F = {write.shape[1]} frames of S = {k_cache.shape[2]} tokens"
        )
    check_scales("norm_rope_append", k_cache, scales)
    return resolve("norm_rope_append", q, k_cache.shape[-1], k_cache.dtype)(
        q, k, v, weight_q, weight_k, cos, sin, eps, k_cache, v_cache, slot, write, scales
    )
