"""Trains the pixel codec on single rendered frames: minutes on one core."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from dsa_engine.checks import check_min
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.world import BACKGROUNDS, COLORS, HIGH, LOW, SHAPES, Caption, render

LOOKS = [Caption(color, shape, "still", ground) for color, shape, ground in product(COLORS, SHAPES, BACKGROUNDS)]
BATCH = 32
RATE, WARM_UP = 6e-3, 50
EDGE_WEIGHT = 3.0
LATENT_NOISE = 0.3
SETTLED = 0.8  # share of the run after which the batch norm's statistics are frozen, as they are in use


def random_frames(rng: np.random.Generator, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 [n, 1, 3, H, W] in [0, 1]: any look at any position."""
    looks = [LOOKS[i] for i in rng.integers(len(LOOKS), size=n)]
    frames = torch.from_numpy(render(looks, *rng.uniform(LOW, HIGH, size=(2, n)))).to(device)
    return (frames.permute(0, 3, 1, 2) / 255).unsqueeze(1).contiguous()


def reconstruction_loss(output: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """mean(w ((y - x)^2 + .05 |y - x|)) with w = EDGE_WEIGHT within a pixel of an outline of x, else 1.

    output, frames: [B, 1, 3, H, W] in [0, 1]. An outline is where the brightest and the darkest of a 3 x 3
    neighbourhood differ by more than .05: those 3 % of the pixels decide which shape is seen.
    """
    x = frames.flatten(0, 1)
    contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).amax(dim=1, keepdim=True)  # [B, 1, H, W]
    weight = 1 + (EDGE_WEIGHT - 1) * (contrast > 0.05)
    error = output.flatten(0, 1) - x
    return (weight * (error.square() + 0.05 * error.abs())).mean()


@torch.no_grad()
def held_out_psnr(codec: PixelCodec, n: int = 256, seed: int = 2**31) -> float:
    """PSNR in dB over n frames of a random stream that training does not draw from; the codec must be in `eval()`."""
    frames = random_frames(np.random.default_rng(seed), n, next(codec.parameters()).device)
    output, _ = codec.decode(codec.encode(frames))
    return -10 * math.log10((output - frames).square().mean().item())


@torch.no_grad()
def rescale_latents(codec: PixelCodec, frames: torch.Tensor) -> None:
    """Gives the latents of frames [B, T, 3, H, W] unit std per channel, in place; frames decode as before.

    The encoder goes on learning after its batch norm is frozen, which leaves a std of about 1.1. What is divided out of
    the latents goes into the decoder's first convolution, which is linear.
    """
    std = codec.encode(frames).std(dim=(0, 1, 3, 4))
    norm: Any = codec.encoder[-1]
    first: Any = codec.decoder[0]
    norm.running_var.add_(norm.eps).mul_(std.square()).sub_(norm.eps)
    first.weight.mul_(std[:, None, None])


def train_codec(
    iterations: int = 5000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> tuple[PixelCodec, float]:
    """A codec trained for `iterations` batches of 32 frames, in `eval()`, and its held-out PSNR in dB.

    AdamW at 6e-3 with a cosine decay; the latents carry gaussian noise of a std drawn from U(0, .3) per frame, so that
    the decoder forgives what a video model gets slightly wrong. The result depends on `iterations` and `seed` only, not
    on the clock. `log(iteration, loss)` is called after each iteration. Raises ValueError for fewer than 1 iteration.
    """
    check_min("iterations", iterations)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec = PixelCodec().to(device)
    noise = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    for i in trange(iterations, desc="codec", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (i + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * i / iterations))
        if i == int(SETTLED * iterations):
            codec.encoder[-1].eval()
        frames = random_frames(rng, BATCH, device)
        latents = codec.encode(frames)
        std = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, 1, generator=noise, device=device)
        latents = latents + std * torch.randn(latents.shape, generator=noise, device=device)
        loss = reconstruction_loss(codec.reconstruct(latents), frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if log is not None:
            log(i, loss.item())
    codec.eval()
    rescale_latents(codec, random_frames(rng, 256, device))
    return codec, held_out_psnr(codec)
