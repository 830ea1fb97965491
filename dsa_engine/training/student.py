"""The few-step student with its confidence head: DMD on its own rollouts, through the loop that inference runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsa_engine.config import RolloutConfig
from dsa_engine.engine.rollout import Rollout
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT, DiTOutput
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.sampling.noise import SeededNoise
from dsa_engine.sampling.policy import PerChunk
from dsa_engine.sampling.schedule import warp
from dsa_engine.training.attenuation import JOINT, HeadObjective, attenuation_loss, attenuation_weight
from dsa_engine.training.dmd import LevelNorm, dmd_gradient, dmd_loss, guided, score_difference, weight_motion
from dsa_engine.training.flow import weighted_error
from dsa_engine.training.head import refine_loss
from dsa_engine.training.head_dataset import Recorder
from dsa_engine.training.teacher_forcing import teacher_forced, whole_clip
from dsa_engine.training.wan.sharding import Pass, copy_weights

ANCHOR, ANCHOR_SIGMA = 0.2, 0.7  # a little flow matching on data keeps the late steps from drifting
REFINE_WEIGHT = 0.02
SHIFT = 3.0  # of the noise levels that scores are compared at


class StudentRollout(NamedTuple):
    """The student's own clips, each chunk left at a step drawn for it. No gradient.

    video: the clean chunks, and x: the input of each chunk's exit step [B, N, F, C, H, W]; sigma: its level [B, N];
    text [B, N, L, text_dim]. Of every frame after every step before its exit, where a head's features were asked for:
    features [n, ...], what it reads, and distance [n], the mean squared distance of its estimate to the exit's.
    """

    video: Tensor
    x: Tensor
    sigma: Tensor
    text: Tensor
    features: Tensor | None = None
    distance: Tensor | None = None


@torch.inference_mode()
def self_rollout(
    dit: CausalDiT,
    config: RolloutConfig,
    text: Tensor,
    counts: Tensor,
    seed: int,
    size: tuple[int, int],
    head: ConfidenceHead | None = None,
) -> StudentRollout:
    """Roll out as inference does: the same KV cache, the same `denoise_chunk`, commit passes and all.

    text [B, N, L, text_dim]: the prompts' embeddings by chunk; counts [B, N]: steps of each chunk; size: latent height
    and width.
    """
    clips, chunks = counts.shape
    model = dit.config
    cache = KVCache(
        model.num_layers,
        model.num_heads,
        model.head_dim,
        model.tokens_per_frame(*size),
        config.window or chunks * config.chunk_frames,
        config.sink,
        slots=clips,
        device=dit.device,
        dtype=dit.dtype,
        rope=config.rope,
        theta=model.rope_theta,
    )
    shape = (config.chunk_frames, model.in_dim, *size)
    noise = SeededNoise([seed + i for i in range(clips)], shape, dit.device, torch.float32)
    policies = [PerChunk(row) for row in counts.tolist()]
    text_kv = [dit.text_kv(text[:, i]) for i in range(chunks)]
    recorder: Any = None if head is None else Recorder(head)
    rollout = Rollout(dit, recorder, cache, config, noise, policies, text_kv[0])
    video = torch.empty(clips, chunks, *shape, device=dit.device)
    x, sigma = torch.empty_like(video), torch.empty(clips, chunks, device=dit.device)
    features, distances = [], []
    for chunk in range(chunks):
        if chunk:
            rollout.set_prompt(text_kv[chunk], recache=False)
        seen: list[tuple[list[int], Tensor, Tensor]] = []

        def keep(step: Step, chunk=chunk, seen=seen) -> None:
            # a later step of the same row overwrites an earlier one: the exit step stays
            x[step.rows, chunk], sigma[step.rows, chunk] = step.x, step.sigma
            if recorder is not None:
                seen.append((step.rows, step.x0, recorder.features[-1]))

        result = rollout.denoise(keep)
        rollout.accept(result.latents)
        video[:, chunk] = result.latents
        for index, (rows, x0, read) in enumerate(seen, 1):
            on = [i for i, row in enumerate(rows) if index < result.steps[row]]
            exits = result.latents[[rows[i] for i in on]]
            features.append(read[on].flatten(0, 1).to(dit.device))
            distances.append((x0[on] - exits).square().mean(dim=(2, 3, 4)).flatten())
    recorded = (torch.cat(features), torch.cat(distances)) if recorder is not None else ()
    return StudentRollout(video, x, sigma, text, *recorded)


class StudentLosses:
    """What the student's and the critic's optimizers step on, for one batch of prompts at a time.

    The real score is the frozen teacher with guidance, the fake score a critic that follows the student. Where both
    are causal they are conditioned on the student's own past; a bidirectional teacher (Wan's base models) sees the
    whole clip at one noise level. In either case the loss is known per frame: what the head learns from.

    Args:
        teacher: the real score.
        null: embedding of the empty prompt [1, L, text_dim], for guidance.
        model: child `dit`; optional are `confidence`, a head that learns `objective` with the generator, and `refine`,
            one that learns self-refinement without touching the generator.
        config: the student's rollout.
        context: past chunks in the student's window.
        size: latent height and width.
        guidance: of the teacher.
        motion_weight: see `weight_motion`.
        compiled: with torch.compile.
        score: how teacher and critic are run: `teacher_forced` where they are causal, `whole_clip` where they are not.
        critic: the fake score (default: a copy of the teacher).
        actor: a copy of the student that rolls out, given its weights each time; None: the student itself.
        shift: of the noise levels that scores are compared at.
        objective: of `confidence`.
    """

    def __init__(
        self,
        teacher: CausalDiT,
        null: Tensor,
        model: nn.ModuleDict,
        config: RolloutConfig,
        context: int,
        size: tuple[int, int],
        guidance: float = 1.5,
        motion_weight: float = 0.0,
        compiled: bool = False,
        score: Callable[..., DiTOutput] = teacher_forced,
        critic: CausalDiT | None = None,
        actor: CausalDiT | None = None,
        shift: float = SHIFT,
        objective: HeadObjective = JOINT,
    ):
        self.model: Any = model
        self.null, self.config, self.actor = null, config, actor
        self.context, self.size, self.guidance, self.motion_weight = context, size, guidance, motion_weight
        self.critic = copy.deepcopy(teacher).requires_grad_(True) if critic is None else critic
        self.whole, self.shift = score is whole_clip, shift
        self.objective, self.refine = objective, self.model["refine"] if "refine" in model else None
        self.norm = LevelNorm().to(teacher.device)
        self.report: dict[str, float] = {}  # of the last student step

        def own(function):  # a wrapper of its own each, so that each compiles for its own weights and grad mode
            return torch.compile(function, dynamic=False) if compiled else function

        self.student_pass = Pass(self.model["dit"], own(teacher_forced))
        self.critic_pass, self.teacher_pass = Pass(self.critic, own(score)), Pass(teacher, own(score))

    def rollout(self, text: Tensor, generator: torch.Generator) -> StudentRollout:
        """Fresh clips of the student for prompts [B, N, L, text_dim], exits drawn evenly from 1..S."""
        counts = torch.randint(1, len(self.config.steps) + 1, text.shape[:2], generator=generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        dit = self.model["dit"]
        if self.actor is not None:
            copy_weights(dit, self.actor)
            dit = self.actor
        made = self_rollout(dit, self.config, text, counts, seed, self.size, self.refine)
        return StudentRollout(*(None if part is None else part.clone() for part in made))  # out of inference mode

    def student_loss(self, rolled: StudentRollout, latents: Tensor | None, generator: torch.Generator) -> Tensor:
        """DMD on the exit estimates, with the heads' losses and the anchor on real clips.

        latents: of real clips for the same prompts, None where there are none: no anchor.
        """
        video, text, objective = rolled.video, rolled.text, self.objective
        head = self.model["confidence"] if "confidence" in self.model else None
        taps = () if head is None else head.taps
        out, x0 = self._x0(self.student_pass, video, rolled.x, rolled.sigma, text, taps)
        sigma = self._levels(video, 0.98, generator).to(video.device)
        s = sigma[:, :, None, None, None, None]
        noisy = (1 - s) * x0.detach().view_as(video) + s * like(video, generator)
        with torch.no_grad():
            fake = self._x0(self.critic_pass, video, noisy, sigma, text)[1]
            null = self.null.expand(*text.shape[:2], -1, -1).contiguous()
            real = guided(
                self._x0(self.teacher_pass, video, noisy, sigma, text)[1],
                self._x0(self.teacher_pass, video, noisy, sigma, null)[1],
                self.guidance,
            )
        rows = video.flatten(1, 2) if self.whole else x0  # what shares a noise level shares a normalizer
        gradient = dmd_gradient(x0.view_as(rows), real.view_as(rows), fake.view_as(rows)).view_as(x0)
        loss = dmd_loss(x0, weight_motion(gradient, self.motion_weight))
        self.report = {"dmd": loss.mean().item()}
        total = loss.mean()
        if head is not None:
            logit = head(out.hidden, out.time)
            if objective.of_scores:
                distance = self.norm(score_difference(real, fake), sigma.flatten())
            else:
                distance = score_difference(real, x0).sqrt()
            joint = attenuation_loss(logit, distance, objective.penalty)
            if objective.attenuates:
                total = (attenuation_weight(logit) * loss).mean()
            total = total + objective.weight * joint
            self.report |= {"joint": joint.item(), "confidence": logit.sigmoid().mean().item()}
        if self.refine is not None:
            refine = refine_loss(self.refine.logits(rolled.features), rolled.distance)
            total = total + REFINE_WEIGHT * refine
            self.report |= {"refine": refine.item()}
        if latents is not None:
            anchor = self._anchor(latents, text, generator)
            total = total + ANCHOR * anchor
            self.report |= {"anchor": anchor.item()}
        return total

    def critic_loss(self, rolled: StudentRollout, generator: torch.Generator) -> Tensor:
        """Flow matching of the critic on the student's clips."""
        sigma = self._levels(rolled.video, 1.0, generator)
        return self._flow(self.critic_pass, rolled.video, sigma, rolled.text, generator)

    def _levels(self, video: Tensor, high: float, generator: torch.Generator) -> Tensor:
        """Noise levels to run the scores at: one a chunk, or one a clip where they see it whole. [B, N] on the CPU."""
        clips, chunks = video.shape[:2]
        drawn = torch.rand((clips, 1 if self.whole else chunks), generator=generator)
        return warp(drawn, self.shift).clamp(0.02, high).expand(-1, chunks)

    def _anchor(self, latents: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        sigma = ANCHOR_SIGMA * torch.rand(latents.shape[:2], generator=generator)
        return self._flow(self.student_pass, latents, sigma, text, generator)

    def _flow(self, run: Pass, video: Tensor, sigma: Tensor, text: Tensor, generator) -> Tensor:
        sigma, noise = sigma.to(video.device), like(video, generator)
        s = sigma[:, :, None, None, None, None]
        out = self._run(run, video, (1 - s) * video + s * noise, sigma, text)
        return weighted_error(out.velocity.float().view_as(video) - (noise - video), self.motion_weight).mean()

    def _x0(self, run: Pass, video, noisy, sigma, text, taps=()) -> tuple[DiTOutput, Tensor]:
        """The denoised estimate of every chunk on the student's own past: rows (clip, chunk)."""
        out = self._run(run, video, noisy, sigma, text, taps)
        return out, noisy.flatten(0, 1) - sigma.reshape(-1, 1, 1, 1, 1) * out.velocity.float()

    def _run(self, run: Pass, video, noisy, sigma, text, taps=()) -> DiTOutput:
        with torch.autocast(video.device.type, torch.bfloat16):
            return run(video, noisy, sigma, text, text, self.context, taps)


def like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, drawn on the CPU: the same run on every device."""
    return torch.randn(x.shape, generator=generator).to(x.device)
