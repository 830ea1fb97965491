"""Row-wise quantization to e4m3, and the GEMM of such rows. Contracts: `dsa_engine.ops.fp8_linear`.

e4m3 exists from compute capability 8.9 on; before that Triton refuses to compile what makes it. How a program keeps a
row in registers stands here for all ops on rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_engine.kernel_types import RowwiseFP8

E4M3_MAX = tl.constexpr(448.0)
LEAST_TOP = tl.constexpr(1.5e-36)  # 448 divided by it is still finite, and 0 * inf would be NaN


def row_split(*rows: Tensor) -> tuple[int, int, int, int]:
    """How a program keeps a row [..., C] in registers: HEAD, TAIL, VECTOR, and its warps.

    HEAD + TAIL are powers of two that hold C channels: 1024 + 512 for 1536, 8192 + 1024 for 8960. One power of two
    would do a third of the work, or nearly all of it, again on padding, and there is little to spare: at full speed of
    memory an SM has 300 cycles for a row of 1536. A warp holds up to 2048, so that most sums need no barrier.
    VECTOR channels side by side belong to a thread, 16 bytes of the widest of `rows`. With more, the threads of a warp
    would read every second 16 bytes of that one, which takes L1 twice as long.
    """
    channels, widest = rows[0].shape[-1], max(x.element_size() for x in rows)
    padded = triton.next_power_of_2(channels)
    head = max(1, padded // 2)
    return head, triton.next_power_of_2(max(1, channels - head)), 16 // widest, max(1, min(16, padded // 2048))


def empty_rowwise(x: Tensor) -> RowwiseFP8:
    """Room for x [..., C] in FP8."""
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return RowwiseFP8(torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), scale)


@triton.jit
def row_parts(HEAD: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr):
    """The channels of both parts of a row, as `row_split` has it."""
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    return tl.max_contiguous(head, VECTOR), tl.max_contiguous(tail, VECTOR)


@triton.jit
def load_row(x, col, C: tl.constexpr):
    return tl.load(x + col, mask=col < C, other=0.0).to(tl.float32)


@triton.jit
def store_row(out, head, tail, y, z, C: tl.constexpr):
    tl.store(out + head, y.to(out.dtype.element_ty), mask=head < C)
    tl.store(out + tail, z.to(out.dtype.element_ty), mask=tail < C)


@triton.jit
def store_quantised(values, scale, head, tail, y, z, C: tl.constexpr):
    """A row, padded with zeros, as e4m3 and its scale: max / 448, or 1 for zeros."""
    top = tl.maximum(tl.max(tl.abs(y), axis=0), tl.max(tl.abs(z), axis=0))
    # One division a row instead of one a number: a number within 1e-7 of the middle of two neighbours may go to either.
    factor = E4M3_MAX / tl.maximum(top, LEAST_TOP)
    tl.store(scale, tl.where(top > 0, top / E4M3_MAX, 1.0))
    store_row(values, head, tail, y * factor, z * factor, C)


@triton.jit
def quantize_kernel(x, values, scale, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, tail = row_parts(HEAD, TAIL, VECTOR)
    x += row * C
    store_quantised(values + row * C, scale + row, head, tail, load_row(x, head, C), load_row(x, tail, C), C)


def quantize(x: Tensor) -> RowwiseFP8:
    x = x.contiguous()
    out, channels = empty_rowwise(x), x.shape[-1]
    if x.numel():
        *split, warps = row_split(x)
        quantize_kernel[(out.scale.numel(),)](x, *out, channels, *split, num_warps=warps)
    return out


def fp8_linear(x: RowwiseFP8, weight: RowwiseFP8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    outputs, inputs = weight.values.shape
    if inputs % 16 or outputs % 16:
        near = [max(16, round(n / 16) * 16) for n in (outputs, inputs)]
        raise ValueError(
            f"fp8_linear: weight {[outputs, inputs]}: FP8 tensor cores need multiples of 16; nearest is {near}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"fp8_linear: dtype {dtype}: a GEMM with one scale per row returns torch.bfloat16")
    y = torch._scaled_mm(
        x.values.reshape(-1, inputs),
        weight.values.t(),  # row-major times column-major, as the hardware wants it
        scale_a=x.scale.reshape(-1, 1),
        scale_b=weight.scale.reshape(1, -1),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=False,  # sums in float32; True would leave them in the 14 bits of Hopper's FP8 tensor cores
    )
    return y.view(*x.values.shape[:-1], outputs)
