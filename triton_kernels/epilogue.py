"""The end of a denoising step on the device, and its two element-wise halves. Contracts: `dsa_engine.ops.epilogue`.

Four launches, each of which needs all of the one before it: tiles of tokens (final GEMM, clean estimate, next input,
moments of the hidden states), the frames' statistics, the head's MLP spread over its hidden units, and the decision.
Without a head to evaluate the two in the middle are left out, and so are the moments.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsa_engine.kernel_types import Epilogue, FinalLayer, HeadWeights, StopRule
from dsa_engine.triton_kernels.fp8_linear import load_row
from dsa_engine.triton_kernels.modulate import by_frame, of_frame
from dsa_engine.triton_kernels.pooling import (
    TILE,
    block,
    empty_moments,
    join,
    normalised,
    row_statistics,
    store_moments,
)

UNITS = 8  # hidden units of the MLP a program: 96 programs at Wan's 768


@triton.jit
def tokens_kernel(
    hidden,
    shift,
    scale,
    weight,
    bias,
    x,
    noise,
    sigma,
    next_sigma,
    x0,
    next_x,
    moments,
    tokens,
    frames,
    eps,
    shift_b,
    shift_f,
    scale_b,
    scale_f,
    height,
    width,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one frame's tokens: the velocity, and everything that follows from it.

    Columns of the GEMM are (row, column, channel) of a patch, padded to OUTPUTS.
    """
    tile, frame = tl.program_id(0), tl.program_id(1)
    token, output = tile * TILE + tl.arange(0, TILE), tl.arange(0, OUTPUTS)
    valid, used = token < tokens, output < PATCH * PATCH * CHANNELS
    rows = hidden + (frame * tokens + token).to(tl.int64) * C
    shift = of_frame(shift, frame, frames, shift_b, shift_f)
    scale = of_frame(scale, frame, frames, scale_b, scale_f)
    mean, rate = row_statistics(rows, valid, eps, C, BLOCK)

    velocity = tl.zeros((TILE, OUTPUTS), tl.float32)
    for start in range(0, C, BLOCK):
        col = start + tl.arange(0, BLOCK)
        y = normalised(rows, valid, col, mean, rate, C)
        if moments is not None:
            count = tl.minimum(tokens - tile * TILE, TILE).to(tl.float32)
            out = moments + (frame * tl.num_programs(0) + tile).to(tl.int64) * (2 * C)
            store_moments(out, y, valid, count, col, C)
        y = y * (1 + load_row(scale, col, C))[None, :] + load_row(shift, col, C)[None, :]
        at = weight + output[None, :] * C + col[:, None]
        w = tl.load(at, mask=used[None, :] & (col < C)[:, None], other=0.0)
        velocity = tl.dot(y.to(w.dtype), w, velocity, input_precision="ieee")
    velocity += tl.load(bias + output, mask=used, other=0.0).to(tl.float32)[None, :]

    inside = valid[:, None] & used[None, :]
    # Token (row, column) and output (row, column, channel) of its patch -> channel, row and column of the latents.
    column = (token % (width // PATCH) * PATCH)[:, None] + (output // CHANNELS % PATCH)[None, :]
    line = (token // (width // PATCH) * PATCH)[:, None] + (output // (CHANNELS * PATCH))[None, :]
    at = ((frame * CHANNELS + output % CHANNELS).to(tl.int64)[None, :] * height + line) * width + column
    clean = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(sigma + frame) * velocity
    clean = clean.to(x0.dtype.element_ty)
    tl.store(x0 + at, clean, mask=inside)
    level = tl.load(next_sigma + frame)
    noisy = (1 - level) * clean.to(tl.float32) + level * tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(next_x + at, noisy.to(next_x.dtype.element_ty), mask=inside)


@triton.jit
def confidence_kernel(
    features,
    weight1,
    bias1,
    weight2,
    logits,
    units,
    INPUTS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """UNITS hidden units of the MLP for one frame: their part of its logit."""
    unit, frame = tl.program_id(0) * UNITS + tl.arange(0, UNITS), tl.program_id(1)
    total = tl.zeros((UNITS, BLOCK), tl.float32)
    for start in tl.range(0, INPUTS, BLOCK, num_stages=3):
        col = start + tl.arange(0, BLOCK)
        at = weight1 + unit[:, None] * INPUTS + col[None, :]
        w = tl.load(at, mask=(unit < units)[:, None] & (col < INPUTS)[None, :], other=0.0)
        total += w.to(tl.float32) * tl.load(features + frame * INPUTS + col, mask=col < INPUTS, other=0.0)[None, :]
    h = tl.sum(total, axis=1) + tl.load(bias1 + unit, mask=unit < units, other=0.0).to(tl.float32)
    h *= tl.sigmoid(h) * tl.load(weight2 + unit, mask=unit < units, other=0.0).to(tl.float32)
    tl.store(logits + frame * tl.num_programs(0) + tl.program_id(0), tl.sum(h, axis=0))


@triton.jit
def stop_kernel(
    logits,
    bias2,
    step,
    min_steps,
    max_steps,
    reduce,
    threshold,
    state,
    frames,
    parts,
    FRAMES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row: the confidence of its frames from the parts of their logits, and whether it stops. Without logits it is
    NaN; without bias2 the logits are whole."""
    row, frame = tl.program_id(0), tl.arange(0, FRAMES)
    inside = frame < frames
    confidence = tl.full((FRAMES,), float("nan"), tl.float32)  # never above a threshold
    confident = False
    if logits is not None:
        part = tl.arange(0, PARTS)
        at = (row * frames + frame)[:, None] * parts + part[None, :]
        logit = tl.sum(tl.load(logits + at, mask=inside[:, None] & (part < parts)[None, :], other=0.0), axis=1)
        if bias2 is not None:
            logit += tl.load(bias2).to(tl.float32)
        confidence = tl.sigmoid(logit)
        mean = tl.sum(tl.where(inside, confidence, 0.0), axis=0) / frames
        low = tl.min(tl.where(inside, confidence, float("inf")), axis=0)
        high = tl.max(tl.where(inside, confidence, -float("inf")), axis=0)
        how = tl.load(reduce + row)
        reduced = tl.where(how == 0, low, tl.where(how == 1, mean, high))
        # tl.min and tl.max ignore a NaN frame, the mean does not: one is enough to go on.
        confident = (reduced >= tl.load(threshold + row)) & (mean == mean)
    now = tl.load(step + row)
    stop = (now >= tl.load(max_steps + row)) | ((now >= tl.load(min_steps + row)) & confident)
    out = state + row * (frames + 1)
    tl.store(out + frame, confidence, mask=inside)
    tl.store(out + frames, stop.to(tl.float32))


@triton.jit
def mix_kernel(a, b, sigma, out, size, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one frame: (1 - sigma) a + sigma b where b is NOISE, else a - sigma b."""
    frame, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(sigma + frame).to(tl.float32)
    x = tl.load(a + frame * size + at, mask=at < size, other=0.0).to(tl.float32)
    y = tl.load(b + frame * size + at, mask=at < size, other=0.0).to(tl.float32)
    z = (1 - level) * x + level * y if NOISE else x - level * y
    tl.store(out + frame * size + at, z.to(out.dtype.element_ty), mask=at < size)


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    return _mix(x, velocity, sigma, noise=False)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return _mix(x0, noise, sigma, noise=True)


def _mix(a: Tensor, b: Tensor, sigma: Tensor, noise: bool) -> Tensor:
    a, b, sigma = a.contiguous(), b.contiguous(), sigma.contiguous()
    out, size = torch.empty_like(a), math.prod(a.shape[2:])
    mix_kernel[(triton.cdiv(size, 1024), sigma.numel())](a, b, sigma, out, size, noise, 1024)
    return out


def epilogue(
    hidden: Tensor,
    time: Tensor,
    x: Tensor,
    noise: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    final: FinalLayer,
    head: HeadWeights | Tensor | None,
    rule: StopRule,
    eps: float,
) -> Epilogue:
    frames, tokens = x.shape[1], hidden.shape[1] // x.shape[1]
    weights = head if isinstance(head, HeadWeights) else None
    moments = None if weights is None else empty_moments(hidden, frames)
    x0, next_x = _tokens(hidden, x, noise, sigma, next_sigma, final, moments, eps)
    logits = head.contiguous()[..., None] if isinstance(head, Tensor) else None
    if weights is not None:
        logits = _confidence_logits(join(moments, time.contiguous(), frames, tokens, eps), weights)
    return Epilogue(x0, next_x, _stop_state(x, logits, weights, rule))


def _tokens(hidden, x, noise, sigma, next_sigma, final, moments, eps) -> tuple[Tensor, Tensor]:
    batch, frames, channels, height, width = x.shape
    x, noise, hidden = x.contiguous(), noise.contiguous(), hidden.contiguous()
    x0, next_x = torch.empty_like(x), torch.empty_like(x)
    modulation = by_frame("epilogue", hidden, frames, final.shift, final.scale)
    tokens, (outputs, inputs) = hidden.shape[1] // frames, final.weight.shape
    tokens_kernel[(triton.cdiv(tokens, TILE), batch * frames)](
        hidden,
        *modulation,
        final.weight.contiguous(),
        final.bias,
        x,
        noise,
        sigma.contiguous(),
        next_sigma.contiguous(),
        x0,
        next_x,
        moments,
        tokens,
        frames,
        eps,
        *(stride for m in modulation for stride in m.stride()[:2]),
        height,
        width,
        inputs,
        channels,
        math.isqrt(outputs // channels),
        max(16, triton.next_power_of_2(outputs)),
        TILE,
        block(hidden),
    )
    return x0, next_x


def _confidence_logits(features: Tensor, head: HeadWeights) -> Tensor:
    """features [B, F, 3 C] -> logits [B, F, parts], whose sum lacks only the last bias."""
    batch, frames, inputs = features.shape
    units = head.weight1.shape[0]
    logits = features.new_empty(batch, frames, triton.cdiv(units, UNITS))
    confidence_kernel[(logits.shape[2], batch * frames)](
        features,
        head.weight1.contiguous(),
        head.bias1,
        head.weight2.contiguous(),
        logits,
        units,
        inputs,
        UNITS,
        min(512, triton.next_power_of_2(inputs) // 2),
    )
    return logits


def _stop_state(x: Tensor, logits: Tensor | None, head: HeadWeights | None, rule: StopRule) -> Tensor:
    batch, frames = x.shape[:2]
    state = torch.empty(batch, frames + 1, dtype=torch.float32, device=x.device)
    parts = 1 if logits is None else logits.shape[2]
    stop_kernel[(batch,)](
        logits,
        None if head is None else head.bias2,
        *rule,
        state,
        frames,
        parts,
        triton.next_power_of_2(frames),
        triton.next_power_of_2(parts),
        num_warps=1,
    )
    return state
