"""Rolls out a pipeline on held-out clips of the synthetic world, many at a time, and scores the frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsa_engine import metrics, synthetic
from dsa_engine.engine.session import to_uint8
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.policy import Policy


@dataclass(frozen=True)
class Rolled:
    """frames uint8 [B, T, H, W, 3]; steps [B, N]; confidence [B, N, F] of the exit step."""

    frames: np.ndarray
    steps: np.ndarray
    confidence: np.ndarray


def held_out(clips: int, chunks: int = 4, seed: int = 987_654_321, **odds) -> list[list[synthetic.Caption]]:
    """Captions per chunk of clips that no training pool draws."""
    rng = np.random.default_rng(seed)
    return [list(synthetic.sample_captions(rng, chunks, **odds)) for _ in range(clips)]


def roll(
    pipe: Pipeline, captions: Sequence[Sequence[synthetic.Caption]], policy: Policy, seed: int = 0,
    recache: bool = True, on_step: Callable[[Step], None] | None = None,
) -> Rolled:  # fmt: skip
    """One clip per list of captions (one a chunk, all lists alike in length), switching prompts as a session would."""
    engine, config = pipe.engine, pipe.config
    texts = [engine.encode([str(clip[i]) for clip in captions]) for i in range(len(captions[0]))]
    rollout = engine.rollout(
        texts[0], height=synthetic.SIZE // 8, width=synthetic.SIZE // 8, frames=len(texts) * config.chunk_frames,
        policy=policy, seeds=range(seed, seed + len(captions)), config=config,
    )  # fmt: skip
    chunks = []
    for i, text in enumerate(texts):
        if i and any(clip[i] != clip[i - 1] for clip in captions):
            rollout.switch(engine.text_kv(text), recache)
        chunks.append(rollout.denoise(on_step))
        rollout.accept(chunks[-1].latents)
    with torch.inference_mode():
        pixels, _ = engine.decoder.decode(torch.cat([c.latents for c in chunks], dim=1), None)
    certain = [c.confidence if c.confidence is not None else torch.full(c.latents.shape[:2], torch.nan) for c in chunks]
    return Rolled(
        frames=to_uint8(pixels),
        steps=np.array([c.steps for c in chunks]).T,
        confidence=torch.stack(certain, dim=1).numpy(),
    )


def quality(captions: Sequence[Sequence[synthetic.Caption]], rolled: Rolled) -> dict[str, float]:
    """hard: share of hard chunks; valid: share of good frames, also by easy and hard chunks; clip: share of wholly
    valid clips; motion: share of chunks that move as told; steps: mean count a chunk, also by easy and hard."""
    per_chunk = rolled.frames.shape[1] // len(captions[0])
    valid, motion, hard = [], [], []
    for clip, frames in zip(captions, rolled.frames):
        scores = metrics.score(frames, [c for c in clip for _ in range(per_chunk)], per_chunk)
        valid.append(scores.valid.reshape(len(clip), per_chunk))
        motion.append(scores.motion)
        events = synthetic.events_of(clip)
        hard.append([e in ("first", "cut") or c.motion == "jumping" for e, c in zip(events, clip)])
    valid, motion, hard = (np.array(x) for x in (valid, motion, hard))
    return {
        "hard": hard.mean(),
        "steps": rolled.steps.mean(),
        "steps_easy": rolled.steps[~hard].mean(),
        "steps_hard": rolled.steps[hard].mean(),
        "valid": valid.mean(),
        "valid_easy": valid[~hard].mean(),
        "valid_hard": valid[hard].mean(),
        "clip": valid.all(axis=(1, 2)).mean(),
        "motion": motion.mean(),
    }
