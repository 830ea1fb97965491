"""A pipeline's own rollouts with every step of the schedule: what a confidence head learns from and is measured on.

Of every frame after every step they keep what a head reads and how far the estimate is from where the remaining steps
take it. For a large model they are what costs time, so they can be kept in files, and go on after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsa_engine import pipeline_inputs
from dsa_engine.checkpoints.tensor_io import open_checkpoint, write_tensors
from dsa_engine.checks import check_min
from dsa_engine.engine.engine import Engine
from dsa_engine.evaluation.rollouts import group_by_prompt_switches
from dsa_engine.models.confidence import ConfidenceHead, PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.denoise import Step
from dsa_engine.sampling.policy import Fixed
from dsa_engine.shapes.world import Caption

FORMAT = "dsa_engine.rollouts/1"
WAN_TIME_STRIDE = 4  # pixel frames a latent frame stands for, where no decoder says otherwise

# Texts, for a pipeline with a text encoder: a prompt a clip or, as a sequence, one a chunk. Or embeddings:
# [P, L, text_dim], a prompt a clip, or [P, N, L, text_dim], one a chunk.
Text = str | Caption
Prompts: TypeAlias = Tensor | Sequence[Text | Sequence[Text]]


@dataclass(frozen=True)
class HeadDataset:
    """C clips of N chunks of F latent frames, S steps each; on the CPU.

    features [C, N, S, F, n]: what a head reads after each step (`ConfidenceHead.features`); distance [C, N, S - 1, F]:
    `refinement` after each step but the last, where it is 0.
    """

    features: Tensor
    distance: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, clips: slice | Sequence[int] | Tensor) -> HeadDataset:
        """Some of the clips."""
        return HeadDataset(self.features[clips], self.distance[clips])


def refinement(estimates: Tensor) -> Tensor:
    """d_k = mean((x_k - x_S)^2) for k < S: estimates [S, B, F, C, H, W] -> [S - 1, B, F] float32."""
    estimates = estimates.float()
    return (estimates[:-1] - estimates[-1]).square().mean(dim=(3, 4, 5))


class Recorder(nn.Module):
    """Stands in for a head during a rollout, and keeps the features that it would have read."""

    def __init__(self, head: ConfidenceHead):
        super().__init__()
        self.of, self.taps = (head,), head.taps  # in a tuple: its weights are not this module's
        self.features: list[Tensor] = []

    def forward(self, hidden: Sequence[Tensor], time: Tensor) -> Tensor:
        self.features.append(self.of[0].features(hidden, time).cpu())
        return time.new_zeros(time.shape[:2], dtype=torch.float32)


def num_chunks(pipe: Pipeline, frames: int | None = None) -> int:
    """Whole chunks in a clip of `frames` pixel frames (the model's own length), with Wan's strides if no decoder."""
    frames, decoder = pipe.frames if frames is None else frames, pipe.engine.decoder
    latent = (frames - 1) // WAN_TIME_STRIDE + 1 if decoder is None else decoder.latent_frames_of(frames)
    if latent < pipe.config.chunk_frames:
        raise ValueError(f"frames={frames}: {latent} latent frames, but a chunk has {pipe.config.chunk_frames}")
    return latent // pipe.config.chunk_frames


def collect(
    pipe: Pipeline,
    prompts: Prompts,
    *,
    chunks: int | None = None,
    size: tuple[int, int] | None = None,
    order: Sequence[int] | None = None,
    batch: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    head: ConfidenceHead | None = None,
) -> HeadDataset:
    """Roll out one clip per prompt with all steps, and keep what a head reads and how far each estimate still moves.

    Args:
        pipe: the pipeline, which needs no head.
        prompts: texts or embeddings, see `Prompts`.
        chunks: of a clip (default: the prompts', else the model's own length).
        size: latent height and width (default: the model's own).
        order: which prompt each clip shows (default: each once).
        batch: clips rolled out together, which changes the result by rounding at most.
        seed: clip i has the noise of seed + i.
        head: whose features are kept (default: the pipeline's; a new `PooledHead` where it has none).
        folder: where each batch leaves a file `features-*.safetensors`. A run that was killed goes on after the last
            of these, and ends with the same bits.

    Raises:
        ValueError: for prompts and sizes that do not fit, or a file of other rollouts.
        FloatingPointError: where the model gives values that are not finite.
    """
    if pipe.max_steps < 2:
        raise ValueError(f"steps={list(pipe.config.steps)}: nothing to allocate; a head needs at least 2 steps")
    check_min("batch", batch)
    chunks = check_prompts(prompts, chunks, num_chunks(pipe))
    size = size or pipeline_inputs.latent_size(pipe.engine, pipe.height, pipe.width)
    pipe.engine.dit.config.tokens_per_frame(*size)  # raises for a size off the patch grid
    order = range(len(prompts)) if order is None else order
    shape = (len(order), chunks, pipe.max_steps, pipe.config.chunk_frames)
    head = head or pipe.engine.head or PooledHead(pipe.engine.dit.config)
    features: Tensor | None = None
    distance = torch.empty(*shape[:2], pipe.max_steps - 1, shape[3])
    model = fingerprint(pipe.engine.dit) if folder is not None else ""
    batches = group_by_prompt_switches([_switches(prompts[row], chunks) for row in order], batch)
    with tqdm(total=len(order), desc="rollouts", unit="clip") as bar:
        for index, clips in enumerate(batches):
            shown, seeds = _select(prompts, [order[i] for i in clips]), [(seed + i) % 2**64 for i in clips]
            path = Path(folder) / f"features-{index:05d}.safetensors" if folder else None
            about = {"format": FORMAT, "model": model, **_about(pipe, head, shown, chunks, seeds, size)} if path else {}
            if path and path.exists():
                part = _read(path, about)
            else:
                part = record_batch(pipe, head, _by_chunk(shown, chunks), seeds, size)
                if not (part.features.isfinite().all() and part.distance.isfinite().all()):
                    raise FloatingPointError(
                        f"clips {clips}: the model gives values that are not finite; check the weights, the prompt "
                        f"embeddings, or try dtype=torch.float32 instead of {pipe.engine.dit.dtype}"
                    )
                if path:
                    write_tensors(path, vars(part), about)
            if features is None:
                features = part.features.new_empty(*shape, part.features.shape[-1])
            features[clips], distance[clips] = part.features, part.distance
            bar.update(len(clips))
    return HeadDataset(features, distance)


def record_batch(
    pipe: Pipeline,
    head: ConfidenceHead,
    prompts: Tensor | list[list[str]],
    seeds: Sequence[int],
    size: tuple[int, int],
) -> HeadDataset:
    """A batch of clips that switch prompts at the same chunks, as sessions would; all steps for every chunk.

    head: whose features are kept; prompts: embeddings [B, N, L, text_dim], or texts by clip and chunk; size: latent
    height and width.
    """
    engine, config, chunks = pipe.engine, pipe.config, len(prompts[0])
    recorder = Recorder(head)
    rollout = engine.rollout(
        _embeds(engine, prompts, 0),
        height=size[0],
        width=size[1],
        frames=chunks * config.chunk_frames,
        policy=Fixed(pipe.max_steps),
        seeds=seeds,
        config=config,
        head=recorder,
    )
    distance, switches = [], _switches(prompts[0], chunks)
    for i in range(chunks):
        if switches[i]:
            rollout.set_prompt(engine.text_kv(_embeds(engine, prompts, i)))
        seen: list[Step] = []
        rollout.accept(rollout.denoise(seen.append).latents)
        distance.append(refinement(torch.stack([step.x0 for step in seen])))
    features = torch.stack(recorder.features).unflatten(0, (chunks, pipe.max_steps))  # [N, S, B, F, n]
    return HeadDataset(
        features=features.permute(2, 0, 1, 3, 4).contiguous(),
        distance=torch.stack(distance).permute(2, 0, 1, 3).contiguous().cpu(),
    )


def check_prompts(prompts: Prompts, chunks: int | None, own: int) -> int:
    """How many chunks the prompts are for: `chunks`, else as many as they have, else `own`. ValueError where unlike."""
    if chunks is not None:
        check_min("chunks", chunks)
    if not len(prompts):
        raise ValueError("prompts: none given; at least 1 is needed")
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (3, 4) or 0 in prompts.shape or not prompts.is_floating_point():
            raise ValueError(
                f"prompts {prompts.dtype} {list(prompts.shape)}: must be floating-point embeddings [P, L, text_dim] "
                "or [P, chunks, L, text_dim]"
            )
        lengths = {prompts.shape[1]} if prompts.ndim == 4 else set()
    else:
        lengths = {len(clip) for clip in prompts if not isinstance(clip, (str, Caption))}
    if chunks is not None:
        lengths.add(chunks)
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"prompts for {', '.join(map(str, sorted(lengths)))} chunks: every clip must have as many, at least 1"
        )
    return lengths.pop() if lengths else own


def _select(prompts: Prompts, rows: list[int]) -> Prompts:
    return prompts[rows] if isinstance(prompts, Tensor) else [prompts[row] for row in rows]


def _by_chunk(prompts: Prompts, chunks: int) -> Tensor | list[list[str]]:
    """Embeddings [P, N, L, text_dim] or texts by clip and chunk."""
    if isinstance(prompts, Tensor):
        return prompts if prompts.ndim == 4 else prompts[:, None].expand(-1, chunks, -1, -1)
    return [
        [str(clip)] * chunks if isinstance(clip, (str, Caption)) else [str(text) for text in clip] for clip in prompts
    ]


def _embeds(engine: Engine, prompts: Tensor | list[list[str]], chunk: int) -> Tensor:
    """[B, L, text_dim] of a chunk."""
    return prompts[:, chunk] if isinstance(prompts, Tensor) else engine.encode([clip[chunk] for clip in prompts])


def _switches(clip: Tensor | Text | Sequence[Text], chunks: int) -> tuple[bool, ...]:
    """Of each chunk of one clip: is its prompt another than the previous one?"""
    if isinstance(clip, (str, Caption)) or (isinstance(clip, Tensor) and clip.ndim == 2):  # one for all chunks
        return (False,) * chunks
    same = torch.equal if isinstance(clip, Tensor) else lambda a, b: str(a) == str(b)
    return (False, *(not same(a, b) for a, b in pairwise(clip)))


def fingerprint(dit: CausalDiT) -> str:
    """Tells weights apart by the first values of every tensor, without reading all of them."""
    digest = hashlib.sha256()
    for name, value in dit.state_dict().items():
        digest.update(name.encode() + value.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _about(
    pipe: Pipeline, head: ConfidenceHead, prompts: Prompts, chunks: int, seeds: list[int], size: tuple[int, int]
) -> dict[str, str]:
    """Everything else that a batch's features depend on, as the header of its file holds it."""
    if isinstance(prompts, Tensor):
        content = str(list(prompts.shape)).encode() + prompts.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    else:
        content = json.dumps(_by_chunk(prompts, chunks)).encode()
    names = ("chunk_frames", "window", "sink", "steps", "shift", "commit")
    return {
        "seeds": json.dumps(seeds),
        "chunks": str(chunks),
        "prompts": hashlib.sha256(content).hexdigest()[:16],
        "size": f"{size[0]}x{size[1]}",
        "dtype": str(pipe.engine.dit.dtype),
        "rollout": json.dumps({name: getattr(pipe.config, name) for name in names}),
    } | ({} if isinstance(head, PooledHead) else {"head": json.dumps(head.settings())})


def _read(path: Path, about: dict[str, str]) -> HeadDataset:
    file = open_checkpoint(path)
    for name, expected in about.items():
        if (value := file.header.get(name)) != expected:
            raise ValueError(
                f"{path}: made with {name} {value}, expected is {expected}; delete its folder to roll out anew, or "
                "go on with what it was started with"
            )
    return HeadDataset(file.tensors["features"].read(), file.tensors["distance"].read())
