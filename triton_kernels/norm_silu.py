"""Bias, RMSNorm over the channels and SiLU, or bias and residual, each in one pass over channels-last memory.

Everything is float32 between the loads and the stores. Contracts: `dsa_engine.ops.norm_silu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LEAST_NORM = tl.constexpr(1e-12)
# Numbers of a block at four warps: four accesses of 16 bytes of bfloat16 a thread, on their way at once.
BLOCK, WARPS = 4096, 4


@triton.jit
def tile(rows, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(offsets, which of them are there) of ROWS pixels, all their channels."""
    # A frame of 480 x 832 with 192 channels is 77 M elements: several clips in a batch exceed 2^31.
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return row[:, None] * C + col[None, :], (row < rows)[:, None] & (col < C)[None, :]


@triton.jit
def load_vector(v, C: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.arange(0, WIDTH)
    return tl.load(v + col, mask=col < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_silu_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    x_b,
    out_b,
    root,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """ROWS pixels of one row of the batch. root: of C."""
    at, inside = tile(rows, C, WIDTH, ROWS)
    b = tl.program_id(1).to(tl.int64)
    y = tl.load(x + b * x_b + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += load_vector(bias, C, WIDTH)  # zeros in the padding too
    norm = tl.sqrt(tl.sum(y * y, axis=1))
    z = y * (root / tl.maximum(norm, LEAST_NORM))[:, None] * load_vector(weight, C, WIDTH)
    if SILU:
        z = z / (1 + tl.exp2(-LOG2E * z))  # far below 0 the power is infinite, and the quotient 0
    tl.store(out + b * out_b + at, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def bias_residual_kernel(x, y, bias, out, rows, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    at, inside = tile(rows, C, WIDTH, ROWS)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (a + (b + load_vector(bias, C, WIDTH))).to(out.dtype.element_ty), mask=inside)


def norm_silu(
    x: Tensor, weight: Tensor, silu: bool = True, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    source, target = x if _dense(x) else x.contiguous(), out
    if not _dense(target):
        raise ValueError(
            f"norm_silu: out {list(out.shape)} with strides {list(out.stride())} must be contiguous within each row of "
            "the batch; give a part of a channels-last tensor along its time, or none"
        )
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    batch, channels = x.shape[0], x.shape[-1]
    rows = x[0].numel() // channels if x.numel() else 0
    width, count = _block(channels)
    if rows:
        norm_silu_kernel[(triton.cdiv(rows, count), batch)](
            source,
            weight,
            bias,
            target,
            rows,
            source.stride(0),
            target.stride(0),
            channels**0.5,
            channels,
            width,
            count,
            silu,
            num_warps=WARPS,
        )
    return out


def bias_residual(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    x, y, channels = x.contiguous(), y.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // max(1, channels)
    width, count = _block(channels)
    if rows:
        bias_residual_kernel[(triton.cdiv(rows, count),)](
            x, y, bias.contiguous(), out, rows, channels, width, count, num_warps=WARPS
        )
    return out


def _block(channels: int) -> tuple[int, int]:
    """The channels of a block, a power of two, and its pixels. Of 96, 192 and 384 a quarter is padding, which costs
    registers and no memory traffic; two powers of two to a row would need an exchange between threads for its sum."""
    width = triton.next_power_of_2(channels)
    return width, max(1, BLOCK // width)


def _dense(x: Tensor) -> bool:
    """Whether each row of the batch is contiguous."""
    return x[:1].is_contiguous()
