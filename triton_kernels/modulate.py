"""Adaptive LayerNorm, the gated residual, and the bias with its activation, each in one pass over memory.

Everything is float32 between the loads and the stores. Contracts: `dsa_engine.ops.modulate`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_engine.kernel_types import RowwiseFP8
from dsa_engine.triton_kernels.fp8_linear import (
    empty_rowwise,
    load_row,
    row_parts,
    row_split,
    store_quantised,
    store_row,
)

# gelu(x) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same as 0.5 x (1 + tanh u), with one exponential
# and nothing that cancels. Here -2 u log2(e) = x (LINEAR + CUBIC x^2).
LINEAR = tl.constexpr(-2.302208198)
CUBIC = tl.constexpr(-0.1029432397)


@triton.jit
def of_frame(m, frame, frames, m_b, m_f):
    """Where the vector of one frame of the batch starts; `frame` = b * F + f."""
    return m + (frame // frames).to(tl.int64) * m_b + (frame % frames) * m_f


@triton.jit
def load_sum(x, y, gate, residual, col, C: tl.constexpr):
    """x, or x + gate * y as it is after rounding to residual, where it is left."""
    h = load_row(x, col, C)
    if y is not None:
        branch = load_row(y, col, C)
        if gate is not None:
            branch *= load_row(gate, col, C)
        rounded = (h + branch).to(residual.dtype.element_ty)
        tl.store(residual + col, rounded, mask=col < C)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def centred(h, mean, col, C: tl.constexpr, LAST: tl.constexpr):
    """h - mean, and zeros in the padding. LAST: where the block of channels ends."""
    return h - mean if LAST <= C else tl.where(col < C, h - mean, 0.0)


@triton.jit
def modulate_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    residual,
    out,
    out_scale,
    eps,
    tokens,
    frames,
    gate_b,
    gate_f,
    shift_b,
    shift_f,
    scale_b,
    scale_f,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One token. Without y there is no residual, without a gate it is 1; with out_scale out is FP8."""
    frame = tl.program_id(1)
    row = (frame * tokens + tl.program_id(0)).to(tl.int64)
    shift = of_frame(shift, frame, frames, shift_b, shift_f)
    scale = of_frame(scale, frame, frames, scale_b, scale_f)
    x, out = x + row * C, out + row * C
    if y is not None:
        y, residual = y + row * C, residual + row * C
    if gate is not None:
        gate = of_frame(gate, frame, frames, gate_b, gate_f)
    head, tail = row_parts(HEAD, TAIL, VECTOR)
    a, b = load_sum(x, y, gate, residual, head, C), load_sum(x, y, gate, residual, tail, C)

    mean = (tl.sum(a, axis=0) + tl.sum(b, axis=0)) / C
    a, b = centred(a, mean, head, C, HEAD), centred(b, mean, tail, C, HEAD + TAIL)
    rate = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / C + eps)
    a = a * rate * (1 + load_row(scale, head, C)) + load_row(shift, head, C)
    b = b * rate * (1 + load_row(scale, tail, C)) + load_row(shift, tail, C)
    if out_scale is None:
        store_row(out, head, tail, a, b, C)
    else:
        store_quantised(out, out_scale + row, head, tail, a, b, C)


@triton.jit
def gate_residual_kernel(
    x, y, gate, out, tokens, frames, gate_b, gate_f, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS tokens of one frame, WIDTH of their channels."""
    token, frame = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    col = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (col < C)[None, :]
    at = (frame * tokens + token).to(tl.int64)[:, None] * C + col[None, :]
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    h += branch * load_row(of_frame(gate, frame, frames, gate_b, gate_f), col, C)[None, :]
    tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def biased_gelu(x, bias, col, C: tl.constexpr):
    h = load_row(x, col, C) + load_row(bias, col, C)
    root = tl.rsqrt(1 + tl.exp2(h * (LINEAR + CUBIC * h * h)))
    return h * root * root  # a division would take two instructions more than this


@triton.jit
def gelu_bias_kernel(
    x, bias, out, out_scale, C: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr
):
    """One row. With out_scale out is FP8."""
    row = tl.program_id(0).to(tl.int64)
    head, tail = row_parts(HEAD, TAIL, VECTOR)
    x, out = x + row * C, out + row * C
    a, b = biased_gelu(x, bias, head, C), biased_gelu(x, bias, tail, C)
    if out_scale is None:
        store_row(out, head, tail, a, b, C)
    else:
        store_quantised(out, out_scale + row, head, tail, a, b, C)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False) -> Tensor | RowwiseFP8:
    return _modulate(x, None, None, shift, scale, eps, fp8)[1]


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, Tensor | RowwiseFP8]:
    return _modulate(x, y.contiguous(), gate, shift, scale, eps, fp8)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    channels, frames, out = x.shape[2], gate.shape[1], torch.empty_like(x)
    (gate,) = by_frame("gate_residual", x, frames, gate)
    tokens, width = x.shape[1] // frames, min(512, triton.next_power_of_2(channels))
    if x.numel():
        grid = (triton.cdiv(tokens, 4), x.shape[0] * frames, triton.cdiv(channels, width))
        gate_residual_kernel[grid](
            x, y, gate, out, tokens, frames, *gate.stride()[:2], channels, width, 4, num_warps=max(1, width // 128)
        )
    return out


def gelu_bias(x: Tensor, bias: Tensor, fp8: bool = False) -> Tensor | RowwiseFP8:
    x, channels = x.contiguous(), x.shape[-1]
    out = empty_rowwise(x) if fp8 else torch.empty_like(x)
    values, scales = out if fp8 else (out, None)
    if x.numel():
        *split, warps = row_split(x, bias)
        gelu_bias_kernel[(x.numel() // channels,)](x, bias, values, scales, channels, *split, num_warps=warps)
    return out


def _modulate(x, y, gate, shift, scale, eps, fp8):
    x = x.contiguous()
    residual = None if y is None else torch.empty_like(x)
    out = empty_rowwise(x) if fp8 else torch.empty_like(x)
    values, scales = out if fp8 else (out, None)
    given = [m for m in (gate, shift, scale) if m is not None]
    frames = max(m.shape[1] for m in given)
    given = by_frame("modulate" if y is None else "residual_modulate", x, frames, *given)
    strides = [stride for m in given for stride in m.stride()[:2]]
    tokens, (*split, warps) = x.shape[1] // frames, row_split(x, *given)
    if gate is None:
        given, strides = [None, *given], [0, 0, *strides]
    if x.numel():
        modulate_kernel[(tokens, x.shape[0] * frames)](
            x, y, *given, residual, values, scales, eps, tokens, frames, *strides, x.shape[2], *split, num_warps=warps
        )
    return residual, out


def by_frame(op: str, x: Tensor, frames: int, *modulation: Tensor) -> list[Tensor]:
    """Each as a view [B, F, C] with its channels side by side; those of one frame or one row are repeated."""
    wrong = [m.shape[1] for m in modulation if m.shape[1] not in (1, frames)]
    if wrong:
        raise ValueError(f"{op}: modulation of {wrong[0]} frames beside one of {frames}: must be 1 or {frames}")
    rows = (m if m.stride(2) == 1 else m.contiguous() for m in modulation)
    return [m.expand(x.shape[0], frames, x.shape[2]) for m in rows]
