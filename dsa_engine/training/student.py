"""The few-step student with its confidence head: DMD on its own rollouts, through the loop that inference runs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dsa_engine.config import RolloutConfig
from dsa_engine.engine.rollout import Rollout
from dsa_engine.models.dit import CausalDiT, DiTOutput
from dsa_engine.models.text import SlotTextEncoder
from dsa_engine.sampling.cache import KVCache
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.noise import SeededNoise
from dsa_engine.sampling.policy import PerChunk
from dsa_engine.sampling.schedule import warp
from dsa_engine.training.confidence import attenuation_loss, attenuation_weight
from dsa_engine.training.dmd import LevelNorm, dmd_gradient, dmd_loss, guided
from dsa_engine.training.teacher_forcing import teacher_forced

GUIDANCE = 1.5
ANCHOR, ANCHOR_SIGMA = 0.2, 0.7  # a little flow matching on data keeps the late steps from drifting
HEAD_WEIGHT = 0.02


def self_rollout(
    dit: CausalDiT, config: RolloutConfig, text_kv: list[Tensor], counts: Tensor, seed: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's own clips, each chunk left at a given step. No gradient.

    text_kv: per chunk, keys and values of B prompts; counts [B, N]: steps of each chunk; size: latent height = width.
    Returns video, x, sigma: the clean chunks, the input of each chunk's exit step [B, N, F, C, H, W], its level [B, N].
    """
    clips, chunks = counts.shape
    model = dit.config
    cache = KVCache(
        model.num_layers, model.num_heads, model.head_dim, model.tokens_per_frame(size, size), config.window,
        config.sink, slots=clips,
    )  # fmt: skip
    shape = (config.chunk_frames, model.in_dim, size, size)
    noise = SeededNoise([seed + i for i in range(clips)], shape, dit.device, torch.float32)
    policies = [PerChunk(row) for row in counts.tolist()]
    rollout = Rollout(dit, None, cache, config, noise, policies, text_kv[0])
    video = torch.empty(clips, chunks, *shape)
    x, sigma = torch.empty_like(video), torch.empty(clips, chunks)

    def keep(step: Step) -> None:  # a later step of the same row overwrites an earlier one: the exit step stays
        x[step.rows, rollout.index], sigma[step.rows, rollout.index] = step.x, step.sigma

    for chunk in range(chunks):
        if chunk:
            rollout.switch(text_kv[chunk], recache=False)
        result = rollout.denoise(keep)
        rollout.accept(result.latents)
        video[:, chunk] = result.latents
    return video, x, sigma


class StudentLosses:
    """What the student's and the critic's optimisers step on, for one batch of prompts at a time.

    The real score is the frozen teacher with guidance, the fake score a critic that follows the student; both are
    causal and conditioned on the student's own past, so the loss is known per frame: what the head learns from.
    """

    def __init__(
        self, teacher: CausalDiT, text: SlotTextEncoder, config: RolloutConfig, context: int, size: int, compiled: bool
    ):
        self.teacher, self.text, self.config, self.context, self.size = teacher, text, config, context, size
        self.critic = copy.deepcopy(teacher).requires_grad_(True)
        self.norm = LevelNorm()
        self.report: dict[str, float] = {}  # of the last student step

        def own(function):  # a wrapper of its own each, so that each compiles for its own weights and grad mode
            return torch.compile(function, dynamic=False) if compiled else function

        self.student_forward, self.critic_forward, self.teacher_forward = (own(teacher_forced) for _ in range(3))

    def rollout(self, student: CausalDiT, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh clips of the student for prompts [B, N, 4], exits drawn evenly from 1..S."""
        counts = torch.randint(1, len(self.config.steps) + 1, tokens.shape[:2], generator=generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        with torch.inference_mode():
            text_kv = [student.text_kv(self.text.table(tokens[:, i])) for i in range(tokens.shape[1])]
            made = self_rollout(student, self.config, text_kv, counts, seed, self.size)
        video, x, sigma = (part.clone() for part in made)
        return {"video": video, "x": x, "sigma": sigma, "text": self.text.table(tokens).detach()}

    def student_loss(self, model: nn.ModuleDict, rolled: dict[str, Tensor], data, generator) -> Tensor:
        """DMD on the exit estimates, attenuated per frame, with the head's loss and the anchor on real clips."""
        video, text = rolled["video"], rolled["text"]
        out, x0 = self._x0(self.student_forward, model["dit"], video, rolled["x"], rolled["sigma"], text)
        logit = model["confidence"](out.hidden, out.time)
        sigma = warp(torch.rand(video.shape[:2], generator=generator), 3.0).clamp(0.02, 0.98)
        s = sigma[:, :, None, None, None, None]
        noisy = (1 - s) * x0.detach().view_as(video) + s * torch.randn(video.shape, generator=generator)
        with torch.no_grad():
            fake = self._x0(self.critic_forward, self.critic, video, noisy, sigma, text)[1]
            null = self.text.null(1).expand(*text.shape[:2], -1, -1).contiguous()
            real = guided(
                self._x0(self.teacher_forward, self.teacher, video, noisy, sigma, text)[1],
                self._x0(self.teacher_forward, self.teacher, video, noisy, sigma, null)[1],
                GUIDANCE,
            )
        loss = dmd_loss(x0, dmd_gradient(x0, real, fake))
        relative = self.norm(loss.detach(), sigma.flatten())
        head = attenuation_loss(logit, relative)
        generator_loss = (attenuation_weight(logit) * loss).mean()
        anchor = self._anchor(model["dit"], *data, generator)
        self.report = {"dmd": loss.mean().item(), "head": head.item(), "anchor": anchor.item()}
        return generator_loss + HEAD_WEIGHT * head + ANCHOR * anchor

    def critic_loss(self, rolled: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Flow matching of the critic on the student's clips."""
        sigma = warp(torch.rand(rolled["video"].shape[:2], generator=generator), 3.0).clamp(0.02, 1.0)
        return self._flow(self.critic_forward, self.critic, rolled["video"], sigma, rolled["text"], generator)

    def _anchor(self, dit, latents: Tensor, tokens: Tensor, generator) -> Tensor:
        sigma = ANCHOR_SIGMA * torch.rand(latents.shape[:2], generator=generator)
        return self._flow(self.student_forward, dit, latents, sigma, self.text.table(tokens).detach(), generator)

    def _flow(self, forward, dit, video: Tensor, sigma: Tensor, text: Tensor, generator) -> Tensor:
        s = sigma[:, :, None, None, None, None]
        noise = torch.randn(video.shape, generator=generator)
        noisy = (1 - s) * video + s * noise
        out = self._run(forward, dit, video, noisy, sigma, text)
        return (out.velocity.float().view_as(video) - (noise - video)).square().mean()

    def _x0(self, forward, dit, video, noisy, sigma, text) -> tuple[DiTOutput, Tensor]:
        """The denoised estimate of every chunk on the student's own past: rows (clip, chunk)."""
        out = self._run(forward, dit, video, noisy, sigma, text)
        return out, noisy.flatten(0, 1) - sigma.reshape(-1, 1, 1, 1, 1) * out.velocity.float()

    def _run(self, forward, dit, video, noisy, sigma, text) -> DiTOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(dit, video, noisy, sigma, text, text, self.context)
