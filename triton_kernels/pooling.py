"""A frame's normalised tokens as a few vectors: mean and deviation, or softmax-weighted means. Contracts:
`dsa_engine.ops.pooling`.

One launch takes the parts of tiles of tokens, a second one joins them: always in the same order, so the result is the
same every time. Moments are always squares about a mean, so nothing cancels; shares of a softmax are relative to their
tile's largest score until they are joined. `epilogue.py` takes its moments on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

STAGES = tl.constexpr(4)  # blocks of channels on their way at a time
TILE = 16  # tokens: the least that tensor cores take, since only many small tiles fill the GPU


def block(hidden: Tensor) -> int:
    """Channels that a program handles at a time: 256 bytes of a row, or less so that there are at least two blocks,
    since a loop of one is unrolled, and a float32 GEMM then spills."""
    padded = triton.next_power_of_2(hidden.shape[-1])
    return max(16, min(256 // hidden.element_size(), padded // 2))


@triton.jit
def row_statistics(rows, valid, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / deviation of each of some rows (pointers): blocks of channels joined by Chan's formula."""
    mean, squares = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    for start in tl.range(0, C, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)[None, :]
        inside = valid[:, None] & (col < C)
        x = tl.load(rows[:, None] + col, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(C - start, BLOCK).to(tl.float32)
        here = tl.sum(x, axis=1) / count
        centred = tl.where(inside, x - here[:, None], 0.0)
        step, share = here - mean, count / (start + count)
        mean += step * share
        squares += tl.sum(centred * centred, axis=1) + step * step * share * start
    return mean, tl.rsqrt(squares / C + eps)


@triton.jit
def normalised(rows, valid, col, mean, rate, C: tl.constexpr):
    """LayerNorm of a block of channels; zeros in rows that are not valid."""
    x = tl.load(rows[:, None] + col[None, :], mask=valid[:, None] & (col < C)[None, :], other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rate[:, None]


@triton.jit
def store_moments(moments, y, valid, count, col, C: tl.constexpr):
    """Mean and squares about it, over the valid rows of y, to moments [2, C]."""
    mean = tl.sum(tl.where(valid[:, None], y, 0.0), axis=0) / count
    centred = tl.where(valid[:, None], y - mean[None, :], 0.0)
    tl.store(moments + col, mean, mask=col < C)
    tl.store(moments + C + col, tl.sum(centred * centred, axis=0), mask=col < C)


@triton.jit
def moments_kernel(hidden, moments, tokens, eps, C: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of one frame's tokens."""
    tile, frame = tl.program_id(0), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < tokens
    rows = hidden + (frame * tokens + token).to(tl.int64) * C
    mean, rate = row_statistics(rows, valid, eps, C, BLOCK)
    count = tl.minimum(tokens - tile * TILE, TILE).to(tl.float32)
    out = moments + (frame * tl.num_programs(0) + tile).to(tl.int64) * (2 * C)
    for start in tl.range(0, C, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        store_moments(out, normalised(rows, valid, col, mean, rate, C), valid, count, col, C)


@triton.jit
def join_kernel(
    moments,
    time,
    out,
    tokens,
    tiles,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a frame's channels: out [frames, 2 C] = mean, deviation; or [frames, 3 C] with time after them."""
    frame, col = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.arange(0, TILES)
    count = tl.minimum(tl.maximum(tokens - tile * TILE, 0), TILE).to(tl.float32)[:, None]
    inside = (tile < tiles)[:, None] & (col < C)[None, :]
    at = moments + (frame * tiles + tile).to(tl.int64)[:, None] * (2 * C) + col[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    mean = tl.sum(means * count, axis=0) / tokens
    step = means - mean[None, :]
    squares = tl.sum(tl.load(at + C, mask=inside, other=0.0) + count * step * step, axis=0)
    row = out + frame * (2 if time is None else 3) * C + col
    tl.store(row, mean, mask=col < C)
    tl.store(row + C, tl.sqrt(squares / tokens + eps), mask=col < C)
    if time is not None:
        tl.store(row + 2 * C, tl.load(time + frame * C + col, mask=col < C).to(tl.float32), mask=col < C)


def empty_moments(hidden: Tensor, frames: int) -> Tensor:
    """Room for the moments of every tile: [B * F, tiles, 2, C] float32."""
    batch, tokens, channels = hidden.shape
    shape = (batch * frames, triton.cdiv(tokens // frames, TILE), 2, channels)
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


def join(moments: Tensor, time: Tensor | None, frames: int, tokens: int, eps: float) -> Tensor:
    """Moments of tiles of frames of `tokens` each -> mean and deviation, and time [B, F, C] after them where given."""
    count, tiles, _, channels = moments.shape
    padded = triton.next_power_of_2(tiles)
    width = max(16, min(128, 4096 // padded))
    out = moments.new_empty(count // frames, frames, (2 if time is None else 3) * channels)
    join_kernel[(count, triton.cdiv(channels, width))](
        moments, time, out, tokens, tiles, eps, channels, TILE, padded, width
    )
    return out


def pool_frames(hidden: Tensor, frames: int, eps: float) -> Tensor:
    hidden = hidden.contiguous()
    channels, tokens = hidden.shape[2], hidden.shape[1] // frames
    moments = empty_moments(hidden, frames)
    moments_kernel[moments.shape[1::-1]](hidden, moments, tokens, eps, channels, TILE, block(hidden))
    return join(moments, None, frames, tokens, eps)


@triton.jit
def weighted_kernel(
    hidden,
    queries,
    sums,
    scores,
    tokens,
    count,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one frame's tokens: their softmax-weighted sums [count, C] for each query, relative to the tile's
    largest score, which goes to scores [2, count] with the sum of the weights."""
    tile, frame = tl.program_id(0), tl.program_id(1)
    token, query = tile * TILE + tl.arange(0, TILE), tl.arange(0, QUERIES)
    valid, used = token < tokens, query < count
    rows = hidden + (frame * tokens + token).to(tl.int64) * C
    mean, rate = row_statistics(rows, valid, eps, C, BLOCK)
    score = tl.zeros((TILE, QUERIES), tl.float32)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        at = queries + query[None, :] * C + col[:, None]
        q = tl.load(at, mask=used[None, :] & (col < C)[:, None], other=0.0).to(tl.float32)
        score = tl.dot(normalised(rows, valid, col, mean, rate, C), q, score, input_precision="ieee")
    score = tl.where(valid[:, None], score, float("-inf"))
    high = tl.max(score, axis=0)
    weight = tl.exp(score - high[None, :])
    part = (frame * tl.num_programs(0) + tile).to(tl.int64) * count
    tl.store(scores + 2 * part + query, high, mask=used)
    tl.store(scores + 2 * part + count + query, tl.sum(weight, axis=0), mask=used)
    weight = tl.trans(weight)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total = tl.dot(weight, normalised(rows, valid, col, mean, rate, C), input_precision="ieee")
        at = sums + (part + query)[:, None] * C + col[None, :]
        tl.store(at, total, mask=used[:, None] & (col < C)[None, :])


@triton.jit
def join_weighted_kernel(
    sums, scores, out, out_frame, tiles, count, C: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    """One query of one frame, a block of channels: the tiles' sums as one weighted mean."""
    frame, query = tl.program_id(0) // count, tl.program_id(0) % count
    col, tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILES)
    part = (frame * tiles + tile).to(tl.int64) * count
    high = tl.load(scores + 2 * part + query, mask=tile < tiles, other=float("-inf"))
    share = tl.exp(high - tl.max(high, axis=0))
    whole = tl.sum(share * tl.load(scores + 2 * part + count + query, mask=tile < tiles, other=0.0), axis=0)
    inside = (tile < tiles)[:, None] & (col < C)[None, :]
    total = tl.sum(
        tl.load(sums + (part + query)[:, None] * C + col[None, :], mask=inside, other=0.0) * share[:, None], 0
    )
    tl.store(out + frame.to(tl.int64) * out_frame + query * C + col, total / whole, mask=col < C)


def attention_pool(hidden: Sequence[Tensor], queries: Tensor, frames: int, eps: float) -> Tensor:
    batch, tokens, channels = hidden[0].shape
    count, tiles = queries.shape[1], triton.cdiv(tokens // frames, TILE)
    sums = queries.new_empty(batch * frames, tiles, count, channels, dtype=torch.float32)
    scores = sums.new_empty(batch * frames, tiles, 2, count)
    out = sums.new_empty(batch, frames, len(hidden), count, channels)
    padded = triton.next_power_of_2(tiles)
    width = max(16, min(128, 4096 // padded))
    for block_index, (h, q) in enumerate(zip(hidden, queries)):
        weighted_kernel[(tiles, batch * frames)](
            h.contiguous(),
            q.contiguous(),
            sums,
            scores,
            tokens // frames,
            count,
            eps,
            channels,
            TILE,
            max(16, triton.next_power_of_2(count)),
            block(h),
        )
        join_weighted_kernel[(batch * frames * count, triton.cdiv(channels, width))](
            sums, scores, out[:, :, block_index], out.stride(1), tiles, count, channels, padded, width
        )
    return out
