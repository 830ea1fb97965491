"""Device memory of a joint training (`training.wan.joint`), predicted per process.

Constants are bytes per token and element of a dimension, read off the package's own passes in bfloat16 with attention
as kernels do it; `tests/models/test_training_memory.py` counts them again. An estimate: allocator rounding, NCCL's
buffers and the optimizer's temporaries are in `CUDA_CONTEXT_BYTES` at most. Nothing was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dsa_engine.config import PRESETS, ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.memory_estimate import CUDA_CONTEXT_BYTES

PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class JointWorkload:
    """What a process trains on: clips of `chunks` chunks of `chunk_frames` latent frames, height x width latent pixels.

    whole: teacher and critic see the clip at once; else they are causal, in passes as the student's.
    """

    chunks: int = 7
    chunk_frames: int = 3
    height: int = 60
    width: int = 104
    clips: int = 1  # at a time
    whole: bool = True

    @property
    def frames(self) -> int:
        return self.clips * self.chunks * self.chunk_frames


@dataclass(frozen=True)
class PassBytes:
    """Of one pass with gradients: saved for the backward, and the peak of work beside it."""

    saved: int
    work: int


def pass_bytes(model: ModelConfig, load: JointWorkload, whole: bool, checkpointing: bool) -> PassBytes:
    """A pass with gradients over the clips, T tokens of F frames with P prompt rows of L tokens.

    A causal pass has a clean copy of the clip beside the noisy one (T and F twice, P = 2 chunks a clip) and sees K =
    `chunks` chunks of keys; one over the whole clip has P = 1 and K = 1. With d = dim, in bytes:
        saved without checkpointing: layers (T (68 d + 4 ffn + 4 K d) + 24 F d + 18 P L d)
        saved with it: layers (4.3 T d + 24 F d + 18 P L d)
        work: T (96 d + 5 ffn + 4 K d) with it, one block at a time and its gradients; T (36 d + 5 ffn) without
    """
    copies = 1 if whole else 2
    keys = 1 if whole else load.chunks
    tokens = copies * load.frames * model.tokens_per_frame(load.height, load.width)
    prompts = load.clips * (1 if whole else 2 * load.chunks) * model.text_len
    dim, ffn = model.dim, model.ffn_dim
    per_token = 4.3 * dim if checkpointing else 68 * dim + 4 * ffn + 4 * keys * dim
    saved = model.num_layers * (tokens * per_token + 24 * copies * load.frames * dim + 18 * prompts * dim)
    work = tokens * (96 * dim + 5 * ffn + 4 * keys * dim if checkpointing else 36 * dim + 5 * ffn)
    return PassBytes(round(saved), round(work))


def score_bytes(model: ModelConfig, load: JointWorkload) -> int:
    """A pass without gradients: T (22 d + 2.7 ffn + 4 K d) + layers (24 F d + 8 P L d), as in `pass_bytes`."""
    copies, keys = (1, 1) if load.whole else (2, load.chunks)
    tokens = copies * load.frames * model.tokens_per_frame(load.height, load.width)
    prompts = load.clips * (1 if load.whole else 2 * load.chunks) * model.text_len
    per_layer = 24 * copies * load.frames + 8 * prompts
    return round(
        tokens * ((22 + 4 * keys) * model.dim + 2.7 * model.ffn_dim) + model.num_layers * per_layer * model.dim
    )


@cache
def parts(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters: all, the largest part that FSDP gathers on its own, and what blocks share, which it gathers once."""
    with torch.device("meta"):
        dit = CausalDiT(model)
    every = sum(p.numel() for p in dit.parameters())
    pieces = [piece for block in dit.blocks for piece in (block.self_attn, block.cross_attn, block.ffn)]
    counts = [sum(p.numel() for p in piece.parameters()) for piece in pieces]
    return every, max(counts), every - sum(counts)


def predict_joint(
    student: ModelConfig,
    teacher: ModelConfig,
    critic: ModelConfig,
    load: JointWorkload,
    processes: int,
    checkpointing: bool = True,
) -> dict[str, int]:
    """Bytes of one process; `peak` is the sum of the others.

    Of n processes each holds 1/n of: weights 4 P (student, critic), 2 P (teacher, bfloat16); gradients 4 P, optimizer
    8 P and EMA 4 P (student only) in float32. Whole in each: `actor`, 2 P, the student that rolls out. `gathered`: of a
    network in use what blocks share and two parts in bfloat16, in the backward with gradients in bfloat16 and float32.
    The largest of three phases that follow one another counts as `activations`, with `kv_cache` in the first:
        rollout: keys and values of the clips, 2 x layers x T x dim in bfloat16;
        critic: its pass with gradients;
        student: what its pass saves, beside the larger of its backward and a score.
    """
    counts = {name: parts(model)[0] for name, model in {"s": student, "t": teacher, "c": critic}.items()}
    trained = counts["s"] + counts["c"]
    tokens = load.frames * student.tokens_per_frame(load.height, load.width)
    cache_bytes = 2 * 2 * student.num_layers * student.dim * tokens
    own = pass_bytes(student, load, False, checkpointing)
    fake = pass_bytes(critic, load, load.whole, checkpointing)
    scores = max(score_bytes(model, load) for model in (teacher, critic))
    update = max(fake.saved + fake.work, own.saved + max(own.work, scores))
    used = (parts(model) for model in (student, teacher, critic))
    facts = {
        "cuda_context": CUDA_CONTEXT_BYTES,
        "weights": (4 * trained + 2 * counts["t"]) // processes,
        "gradients": 4 * trained // processes,
        "optimizer": 8 * trained // processes,
        "ema": 4 * counts["s"] // processes,
        "actor": 2 * counts["s"],
        "gathered": max((2 + 2 + 4) * (shared + 2 * largest) for _, largest, shared in used),
        "kv_cache": cache_bytes if cache_bytes > update else 0,
        "activations": 0 if cache_bytes > update else update,
    }
    return {**facts, "peak": sum(facts.values())}


def report(student: ModelConfig, load: JointWorkload | None = None, teachers: Sequence[str] = ()) -> dict[str, Any]:
    """Tables for people and JSON: by teacher (and critic), number of processes and gradient checkpointing.

    With a teacher larger than the student also for a critic of the student's size, as in Self-Forcing.
    """
    load = load or JointWorkload()
    facts: dict[str, Any] = {}
    for name in teachers or [name for name in PRESETS if name.startswith("wan")]:
        teacher = PRESETS[name]
        critics = {"its own size": teacher}
        if parts(teacher)[0] > parts(student)[0]:
            critics["the student's size"] = student
        for said, critic in critics.items():
            rows = {}
            for n in PROCESSES:
                row = predict_joint(student, teacher, critic, load, n)
                plain = predict_joint(student, teacher, critic, load, n, checkpointing=False)["peak"]
                rows[f"{n} process{'es' * (n > 1)}"] = {**row, "peak_without_checkpointing": plain}
            facts[f"teacher {name}, critic of {said}"] = rows
    return facts
