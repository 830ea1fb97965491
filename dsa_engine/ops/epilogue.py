"""After the last block: the estimate of the clean chunk, its confidence, the stop flag, and the re-noising."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsa_engine.kernel_types import Epilogue, FinalLayer, HeadWeights, StopRule
from dsa_engine.ops.dispatch import resolve


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x - sigma * v (flow matching: x = (1 - sigma) x0 + sigma noise, v = noise - x0).

    Args:
        x: Noisy latents [B, F, C, H, W].
        velocity: v, like x.
        sigma: Noise level of each frame [B, F].
    """
    return resolve("velocity_to_x0", velocity)(x, velocity, sigma)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise: the input of the next step.

    Args:
        x0: Clean latents [B, F, C, H, W].
        noise: Standard normal, like x0.
        sigma: Noise level of each frame [B, F].
    """
    return resolve("renoise", x0)(x0, noise, sigma)


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
    """The end of a denoising step in one op:

        v = unpatchify(modulate(hidden, final.shift, final.scale) final.weight^T + final.bias)
        x0 = x - sigma v                                            rounded to x's dtype
        c = sigmoid(MLP([mean_s h, std_s h, time])), h = LayerNorm(hidden)                      per frame
        stop = step >= max_steps or (step >= min_steps and reduce_f(c) >= threshold)     per row
        next x = (1 - next_sigma) x0 + next_sigma noise

    Nothing leaves the device, so noise is drawn before it is known to be needed. Nothing is written in place.

    Args:
        hidden: Tokens of the last block [B, T, C], T = F * S.
        time: Timestep embedding [B, F, C].
        x: Noisy latents [B, F, c, H, W].
        noise: Noise of the next step, like x.
        sigma: Current noise level [B, F] float32.
        next_sigma: Next noise level [B, F] float32.
        final: The DiT's last layer.
        head: Confidence head, or the logits [B, F] float32 of one that has run already, c = sigmoid(logits); None:
            confidences are NaN and rows stop by their step count alone.
        rule: Stop rule of each row.
        eps: Of the LayerNorm.

    Returns:
        x0, next x and the state [B, F + 1]: confidences and stop flag.

    Raises:
        ValueError: Shapes disagree.
    """
    batch, frames, channels, height, width = x.shape
    patch = final.weight.shape[0] / channels
    tokens = frames * height * width / patch
    if hidden.shape != (batch, tokens, final.weight.shape[1]) or math.isqrt(int(patch)) ** 2 != patch:
        raise ValueError(
            f"epilogue: hidden {list(hidden.shape)}, x {list(x.shape)} and weight {list(final.weight.shape)} must be "
            "[B, T, C], [B, F, c, H, W] and [p * p * c, C] with T = F * H/p * W/p"
        )
    alike = noise.shape == x.shape and sigma.shape == next_sigma.shape == x.shape[:2]
    if not alike or time.shape != (batch, frames, hidden.shape[2]):
        raise ValueError(
            f"epilogue: noise {list(noise.shape)}, time {list(time.shape)}, sigma {list(sigma.shape)} and next_sigma "
            f"{list(next_sigma.shape)} must be {list(x.shape)}, {[batch, frames, hidden.shape[2]]} and twice "
            f"{[batch, frames]}"
        )
    if isinstance(head, Tensor) and (head.shape != x.shape[:2] or head.dtype != torch.float32):
        raise ValueError(
            f"epilogue: logits {head.dtype} {list(head.shape)} must be float32 {[batch, frames]}, one per frame"
        )
    return resolve("epilogue", hidden)(hidden, time, x, noise, sigma, next_sigma, final, head, rule, eps)
