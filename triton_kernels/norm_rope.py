"""RMSNorm over all heads, rotation of neighbouring pairs, and the append to the KV cache, in one pass over q, k and v.

One program handles one token: it reads its rows of q, k and v once and writes them once, so the op runs at the speed of
memory. Everything is float32 in between: unlike plain torch nothing is rounded after the norm. Contracts:
`dsa_engine.ops.norm_rope`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_engine.kernel_types import CacheScales

E4M3_MAX = tl.constexpr(448.0)


def warps(width: int) -> int:
    """Warps for a row of `width` (padded) channels: 16 per thread, two 16-byte accesses of bfloat16 in flight for each
    of q, k and v, which with several blocks an SM keeps enough bytes on the way to hide the memory's latency."""
    return max(1, min(8, width // 512))


@triton.jit
def normed(x, weight, eps, C: tl.constexpr):
    """One token's C channels (the rest of the block is zero), normalised over all of them and scaled, in float32."""
    y = x.to(tl.float32)
    return y * tl.rsqrt(tl.sum(y * y) / C + eps) * weight.to(tl.float32)


@triton.jit
def rotated(x, cos, sin):
    """x [H, D], cos and sin [H, D/2]: each neighbouring pair (a, b) turns by its angle."""
    # A thread holds 16 bytes of neighbours, so the pairs part inside its registers; loads of every second element
    # would be two bytes wide.
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (x.shape[0], x.shape[1]))


@triton.jit
def to_e4m3(x):
    return tl.clamp(x, -E4M3_MAX, E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def rms_norm_kernel(x, weight, out, stride, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    y = tl.load(x + row * stride + at, mask=at < C, other=0.0)
    y = normed(y, tl.load(weight + at, mask=at < C, other=0.0), eps, C)
    tl.store(out + row * C + at, y.to(out.dtype.element_ty), mask=at < C)


@triton.jit
def norm_rope_kernel(
    q,
    k,
    v,
    weight_q,
    weight_k,
    cos,
    sin,
    q_out,
    k_out,
    v_out,
    slot,
    write,
    k_scale,
    v_scale,
    eps,
    q_b,
    q_t,
    k_b,
    k_t,
    v_b,
    v_t,
    rope_b,
    rope_t,
    T,
    S,
    F,
    W,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    APPEND: tl.constexpr,
):
    """Token t of row b. APPEND: k_out and v_out are caches [N, W, S, H, D]; else k_out is [B, T, H, D], and v none."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    C: tl.constexpr = H * D
    head, inside = tl.arange(0, HEADS)[:, None], (tl.arange(0, HEADS) < H)[:, None]
    at = head * D + tl.arange(0, D)[None, :]
    # All loads come first: the sums over the row wait for every thread, and no load would start before that.
    x = tl.load(q + b * q_b + t * q_t + at, mask=inside, other=0.0)
    y = tl.load(k + b * k_b + t * k_t + at, mask=inside, other=0.0)
    if APPEND:
        z = tl.load(v + b * v_b + t * v_t + at, mask=inside, other=0.0)
        n = tl.load(slot + b).to(tl.int64)
        row = (n * W + tl.load(write + b * F + t // S)) * S + t % S
    else:
        row = b * T + t
    # Every head reads the token's angles anew: they come from L1 and need no exchange between threads.
    angle = b * rope_b + t * rope_t + tl.arange(0, D // 2)[None, :] + 0 * head
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    weight_x = tl.load(weight_q + at, mask=inside, other=0.0)
    weight_y = tl.load(weight_k + at, mask=inside, other=0.0)

    x = rotated(normed(x, weight_x, eps, C), c, s)
    tl.store(q_out + (b * T + t) * C + at, x.to(q_out.dtype.element_ty), mask=inside)
    y = rotated(normed(y, weight_y, eps, C), c, s)
    if k_scale is not None:
        y = to_e4m3(y / tl.load(k_scale + n * H + head, mask=inside, other=1.0))
        z = to_e4m3(z.to(tl.float32) / tl.load(v_scale + n * H + head, mask=inside, other=1.0))
    tl.store(k_out + row * C + at, y.to(k_out.dtype.element_ty), mask=inside)
    if APPEND:
        tl.store(v_out + row * C + at, z.to(v_out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    channels = x.shape[-1]
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError("rms_norm: x must be contiguous in its last dim, and weight")
    rows = x.reshape(-1, channels)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(channels)
    if rows.shape[0]:
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, rows.stride(0), eps, channels, width, num_warps=warps(width)
        )
    return out


def norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    k_out = k.new_empty(*k.shape[:2], k.shape[2] // (2 * cos.shape[2]), 2 * cos.shape[2])
    return _launch(q, k, None, weight_q, weight_k, cos, sin, eps, k_out, None, None, None, None), k_out


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
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"norm_rope_append: caches with strides {k_cache.stride()} and {v_cache.stride()} must be contiguous"
        )
    return _launch(q, k, v, weight_q, weight_k, cos, sin, eps, k_cache, v_cache, slot, write, scales)


def _launch(q, k, v, weight_q, weight_k, cos, sin, eps, k_out, v_out, slot, write, scales) -> Tensor:
    """Both ops: with v None there is no cache, and k_out is as long as k."""
    batch, tokens, channels = q.shape
    heads, dim = channels // (2 * cos.shape[2]), 2 * cos.shape[2]
    if dim & (dim - 1):
        raise ValueError(f"norm_rope: head dim {dim} must be a power of two; nearest is {nearest_power_of_two(dim)}")
    if any(x is not None and x.stride(-1) != 1 for x in (q, k, v, cos)) or cos.stride() != sin.stride():
        raise ValueError(
            "norm_rope: q, k, v, cos and sin must be contiguous in their last dim, cos and sin have equal strides"
        )
    if any(x is not None and not x.is_contiguous() for x in (weight_q, weight_k, slot, write, *(scales or ()))):
        raise ValueError("norm_rope: weights, slot, write and scales must be contiguous")
    append = v is not None
    q_out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    padded = triton.next_power_of_2(heads)
    if q.numel():
        norm_rope_kernel[(tokens, batch)](
            q,
            k,
            v,
            weight_q,
            weight_k,
            cos,
            sin,
            q_out,
            k_out,
            v_out,
            slot,
            write,
            *(scales or (None, None)),
            eps,
            *q.stride()[:2],
            *k.stride()[:2],
            *(v if append else k).stride()[:2],
            *cos.stride()[:2],
            tokens,
            k_out.shape[2] if append else 1,
            write.shape[1] if append else 1,
            k_out.shape[1],
            heads,
            dim,
            padded,
            append,
            num_warps=warps(padded * dim),
        )
    return q_out


def nearest_power_of_two(n: int) -> int:
    """6 -> 8, 5 -> 4: the larger one of two that are equally near."""
    above = triton.next_power_of_2(n)
    return above if above - n <= n - above // 2 else above // 2
