"""The teacher: flow matching with teacher forcing on clips of the synthetic world."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine.models.dit import CausalDiT
from dsa_engine.sampling.schedule import warp
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.shapes.world import NULL_TOKENS
from dsa_engine.training.teacher_forcing import teacher_forced

SHIFT = 3.0
CONTEXT_NOISE = 0.1  # the student will commit imperfect frames: half of the clips train on a slightly noisy past
NULL_SHARE = 0.1
PURE_NOISE_SHARE = 0.1
RECACHE_SHARE = 0.5


def sample_sigma(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise levels: uniform, warped by SHIFT, a share of them exactly 1, the level every rollout starts from."""
    sigma = warp(torch.rand(shape, generator=generator), SHIFT)
    return torch.where(torch.rand(shape, generator=generator) < PURE_NOISE_SHARE, torch.ones(()), sigma)


def recached(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens under which the clean copies are committed, as `Session.update` leaves them, and the chunks to learn from.

    A prompt switch recomputes the cache under the new prompt. So in half of the clips every chunk before the last
    switch carries the prompt of that switch; the chunks in between would see their own future and get no loss.
    tokens [B, N, 4] -> committed tokens [B, N, 4], weight [B, N] float.
    """
    clips, chunks = tokens.shape[:2]
    index = torch.arange(chunks)
    switch = (tokens[:, 1:] != tokens[:, :-1]).any(-1)
    last = torch.where(switch, index[1:], 0).amax(dim=1)
    last = torch.where(torch.rand(clips, generator=generator) < RECACHE_SHARE, last, 0)[:, None]
    before = index < last
    committed = torch.where(before[..., None], tokens.gather(1, last[..., None].expand(-1, 1, 4)), tokens)
    return committed, (~before | (index == 0)).float()


def weighted_error(error: Tensor, motion_weight: float) -> Tensor:
    """Per chunk mean |e_f|^2 + motion_weight * mean |e_{f+1} - e_f|^2: errors [B, N, F, C, H, W] -> [B, N].

    Both are quadratic forms of the same error, so their minimum is the same posterior mean; but how a chunk's frames
    differ, its motion, is a small part of the first term where their common position is unknown, and all of the second.
    """
    loss = error.square().mean(dim=(2, 3, 4, 5))
    if motion_weight and error.shape[2] > 1:
        loss = loss + motion_weight * error.diff(dim=2).square().mean(dim=(2, 3, 4, 5))
    return loss


def flow_loss(
    model: CausalDiT,
    text: SlotTextEncoder,
    latents: Tensor,
    tokens: Tensor,
    context: int,
    generator: torch.Generator,
    motion_weight: float = 0.0,
    forward=teacher_forced,
) -> Tensor:
    """`weighted_error` of the velocity, weighted down below sigma = 0.1.

    latents [B, N, F, C, H, W]; tokens [B, N, 4]; context: past chunks in the window. Returns a scalar.
    """
    clips, chunks = latents.shape[:2]
    sigma = sample_sigma((clips, chunks), generator)
    noise = torch.randn(latents.shape, generator=generator)
    blur = CONTEXT_NOISE * torch.rand(clips, generator=generator) * (torch.rand(clips, generator=generator) < 0.5)
    past_noise = blur[:, None, None, None, None, None] * torch.randn(latents.shape, generator=generator)
    committed, weight = recached(tokens, generator)
    null = torch.rand(clips, generator=generator) < NULL_SHARE
    committed, tokens = (torch.where(null[:, None, None], torch.tensor(NULL_TOKENS), x) for x in (committed, tokens))
    weight = weight * (sigma / sigma.clamp(min=0.1)).square()
    # everything random is drawn on the CPU: the same run on every device
    sigma, noise, past_noise, committed, tokens, weight = (
        x.to(latents.device) for x in (sigma, noise, past_noise, committed, tokens, weight)
    )
    s = sigma[:, :, None, None, None, None]
    noisy = (1 - s) * latents + s * noise
    out = forward(model, latents + past_noise, noisy, sigma, text.table(committed), text.table(tokens), context)
    error = out.velocity.float().view_as(latents) - (noise - latents)
    return (weighted_error(error, motion_weight) * weight).sum() / weight.sum()
