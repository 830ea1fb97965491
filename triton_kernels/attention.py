"""FlashAttention in Triton, portable from sm_80 on: self-attention over runs of cache frames, and to the prompt.

One program handles a tile of queries of one head and row and walks over the keys that count, a tile at a time, with
the softmax running along in float32 (arXiv 2307.08691). Where few programs would leave SMs idle the keys
are split among several, whose partial results a second kernel combines. Slots, runs and key counts are read on the
device, so one captured launch serves every position in a video. Contracts: `dsa_engine.ops.attention`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_engine.kernel_types import CacheScales

HEAD_DIMS = (16, 32, 64, 128)


class Tiles(NamedTuple):
    """Queries and keys a step, warps of a block, and how many steps' keys and values are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile_sizes(tokens: int, dim: int, itemsize: int, arch: int) -> Tiles:
    """By queries a row, head dim, bytes of a query's number and architecture (sm_90 is 90)."""
    if itemsize == 4:  # float32 sums on the ordinary units, from registers: tiles that they hold
        return Tiles(32, 32 if dim < 128 else 16, 4, 1)
    if tokens <= 64 or dim < 128:  # 64 rows are the least of Hopper's matrix instruction
        return Tiles(64, 64, 4, 2)
    # 128 queries a tile: every key that comes from L2 serves that many, which L2's bandwidth demands. Three sets of
    # keys and values beside the queries: 224 KB of Hopper's 227. The big Blackwells have as much, but there Triton adds
    # the barriers of tensor memory, a few KB too many: 137 KB with half the keys. 128 KB of the A100's 163.
    if arch // 10 == 9:
        return Tiles(128, 128, 8, 3)
    return Tiles(128, 64, 8, 3) if arch in (80, 87) or arch // 10 in (10, 11) else Tiles(128, 32, 8, 2)  # 64 of 99 KB


def split_count(programs: int, steps: int, output_bytes: int, sms: int) -> int:
    """Into how many parts to split the keys.

    programs: tiles of queries over all heads and rows; steps: tiles of keys at most; output_bytes: of the output in
    float32. In units of one step, about 2 us: a program costs its steps and one more for its start and end, programs
    run in waves of one per SM, the second kernel costs a step to start, and each part is written and read
    again at about 3 MB a step. For Wan at 480p, 444 programs on 132 SMs, that gives 2: 7 waves of half the
    length instead of 4, the last of which is a third full.
    """

    def cost(parts: int) -> float:
        waves = math.ceil(programs * parts / sms)
        combining = 0.0 if parts == 1 else 1 + parts * output_bytes / 3e6
        return waves * (math.ceil(steps / parts) + 1) + combining

    return min(range(1, min(8, max(1, steps)) + 1), key=cost)


@triton.jit
def run_of(keys, used, b, r, R, S, L):
    """First key and number of keys of run r of row b."""
    if keys is not None:
        start = tl.load(keys + (b * R + r) * 2).to(tl.int32)
        return start * S, tl.maximum(tl.load(keys + (b * R + r) * 2 + 1).to(tl.int32) - start, 0) * S
    elif used is not None:
        return 0, tl.load(used + b).to(tl.int32)
    else:
        return 0, L


@triton.jit
def whole_tiles(count, repeat, KEYS: tl.constexpr):
    """How many tiles of a run need no mask; where the last key has a bias, the last tile does."""
    if repeat is None:
        return count // KEYS
    else:
        return tl.maximum(count - 1, 0) // KEYS


@triton.jit
def fold(q, k, v, scale, left, bias, top, total, acc, PRECISION: tl.constexpr):
    """Takes a tile of keys and values [keys, D] into the running softmax: its maximum (an exponent of two), its sum and
    the unnormalised output. scale [queries]: of the scores; left: only so many keys exist, and the last of them has
    `bias`, if there is one; None: all exist."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if left is not None:
        order = tl.arange(0, k.shape[0])[None, :]
        if bias is not None:
            scores = tl.where(order == left - 1, scores + (bias / scale)[:, None], scores)
        scores = tl.where(order < left, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale[:, None] - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out,
    peaks,
    totals,
    slot,
    keys,
    used,
    repeat,
    k_scale,
    v_scale,
    scale,
    q_b,
    q_t,
    q_h,
    k_n,
    k_h,
    T,
    R,
    S,
    L,
    H: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles of queries, B * H, SPLITS). SPLITS = 1 writes out [B, T, H, D]; else out is [SPLITS, B, T, H, D]
    float32, unnormalised, and each part's running maxima and sums go to peaks and totals [SPLITS, B, T, H]."""
    b, h, split = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    n = b.to(tl.int64)
    if slot is not None:
        n = tl.load(slot + b).to(tl.int64)
    bias = None
    if repeat is not None:
        bias = tl.log2(tl.load(repeat + b))

    t, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None], tl.arange(0, D)[None, :]
    queries = tl.load(q + b.to(tl.int64) * q_b + h * q_h + t * q_t + d, mask=t < T, other=0.0)
    scale = tl.full([QUERIES], 1.0, tl.float32) * scale
    if k_scale is not None:
        scale *= tl.load(k_scale + n * H + h)
        if queries.dtype == tl.bfloat16:
            # e4m3 becomes float16, exactly, in one instruction for two values; to bfloat16 it takes a slow one each.
            size = tl.max(tl.abs(queries.to(tl.float32)), 1)
            size = tl.where(size == 0, 1.0, size)
            queries = (queries.to(tl.float32) / size[:, None]).to(tl.float16)
            scale *= size
    order = tl.arange(0, KEYS)[:, None]
    offset = order * PITCH + d
    k += n * k_n + h * k_h
    v += n * k_n + h * k_h

    # This part's share [first, last) of the row's tiles of keys, counted over its runs.
    first, last = 0, 0
    for r in range(R):
        last += tl.cdiv(run_of(keys, used, b, r, R, S, L)[1], KEYS)
    if SPLITS > 1:
        first, last = split * last // SPLITS, (split + 1) * last // SPLITS

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    done = 0
    for r in range(R):
        start, count = run_of(keys, used, b, r, R, S, L)
        whole = whole_tiles(count, repeat, KEYS)
        for i in range(tl.maximum(first - done, 0), tl.minimum(last - done, whole)):
            at = (start + i * KEYS) * PITCH
            top, total, acc = fold(
                queries,
                tl.load(k + at + offset),
                tl.load(v + at + offset),
                scale,
                None,
                None,
                top,
                total,
                acc,
                PRECISION,
            )
        done += tl.cdiv(count, KEYS)
    # The last tile of each run, where it needs a mask: apart, so that the loop above need not keep what masks take.
    done = 0
    for r in range(R):
        start, count = run_of(keys, used, b, r, R, S, L)
        tiles = tl.cdiv(count, KEYS)
        for i in range(tl.maximum(first - done, whole_tiles(count, repeat, KEYS)), tl.minimum(last - done, tiles)):
            at, left = (start + i * KEYS) * PITCH, count - i * KEYS
            k_tile = tl.load(k + at + offset, mask=order < left, other=0.0)
            v_tile = tl.load(v + at + offset, mask=order < left, other=0.0)
            top, total, acc = fold(queries, k_tile, v_tile, scale, left, bias, top, total, acc, PRECISION)
        done += tiles

    if v_scale is not None:
        acc *= tl.load(v_scale + n * H + h)
    if SPLITS == 1:
        acc *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]  # a row without keys: zeros
    first = (split * tl.num_programs(1) // H + b).to(tl.int64) * T + tl.program_id(0) * QUERIES
    row, rows = tl.arange(0, QUERIES), T - tl.program_id(0) * QUERIES
    at = row[:, None] * (H * D) + d
    tl.store(out + (first * H + h) * D + at, acc.to(out.dtype.element_ty), mask=row[:, None] < rows)
    if SPLITS > 1:
        tl.store(peaks + first * H + h + row * H, top, mask=row < rows)
        tl.store(totals + first * H + h + row * H, total, mask=row < rows)


@triton.jit
def combine_kernel(parts, peaks, totals, out, N, D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """out [N, D] from the parts [SPLITS, N, D] of the keys, and their maxima and sums [SPLITS, N]."""
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(peaks + s * N + row, mask=row < N, other=0.0))
    top = tl.where(top == float("-inf"), 0.0, top)  # no part had keys
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for s in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(peaks + s * N + row, mask=row < N, other=0.0) - top)
        total += weight * tl.load(totals + s * N + row, mask=row < N, other=0.0)
        part = tl.load(parts + (s * N + row)[:, None] * D + d, mask=(row < N)[:, None], other=0.0)
        acc += weight[:, None] * part
    acc *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    tl.store(out + row[:, None] * D + d, acc.to(out.dtype.element_ty), mask=(row < N)[:, None])


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, keys: Tensor, scales: CacheScales | None = None
) -> Tensor:
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"attention: caches with strides {k_cache.stride()} and {v_cache.stride()} must be contiguous")
    k, v = k_cache.flatten(1, 2), v_cache.flatten(1, 2)
    return attend(q, k, v, slot=slot, keys=keys, scales=scales, frame=k_cache.shape[2])


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor | None = None, repeat: Tensor | None = None
) -> Tensor:
    return attend(q, k, v, used=used, repeat=repeat)


def attend(
    q: Tensor, k: Tensor, v: Tensor, slot=None, keys=None, used=None, repeat=None, scales=None, frame=1, splits=None
) -> Tensor:
    """Both ops: q [B, T, H, D] over k, v [N, L, H, D], of which row b has slot[b] (or b): the runs keys[b] of `frame`
    keys each, or the first used[b], or all. splits: into how many parts the keys go; None: as `split_count` has it."""
    batch, tokens, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        nearest = min(HEAD_DIMS, key=lambda d: abs(d - dim))
        raise ValueError(f"attention: head dim {dim} must be one of {HEAD_DIMS}; nearest is {nearest}")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or k.stride() != v.stride():
        raise ValueError(
            f"attention: strides {q.stride()}, {k.stride()}, {v.stride()} of q, k, v: the last must be 1, k's and v's "
            "alike"
        )
    small = (slot, keys, used, repeat, *(scales or ())[:2])
    if any(x is not None and not x.is_contiguous() for x in small):
        raise ValueError("attention: slot, keys, used, repeat and scales must be contiguous")
    if k.shape[1] * k.stride(1) >= 2**31:
        raise ValueError(
            f"attention: {k.shape[1]} keys of {k.stride(1)} elements: a slot must hold less than 2**31, "
            f"nearest is {(2**31 - 1) // k.stride(1)} keys"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out
    tiles = tile_sizes(tokens, dim, q.element_size(), architecture())
    grid = (triton.cdiv(tokens, tiles.queries), batch * heads)
    if splits is None:
        steps = triton.cdiv(k.shape[1], tiles.keys)
        splits = split_count(grid[0] * grid[1], steps, 4 * q.numel(), sm_count(q.device))
    parts, (peaks, totals) = out, (None, None)
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        peaks, totals = torch.empty(2, splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    attention_kernel[(*grid, splits)](
        q,
        k,
        v,
        parts,
        peaks,
        totals,
        slot,
        keys,
        used,
        repeat,
        *(scales or (None, None))[:2],
        dim**-0.5 * math.log2(math.e),
        *q.stride()[:3],
        k.stride(0),
        k.stride(2),
        tokens,
        1 if keys is None else keys.shape[1],
        frame,
        k.shape[1],
        heads,
        dim,
        k.stride(1),
        *tiles[:2],
        splits,
        "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        rows = batch * tokens * heads
        combine_kernel[(triton.cdiv(rows, 16),)](parts, peaks, totals, out, rows, dim, 16, splits, num_warps=4)
    return out


def architecture() -> int:
    """sm_90 is 90. The interpreter has none and takes sm_80's tiles."""
    return 80 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def sm_count(device: torch.device) -> int:
    """Of the device; one where there is none, which never splits the keys."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
