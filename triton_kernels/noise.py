"""Normal noise from a counter: Philox4x64-10, then Box and Muller's transform. Formula in `dsa_engine.ops.noise`."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 128  # counter blocks per program, of four words and eight values each


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One round of Philox4x64; the multipliers are its definition's."""
    m0 = tl.full((), 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full((), 0xCA5A826395121157, tl.uint64)
    return tl.umulhi(c2, m1) ^ c1 ^ k0, c2 * m1, tl.umulhi(c0, m0) ^ c3 ^ k1, c0 * m0


@triton.jit
def _pair(word):
    """Two normal values from a word's halves."""
    low = ((word & 0xFFFFFFFF) >> 8).to(tl.int32).to(tl.float32)
    high = (word >> 32).to(tl.uint32).to(tl.float32)
    r = tl.sqrt(-2.0 * tl.log((low + 0.5) * 5.9604644775390625e-08))  # 2^-24
    angle = high * 1.4629180792671596e-09  # 2 pi / 2^32
    return r * tl.cos(angle), r * tl.sin(angle)


@triton.jit
def _gaussian(seed_ptr, chunk_ptr, step_ptr, out_ptr, count, BLOCKS: tl.constexpr):
    row, block = tl.program_id(1), tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    c0 = (block + 1).to(tl.uint64)
    c1 = tl.zeros_like(c0)
    c2 = c1 + tl.load(step_ptr + row).to(tl.uint64)
    c3 = c1 + tl.load(chunk_ptr + row).to(tl.uint64)
    k0 = tl.load(seed_ptr + row).to(tl.uint64)
    k1 = tl.zeros_like(k0)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        k1 += tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    a0, a1 = _pair(c0)
    b0, b1 = _pair(c1)
    d0, d1 = _pair(c2)
    e0, e1 = _pair(c3)
    # word j of block b makes values 8 b + 2 j and the next: interleave so that a thread stores neighbours
    values = tl.join(tl.join(tl.join(a0, d0), tl.join(b0, e0)), tl.join(tl.join(a1, d1), tl.join(b1, e1)))
    values = tl.reshape(values, (BLOCKS * 8,))
    at = tl.program_id(0) * BLOCKS * 8 + tl.arange(0, BLOCKS * 8)
    tl.store(out_ptr + row.to(tl.int64) * count + at, values, mask=at < count)


def gaussian(seed: Tensor, chunk: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = prod(shape)
    out = torch.empty(len(seed), *shape, device=seed.device)
    _gaussian[(triton.cdiv(count, 8 * BLOCKS), len(seed))](seed, chunk, step, out, count, BLOCKS=BLOCKS)
    return out
