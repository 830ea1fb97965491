"""Rolls out a pipeline on held-out clips of the synthetic world, many at a time, and scores the frames."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dsa_engine import pipeline_inputs
from dsa_engine.checks import check_int
from dsa_engine.engine.rollout import Rollout
from dsa_engine.engine.session import to_uint8
from dsa_engine.models.dit import CausalDiT, DiTOutput
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.policy import Fixed, Policy
from dsa_engine.sampling.schedule import TIMESTEPS
from dsa_engine.shapes import metrics, world
from dsa_engine.shapes.text_encoder import SlotTextEncoder

BATCH_CLIPS = 16  # more do not make a CPU faster, and hold more memory
LATENT_SIZE = world.SIZE // 8
Captions = Sequence[Sequence[world.Caption]]  # per clip one for each chunk, all clips of one length


@dataclass(frozen=True)
class EvalRollouts:
    """frames uint8 [B, T, H, W, 3]; steps [B, N]; confidence [B, N, F] of the exit step, NaN without a head."""

    frames: np.ndarray
    steps: np.ndarray
    confidence: np.ndarray


def held_out(clips: int, chunks: int = 4, seed: int = 987_654_321, **odds) -> list[list[world.Caption]]:
    """Captions per chunk of clips that no training pool draws; odds: of `world.sample_captions`."""
    rng = np.random.default_rng(seed)
    return [list(world.sample_captions(rng, chunks, **odds)) for _ in range(clips)]


def group_by_prompt_switches(switches: Iterable[Hashable], batch: int) -> list[list[int]]:
    """Batches of at most `batch` clips whose prompts switch at the same chunks; switches: those of each clip.

    A switch recaches the whole batch, so only in such a batch is every clip rolled out as in a session of its own.
    """
    groups: dict[Hashable, list[int]] = {}
    for clip, key in enumerate(switches):
        groups.setdefault(key, []).append(clip)
    return [clips[k : k + batch] for clips in groups.values() for k in range(0, len(clips), batch)]


def prompt_switches(clip: Sequence[world.Caption]) -> tuple[bool, ...]:
    """Of each chunk but the first: is its caption another than the previous one?"""
    return tuple(a != b for a, b in pairwise(clip))


def roll_out(
    pipe: Pipeline,
    captions: Captions,
    policy: Policy | str | Sequence[Policy],
    seed: int = 0,
    recache: bool = True,
    on_step: Callable[[Step], None] | None = None,
    batch: int | None = None,
) -> EvalRollouts:
    """One clip per list of captions, switching prompts as a session would.

    Args:
        pipe: the pipeline, with a codec and a text encoder.
        captions: per clip one for each chunk.
        policy: for all clips, or one per clip.
        seed: clip i has the noise of seed + i.
        recache: whether a switch recomputes the cache under the new prompt.
        on_step: sees every step, its rows being indices of `captions`.
        batch: max clips at a time, only those that switch at the same chunks: then a clip's result does not depend on
            the others (but for rounding). None rolls out all at once, and where one switches, all recache.
    """
    policies = [policy] * len(captions) if isinstance(policy, (Policy, str)) else list(policy)
    if len(policies) != len(captions):
        raise ValueError(f"{len(policies)} policies for {len(captions)} clips: give one, or {len(captions)}")
    policies = [pipeline_inputs.resolve_policy(pipe.engine, policy) for policy in policies]
    order = [list(range(len(captions)))]
    if batch is not None:
        order = group_by_prompt_switches(map(prompt_switches, captions), batch)
    parts = []
    for clips in order:
        own = [policies[i] for i in clips]
        rollout = _rollout(pipe, [captions[i] for i in clips], [seed + i for i in clips], policy=own)

        def report(step: Step, clips=clips) -> None:
            on_step(step._replace(rows=[clips[row] for row in step.rows]))

        parts.append(_run(pipe, rollout, [captions[i] for i in clips], recache, on_step and report))
    return _in_order(parts, order)


def roll_out_teacher(
    pipe: Pipeline,
    captions: Captions,
    steps: int = 24,
    shift: float = 3.0,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = BATCH_CLIPS,
) -> EvalRollouts:
    """The many-step flow-matching teacher on the same KV cache: deterministic Euler along sigma, chunk by chunk.

        x <- x + (sigma' - sigma) v,   sigma = warp(1, 1 - 1/steps, ..., 1/steps; shift), then 0

    With guidance g other than 1, v = v_null + g (v_prompt - v_null), v_null from a past committed under the null
    prompt. pipe: a package folder with generator, codec and text; clips, seeds and switches as in `roll_out`.
    """
    check_int("steps", steps)
    levels = tuple(TIMESTEPS * (1 - i / steps) for i in range(steps))
    config = replace(pipe.config, steps=levels, shift=shift)
    parts, order = [], group_by_prompt_switches(map(prompt_switches, captions), batch)
    for clips in order:
        batch_captions, seeds = [captions[i] for i in clips], [seed + i for i in clips]
        last: list[Step] = []

        def same_noise(chunk: int, step: int, last=last) -> Tensor:
            """The noise that is in x already: renoising x0 with it is the Euler step."""
            return (last[0].x - (1 - last[0].sigma) * last[0].x0) / last[0].sigma

        rows = seeds if guidance == 1.0 else seeds * 2  # the second half: the same clips under the null prompt
        dit = pipe.engine.dit if guidance == 1.0 else GuidedDiT(pipe.engine.dit, guidance)
        rollout = _rollout(pipe, batch_captions, rows, config=config, policy=Fixed(steps), renoise=same_noise, dit=dit)

        def keep(step: Step, last=last) -> None:
            last[:] = [step]

        parts.append(_run(pipe, rollout, batch_captions, True, keep))
    return _in_order(parts, order)


class GuidedDiT:
    """A DiT whose rows come twice, first under their prompts, then under the null prompt: both get the guided velocity.

    So both halves see the same x, and each commits it to its own rows of the cache under its own prompt.
    """

    def __init__(self, dit: CausalDiT, guidance: float):
        self.dit, self.guidance = dit, guidance

    def __call__(self, *inputs) -> DiTOutput:
        out = self.dit(*inputs)
        prompted, null = out.velocity.chunk(2)
        return out._replace(velocity=(null + self.guidance * (prompted - null)).repeat(2, 1, 1, 1, 1))


def ground_truth(pipe: Pipeline, captions: Captions, seed: int = 0) -> EvalRollouts:
    """Ground truth through the codec, what a perfect model would score; clip i is drawn by seed + i. No steps."""
    chunk, frames = pipe.config.chunk_frames, []
    for i, clip in enumerate(captions):
        pixels = torch.from_numpy(world.render_clip(np.random.default_rng(seed + i), clip, chunk).frames)
        frames.append(_through_codec(pipe, pixels.movedim(-1, 1)[None].float() / 255))
    shape = (len(captions), len(captions[0]))
    return EvalRollouts(np.concatenate(frames), np.zeros(shape, int), np.full((*shape, chunk), np.nan))


@torch.inference_mode()
def _through_codec(pipe: Pipeline, pixels: Tensor) -> np.ndarray:
    codec, dit = pipe.engine.decoder, pipe.engine.dit
    return to_uint8(codec.decode(codec.encode(pixels.to(dit.device, dit.dtype)), None)[0])


def _rollout(pipe: Pipeline, captions: Captions, seeds: Sequence[int], policy: Policy | Sequence[Policy], **options):
    """A rollout of these clips under their first prompts; rows beyond one per clip are under the null prompt."""
    return pipe.engine.rollout(
        _embeds(pipe, [clip[0] for clip in captions], len(seeds)),
        height=LATENT_SIZE,
        width=LATENT_SIZE,
        frames=len(captions[0]) * pipe.config.chunk_frames,
        policy=policy,
        seeds=seeds,
        **{"config": pipe.config, **options},
    )


def _embeds(pipe: Pipeline, prompts: Sequence[world.Caption], rows: int) -> Tensor:
    embeds, text = pipe.engine.encode([str(prompt) for prompt in prompts]), cast(SlotTextEncoder, pipe.engine.text)
    return embeds if rows == len(prompts) else torch.cat((embeds, text.null(rows - len(prompts))))


def _run(pipe: Pipeline, rollout: Rollout, captions: Captions, recache: bool, on_step) -> EvalRollouts:
    """All chunks of a rollout, decoded; of its rows the first one per clip."""
    clips, chunks = len(captions), []
    for i in range(len(captions[0])):
        switched = [i > 0 and clip[i] != clip[i - 1] for clip in captions]
        if any(switched):
            rows = len(rollout.slots)
            embeds = _embeds(pipe, [clip[i] for clip in captions], rows)
            rollout.set_prompt(pipe.engine.text_kv(embeds), recache, switched * (rows // clips))
        chunks.append(rollout.denoise(on_step))
        rollout.accept(chunks[-1].latents, chunks[-1].confidence)
    with torch.inference_mode():
        pixels, _ = pipe.engine.decoder.decode(torch.cat([c.latents[:clips] for c in chunks], dim=1), None)
    missing = torch.full(chunks[0].latents.shape[:2], torch.nan)
    confidence = torch.stack([missing if c.confidence is None else c.confidence for c in chunks], dim=1)
    return EvalRollouts(
        frames=to_uint8(pixels),
        steps=np.array([c.steps[:clips] for c in chunks]).T,
        confidence=confidence[:clips].float().cpu().numpy(),
    )


def _in_order(parts: Sequence[EvalRollouts], order: Sequence[Sequence[int]]) -> EvalRollouts:
    """The batches as one, in the order of the captions."""
    back = np.argsort(np.concatenate(order))
    return EvalRollouts(
        *(np.concatenate([getattr(part, f.name) for part in parts])[back] for f in fields(EvalRollouts))
    )


@dataclass(frozen=True)
class Trace:
    """What rollouts that never stop show after each of their S steps, per latent frame.

    confidence [B, N, S, F]; distance [B, N, S - 1, F]: mean((x_k - x_S)^2), how far the estimate after step k is from
    the last one; change [B, N, S - 1, F]: mean((x_{k+1} - x_k)^2), what `Change` reads after step k + 1.
    """

    confidence: np.ndarray
    distance: np.ndarray
    change: np.ndarray


def trace(pipe: Pipeline, captions: Captions, seed: int = 0, batch: int = BATCH_CLIPS) -> tuple[EvalRollouts, Trace]:
    """`roll_out` with every step of the schedule, and what happened on the way. The pipeline needs a head."""
    shape, steps = (len(captions), len(captions[0])), pipe.max_steps
    confidence = np.empty((*shape, steps, pipe.config.chunk_frames), np.float32)
    distance, change = (np.empty((*shape, steps - 1, pipe.config.chunk_frames), np.float32) for _ in range(2))
    estimates: list[Tensor] = []  # of the chunk at hand

    def keep(step: Step) -> None:
        estimates[step.index - 1 :] = [step.x0]
        confidence[step.rows, step.chunk, step.index - 1] = step.confidence.cpu().numpy()
        if step.index == steps:
            x = torch.stack(estimates, dim=1)  # [rows, S, F, C, H, W]
            for kept, other in ((distance, x[:, -1:]), (change, x[:, 1:])):
                kept[step.rows, step.chunk] = (x[:, :-1] - other).float().square().mean(dim=(3, 4, 5)).cpu().numpy()

    if pipe.engine.head is None:
        raise ValueError(f"model {pipe.name!r} has no confidence head, so there is nothing to trace")
    rolled = roll_out(pipe, captions, Fixed(steps), seed, on_step=keep, batch=batch)
    return rolled, Trace(confidence, distance, change)


@dataclass(frozen=True)
class Table:
    """Scores of B clips of N chunks of F pixel frames each, see `metrics.score`.

    valid bool, fit, texture [B, N, F]; xy [B, N, F, 2] px; leap [B, N, F] px, how far the object is from where it was a
    frame before, NaN in chunks that do not carry on (the first, a cut, jumping); motion bool, steps int [B, N].
    kind str [B, N]: first, cut, jumping, soft or same, the first that holds; hard bool [B, N]: first, cut or jumping.
    """

    valid: np.ndarray
    fit: np.ndarray
    texture: np.ndarray
    xy: np.ndarray
    leap: np.ndarray
    motion: np.ndarray
    steps: np.ndarray
    kind: np.ndarray
    hard: np.ndarray


def tabulate(captions: Captions, rolled: EvalRollouts) -> Table:
    """Scores every frame of rolled-out clips against their captions."""
    clips, chunks = len(captions), len(captions[0])
    per_chunk = rolled.frames.shape[1] // chunks
    scores = [
        metrics.score(frames, [caption for caption in clip for _ in range(per_chunk)], per_chunk)
        for clip, frames in zip(captions, rolled.frames)
    ]
    xy = np.stack([s.xy for s in scores])  # [B, T, 2]
    kind = np.array([chunk_kinds(clip) for clip in captions])
    hard = np.isin(kind, HARD)
    leap = np.full(xy.shape[:2], np.nan)
    leap[:, 1:] = np.linalg.norm(np.diff(xy, axis=1), axis=-1)
    leap = np.where(hard[..., None], np.nan, leap.reshape(clips, chunks, per_chunk))
    valid, fit, texture = (
        np.stack([getattr(s, name) for s in scores]).reshape(leap.shape) for name in ("valid", "fit", "texture")
    )
    motion = np.stack([s.motion for s in scores])
    return Table(valid, fit, texture, xy.reshape(*leap.shape, 2), leap, motion, rolled.steps, kind, hard)


HARD = ("first", "cut", "jumping")  # chunks that their past does not predict


def chunk_kinds(captions: Sequence[world.Caption]) -> list[str]:
    """What each chunk of a clip is: first, cut, jumping, soft or same, the first that holds."""
    events = world.events_of(captions)
    return ["jumping" if e not in HARD and c.motion == "jumping" else e for e, c in zip(events, captions)]


def mean_scores(table: Table) -> dict[str, float]:
    """hard: share of hard chunks; steps: mean per chunk, also of easy and hard ones; valid: share of good frames, also
    of easy and hard chunks; clip: share of wholly valid clips; motion: share of chunks that move as prompted; mse: mean
    squared template error; texture: mean variance of the colour inside the shape; steady: share of frames of continued
    chunks whose object is less than LEAP px from where it was. NaN where there is no such chunk."""
    hard = table.hard
    moved = table.leap[~np.isnan(table.leap)]
    means = {
        "hard": hard,
        "steps": table.steps,
        "steps_easy": table.steps[~hard],
        "steps_hard": table.steps[hard],
        "valid": table.valid,
        "valid_easy": table.valid[~hard],
        "valid_hard": table.valid[hard],
        "clip": table.valid.all(axis=(1, 2)),
        "motion": table.motion,
        "mse": table.fit,
        "texture": table.texture,
        "steady": moved < metrics.LEAP,
    }
    return {name: float(values.mean()) if values.size else float("nan") for name, values in means.items()}
