"""Runs the stages of a recipe, in one process or in several under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsa_engine import pipeline_inputs
from dsa_engine.models.confidence import HEADS
from dsa_engine.pipeline import Pipeline
from dsa_engine.training import head, head_dataset, recipe, stages
from dsa_engine.training.prompts import read_prompts
from dsa_engine.training.trainer import distributed, rank
from dsa_engine.training.wan import joint
from dsa_engine.training.wan.inputs import check_name

STAGES: dict[str, Callable[[stages.StageContext], dict[str, Any]]] = {
    "codec": stages.train_codec,
    "teacher": stages.train_teacher,
    "student": partial(stages.train_student, kind="student"),
    "joint": partial(stages.train_student, kind="joint"),
    "paper": partial(stages.train_student, kind="paper"),
    "head": stages.fit_heads,
}
RECIPES = (*STAGES, "all")
ALL = ("codec", "teacher", "joint", "head")
PARALLEL = ("teacher", "student", "joint", "paper")  # the other stages run in one process, the rest waits


@contextmanager
def process_device(device: str | None, alone: bool = False) -> Iterator[torch.device]:
    """This process's device; under torchrun within the group of all processes (NCCL on GPUs, else gloo).

    alone: a process without torchrun is a group too, as sharding needs one.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={kind!r}: torch {torch.__version__} sees no CUDA device; use device='cpu'")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    joins = (several or alone) and not distributed()
    if kind == "cuda" and joins:
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(kind)
    if joins:
        store = {} if several else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo", **store)
    try:
        yield torch.device(kind)
    finally:
        if joins:
            dist.destroy_process_group()


def train(
    stage: str,
    config: str | Path = "shapes",
    out: str | Path = "runs",
    *,
    steps: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    compiled: bool = True,
    head: str = "pooled",
    student: str = "joint",
) -> dict[str, Any]:
    """Run one stage of a recipe, or all, from where its folder under `out` was left.

    Args:
        stage: one of RECIPES.
        config: a shipped recipe's name or a TOML file.
        out: the run's folder; a stage writes to `out/<stage>`, `head` also to `out/model`.
        steps: of the stage, instead of the recipe's.
        batch: clips a step over all processes, instead of the recipe's.
        seed: instead of the recipe's.
        device: cpu, cuda or cuda:N (default: cuda where there is one).
        compiled: with torch.compile.
        head: the form of the head that `joint` and `paper` train, pooled or token.
        student: whose heads the stage `head` fits, the folder of a student's stage.

    Returns:
        The recipe, and the figures of each stage by its name.

    Raises:
        ValueError: for values that do not fit.
        FileNotFoundError: where an earlier stage has not run.
    """
    if stage not in RECIPES:
        raise ValueError(f"recipe {stage!r}: must be one of {', '.join(RECIPES)}")
    if stage == "all" and (steps, batch) != (None, None):
        raise ValueError("recipe all: steps and batch belong to one stage each; write them into a TOML file")
    plan = recipe.load(config)
    if seed is not None:
        plan = recipe.with_seed(plan, seed)
    if (steps, batch) != (None, None):
        plan = plan.replace("student" if stage == "joint" else stage, steps=steps, batch=batch)
    with process_device(device) as local:
        ctx = stages.StageContext(plan, Path(out), local, compiled, head, student)
        facts: dict[str, Any] = {"recipe": stage, "config": plan.name, "seed": plan.seed, "out": str(out)}
        for name in ALL if stage == "all" else (stage,):
            facts[name] = STAGES[name](ctx) if rank() == 0 or name in PARALLEL else None
            if distributed():
                dist.barrier()
    return facts


def train_head_of(
    model: str | Path,
    out: str | Path,
    prompts: str | Path,
    *,
    kind: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    window: int | None = None,
    sink: int | None = None,
    shift: float | None = None,
    iterations: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a confidence head for a distilled checkpoint on its own rollouts, see `head.train_head`.

    Args:
        model: a checkpoint or folder, as for `Pipeline.from_pretrained`.
        out: the folder for `head.safetensors`, `head.json`, `head.png` and the rollouts.
        prompts: a file of text or embeddings, see `read_prompts`.
        kind: the form of a new head, pooled or token (default: the model's own head goes on, or a new pooled one).
        frames: pixel frames of a rollout (default: the model's own).
        height: pixels of a rollout (default: the model's own).
        width: pixels of a rollout.
        window: latent frames of the KV cache, the chunk included.
        sink: latent frames that stay in the cache for ever.
        shift: of the noise schedule.
        iterations: of the fit.
        batch: clips that are rolled out together.
        seed: of noise, split and fit.
        device: as for `train`.

    Returns:
        The report, as in `head.json`.
    """
    if kind is not None:
        check_name("head", kind, HEADS)
    texts = read_prompts(prompts)
    with Pipeline.from_pretrained(model, device=device, window=window, sink=sink, shift=shift) as pipe:
        options: dict[str, Any] = {
            name: value for name, value in {"iterations": iterations, "batch": batch}.items() if value
        }
        chunks = None if frames is None else head_dataset.num_chunks(pipe, frames)
        if kind is not None:
            pipe.engine.head = head.untrained_head(pipe, seed, kind)
        if height or width:
            options["size"] = pipeline_inputs.latent_size(pipe.engine, height or pipe.height, width or pipe.width)
        return head.train_head(pipe, texts, out, chunks=chunks, seed=seed, **options)


def train_joint_of(
    options: joint.JointRun,
    config: str | Path = "wan",
    *,
    steps: int | None = None,
    batch: int | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Distil a student with its head from real checkpoints, see `wan.joint.train_joint`.

    Args:
        options: the four networks, prompts and rollout.
        config: as for `train`; of a recipe only `[student]` and the seed are read.
        steps: instead of the recipe's.
        batch: clips a step over all processes, instead of the recipe's.
        seed: instead of the recipe's.
        device: as for `train`.

    Returns:
        The recipe's values and the last row of the log, with what was written.
    """
    plan = recipe.load(config)
    if seed is not None:
        plan = recipe.with_seed(plan, seed)
    plan = plan.replace("student", steps=steps, batch=batch)
    with process_device(device, alone=True) as local:
        made = joint.train_joint(options, plan, local)
        dist.barrier()
    return {
        "recipe": options.objective,
        "config": plan.name,
        "seed": plan.seed,
        "out": str(options.out),
        options.objective: made,
    }
