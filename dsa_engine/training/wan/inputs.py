"""What a joint training of real checkpoints starts from: read, and refused where it does not fit, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.checkpoints.model_folder import is_model_folder, load_model_folder
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.training.prompts import TENSOR, read_prompts

SHARED_SIZES = ("text_dim", "in_dim", "out_dim")  # of student and scores: they read the same prompts and latents


def check_name(name: str, value: str, known: Iterable[str]) -> None:
    """One of `known`; ValueError names the nearest."""
    known = tuple(known)
    if value not in known:
        near = (get_close_matches(value, known, n=1, cutoff=0.0) or known)[0]
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}; nearest is {near}")


def read_embeds(name: str, path: str | Path, config: ModelConfig) -> Tensor:
    """Embeddings [P, L, text_dim] from a file, for a model of these sizes.

    Raises FileNotFoundError, or ValueError for texts, a prompt per chunk, another width, or prompts that are too long.
    """
    embeds = read_prompts(path)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3:
        held = f"{TENSOR} {list(embeds.shape)}" if isinstance(embeds, Tensor) else f"{len(embeds)} texts"
        raise ValueError(
            f"{name}={path}: holds {held}; must be a .safetensors file with {TENSOR} [P, L, text_dim], one for a clip"
        )
    length, width = embeds.shape[1:]
    if width != config.text_dim or length > config.text_len:
        raise ValueError(
            f"{name}={path}: {TENSOR} {list(embeds.shape)}: must be [P, L, {config.text_dim}] with L at most "
            f"{config.text_len}, as the student has text_dim={config.text_dim}; nearest is "
            f"[{len(embeds)}, {min(length, config.text_len)}, {config.text_dim}]"
        )
    return embeds


def load_scores(
    teacher: str | Path, critic: str | Path | None, student: str | Path, config: ModelConfig
) -> tuple[CausalDiT, CausalDiT]:
    """(the real score in bfloat16, frozen; the fake score in float32, trained) on the CPU.

    critic: None for a copy of the teacher. Raises ValueError where one reads other prompts or latents than the student.
    """
    real = _load(teacher, "teacher", student, config)
    fake = copy.deepcopy(real) if critic is None else _load(critic, "critic", student, config)
    return real.to(torch.bfloat16).requires_grad_(False), fake.requires_grad_(True)


def _load(path: str | Path, name: str, student: str | Path, config: ModelConfig) -> CausalDiT:
    folder = is_model_folder(Path(path))
    dit = load_model_folder(Path(path), "cpu", torch.float32).dit if folder else load_dit(path)
    for size in SHARED_SIZES:
        own, needed = getattr(dit.config, size), getattr(config, size)
        if own != needed:
            raise ValueError(
                f"{name}={path}: {size}={own}: must be that of the student {student}, which reads the same prompts and "
                f"latents; nearest is {size}={needed}"
            )
    return dit


def without_parts(model: str | Path) -> dict[str, Any]:
    """Options of `Pipeline.from_pretrained` that leave a checkpoint's VAE and text encoder unread."""
    whole = str(model) in shipped_models() or is_model_folder(Path(model))
    return {} if whole else {"vae": False, "text": False}


def check_rollout(rollout: RolloutConfig, chunks: int) -> None:
    """Raises ValueError for a rollout that the pass with gradients cannot repeat.

    It commits clean latents and sees whole chunks of the past and no sink.
    """
    size, frames = rollout.chunk_frames, chunks * rollout.chunk_frames
    if rollout.commit != "clean":
        raise ValueError(f"commit={rollout.commit!r}: must be clean in training; nearest is clean")
    if rollout.window is None or rollout.window >= frames:
        return
    if rollout.window % size:
        raise ValueError(
            f"window={rollout.window}: must be a multiple of the chunk's {size} frames in training; nearest is "
            f"{max(1, round(rollout.window / size)) * size}"
        )
    if rollout.sink:
        raise ValueError(
            f"sink={rollout.sink} with window={rollout.window}: a clip of {frames} latent frames outgrows the window, "
            f"and training sees no sink; nearest is sink=0, or window={frames}"
        )
