"""RMSNorm of queries and keys, rotary embedding, and the append to the KV cache."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops.attention import check_scales
from dsa_engine.ops.dispatch import resolve


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32. x [..., C], weight [C]."""
    return resolve("rms_norm", x)(x, weight, eps)


def norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width (before the head split, as Wan does), then RoPE of each neighbouring pair.

    q, k: [B, T, C]; weight_q, weight_k: [C]; cos, sin: [B, T, D/2] float32 (`models.rope.rope_table`).
    Returns q, k: [B, T, H, D] in their dtype, H = C / D.
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
    """`norm_rope`, and K and V written to frames `write` of each row's cache slot; returns the rotated queries.

    q, k, v: [B, T, C] with T = F * S, their last dim contiguous (views of one [B, T, 3 C] product are welcome);
    k_cache, v_cache: [N, W, S, H, D] of one layer, written in place; slot [B] and write [B, F]: integers on the device.
    scales: with an e4m3 cache (`CacheScales`): it holds key / k and value / v, clamped to +-448, rounded to
    nearest even. Returns [B, T, H, D].
    """
    if q.shape != k.shape or q.shape != v.shape or q.shape[1] != write.shape[1] * k_cache.shape[2]:
        raise ValueError(
            f"norm_rope_append: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must be [B, F * S, C] alike, "
            f"with F = {write.shape[1]} frames of S = {k_cache.shape[2]} tokens"
        )
    check_scales("norm_rope_append", k_cache, scales)
    return resolve("norm_rope_append", q, k_cache.shape[-1], k_cache.dtype)(
        q, k, v, weight_q, weight_k, cos, sin, eps, k_cache, v_cache, slot, write, scales
    )
