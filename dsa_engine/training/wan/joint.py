"""A causal student distilled from real checkpoints, with its confidence head in the objective; prompts alone, no video.

    dsa-engine train --recipe joint --model STUDENT --teacher TEACHER --prompts EMBEDS --out runs/wan
    torchrun --nproc-per-node 8 -m dsa_engine train --recipe joint ...

Four networks: the student (from `model`), the real score (the frozen teacher), the fake score or critic (from the
teacher), and the head. Weights, gradients, optimizer states and EMA are spread over the processes (FSDP2) and used in
bfloat16; each process also has the whole student in bfloat16, which rolls out as inference does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine import pipeline_inputs
from dsa_engine.checkpoints.convert import save_like
from dsa_engine.checkpoints.model_folder import save_head
from dsa_engine.checks import check_int
from dsa_engine.config import RolloutConfig, nearest
from dsa_engine.models.confidence import HEADS, new_head
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.memory_estimate import free_bytes
from dsa_engine.models.training_memory import JointWorkload, predict_joint
from dsa_engine.pipeline import Pipeline
from dsa_engine.training.attenuation import JOINT, PAPER
from dsa_engine.training.head_dataset import num_chunks
from dsa_engine.training.recipe import Recipe
from dsa_engine.training.student import StudentLosses
from dsa_engine.training.teacher_forcing import teacher_forced, whole_clip
from dsa_engine.training.trainer import Optimized, Trainer, batches, lr_warmup, rank, world_size
from dsa_engine.training.wan import inputs, sharding

HEAD_RATE = 1e-4
SCORES = {"bidirectional": whole_clip, "causal": teacher_forced}
OBJECTIVES = {"joint": JOINT, "paper": PAPER}


@dataclass(frozen=True)
class JointRun:
    """What the four networks are made of, and how. None leaves a value to the model or to its default.

    Args:
        model: what the student begins as, a checkpoint of the Wan family in any dialect.
        teacher: the real score, likewise.
        prompts: a file of embeddings, see `read_prompts`.
        out: the run's folder.
        objective: of the head and the student, one of OBJECTIVES.
        critic: what the fake score begins as; None: the teacher.
        null: a file of the empty prompt's embedding; None: zeros.
        head: the form of the head, one of HEADS.
        score: how teacher and critic attend, one of SCORES.
        family: of the student, as for `Pipeline.from_pretrained`.
        frames: pixel frames of a rollout.
        height: pixels of a rollout.
        width: pixels of a rollout.
        window: latent frames of the student's KV cache, the chunk included.
        sink: latent frames that stay in the cache for ever.
        shift: of the noise schedule.
        checkpointing: of gradients; None: where a GPU's memory asks for it.
        save_every: steps between checkpoints.
    """

    model: str | Path
    teacher: str | Path
    prompts: str | Path
    out: Path
    objective: str = "joint"
    critic: str | Path | None = None
    null: str | Path | None = None
    head: str = "pooled"
    score: str = "bidirectional"
    family: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    window: int | None = None
    sink: int | None = None
    shift: float | None = None
    checkpointing: bool | None = None
    save_every: int = 50


def train_joint(run: JointRun, plan: Recipe, device: torch.device) -> dict[str, Any]:
    """Distil, from where `run.out` was left; all processes of the group call it.

    Written to `run.out`: checkpoint.pt, log.csv and log.png while it runs; at the end `head.safetensors`, not yet
    calibrated, and the folder `<family>-<objective>`, the averaged student in the names of `run.model`.

    Returns:
        The last row of the log and what was written; of process 0, the others get {}.

    Raises:
        ValueError: for files and values that do not fit together, each named.
    """
    inputs.check_name("head", run.head, HEADS)
    inputs.check_name("score", run.score, SCORES)
    inputs.check_name("objective", run.objective, OBJECTIVES)
    check_int("save_every", run.save_every)
    stage, processes = plan.student, world_size()
    if stage.batch % processes:
        near = nearest(stage.batch, processes)
        raise ValueError(f"batch={stage.batch}: must be a multiple of {processes} processes; nearest is {near}")
    pipe = Pipeline.from_pretrained(
        run.model,
        device="cpu",
        dtype=torch.float32,
        family=run.family,
        window=run.window,
        sink=run.sink,
        shift=run.shift,
        **inputs.without_parts(run.model),
    )
    dit, rollout = pipe.engine.dit, pipe.config
    config = dit.config
    embeds = inputs.read_embeds("prompts", run.prompts, config)
    null = torch.zeros(1, 1, config.text_dim)
    if run.null is not None:
        null = inputs.read_embeds("null_prompt", run.null, config)[:1].float()
    chunks = num_chunks(pipe, run.frames)
    inputs.check_rollout(rollout, chunks)
    size = pipeline_inputs.latent_size(pipe.engine, run.height or pipe.height, run.width or pipe.width)
    teacher, critic = inputs.load_scores(run.teacher, run.critic, run.model, config)

    torch.manual_seed(plan.seed)
    model = nn.ModuleDict({"dit": dit.requires_grad_(True), "confidence": new_head(config, run.head)})
    checkpointing = run.checkpointing
    if checkpointing is None and device.type == "cuda":
        load = JointWorkload(
            chunks, rollout.chunk_frames, *size, stage.batch // processes, run.score == "bidirectional"
        )
        need = predict_joint(config, teacher.config, critic.config, load, processes, checkpointing=False)["peak"]
        checkpointing = need > free_bytes(device)
    for trained in (dit, critic):
        trained.checkpointing = bool(checkpointing)
    losses = StudentLosses(
        teacher,
        null.to(device),
        model,
        rollout,
        context=min((rollout.window or chunks * rollout.chunk_frames) // rollout.chunk_frames, chunks) - 1,
        size=size,
        guidance=stage.guidance,
        motion_weight=stage.motion_weight,
        score=SCORES[run.score],
        critic=critic,
        actor=copy.deepcopy(dit).requires_grad_(False).to(device, torch.bfloat16),
        shift=rollout.shift,
        objective=OBJECTIVES[run.objective],
    )
    losses.norm.to(device)

    def shard_student(model: nn.Module) -> None:
        sharding.shard(losses.student_pass)
        sharding.shard(model["confidence"], None)

    options: dict[str, Any] = {"betas": (0.0, 0.99), "lr_factor": lr_warmup}
    rates = {"dit": stage.rate, "confidence": HEAD_RATE}
    student = Optimized(model, losses.student_loss, stage.steps, rates, ema_decay=0.99, shard=shard_student, **options)
    critic_steps, spread = stage.critic_steps * stage.steps, lambda _: sharding.shard(losses.critic_pass)
    fake = Optimized(
        critic, losses.critic_loss, critic_steps, stage.critic_rate, ema_decay=None, shard=spread, **options
    )
    sharding.shard(losses.teacher_pass)
    trainer = Trainer(student, run.out, plan.seed, {"critic": fake, "norm": losses.norm})
    trainer.resume()
    shown = batches(lambda index: (embeds,), stage.batch // processes, stage.steps, student.step)
    fake_losses: list[float] = []

    def prepare(generator: torch.Generator) -> tuple:
        (text,) = next(shown)
        text = text.float().to(device)[:, None].expand(-1, chunks, -1, -1)
        rolled = losses.rollout(text, generator)
        fake_losses[:] = [fake.update(rolled, generator) for _ in range(stage.critic_steps)]
        return rolled, None, generator

    def report() -> dict[str, float]:
        return {**losses.report, "critic": sum(fake_losses) / len(fake_losses)}

    trainer.run(prepare, run.save_every, run.objective, report)
    family = run.family or (pipe.found.family if pipe.found else None)
    return {} if rank() > 0 else write_student(run, trainer, rollout, family)


def write_student(run: JointRun, trainer: Trainer, rollout: RolloutConfig, family: str | None) -> dict[str, Any]:
    """The averaged student and its head, from the last checkpoint."""
    weights = torch.load(trainer.checkpoint, map_location="cpu", weights_only=True, mmap=True)["main"]["ema"]
    parts: dict[str, dict[str, Tensor]] = {"dit": {}, "confidence": {}}
    for name, value in weights.items():
        part, _, own = name.partition(".")
        parts[part][own] = value
    config = trainer.main.model["dit"].config
    with torch.device("meta"):
        dit, head = CausalDiT(config), new_head(config, run.head)
    for module, part in ((dit, "dit"), (head, "confidence")):
        module.load_state_dict(parts[part], assign=True)
    folder = run.out / f"{family or 'student'}-{run.objective}"  # the name says the family to who loads it
    save_like(run.model, folder, dit, rollout, family)
    save_head(run.out / "head.safetensors", head, config, rollout)
    return {**trainer.log.rows[-1], "student": str(folder), "head": str(run.out / "head.safetensors")}
