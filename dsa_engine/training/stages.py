"""The stages that make the shipped small model, each from what the previous one left in the run's folder.

    dsa-engine train --recipe all --config shapes --out runs

`codec` -> `teacher` -> `student` (control), `joint` (our objective) or `paper` (the paper's) -> `head`,
which writes the model folder.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dsa_engine.checkpoints.model_folder import save_head, save_model_folder
from dsa_engine.checkpoints.tensor_io import write_tensors
from dsa_engine.config import ModelConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.evaluation.rollouts import BATCH_CLIPS, EvalRollouts, held_out, roll_out, roll_out_teacher
from dsa_engine.media.report import write_sheet
from dsa_engine.models.confidence import HEADS, ConfidenceHead, new_head
from dsa_engine.models.dit import CausalDiT
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import Fixed
from dsa_engine.shapes import world
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.training import calibrate, pixel_codec
from dsa_engine.training.attenuation import JOINT, PAPER
from dsa_engine.training.csv_log import CsvLog
from dsa_engine.training.flow import flow_loss
from dsa_engine.training.head import draw_head, fit_head, measure, set_thresholds, untrained_head
from dsa_engine.training.head_dataset import collect
from dsa_engine.training.init_weights import init_weights
from dsa_engine.training.recipe import Recipe
from dsa_engine.training.student import StudentLosses
from dsa_engine.training.teacher_forcing import teacher_forced
from dsa_engine.training.trainer import LOG_EVERY, Optimized, Trainer, batches, lr_warmup, rank, world_size

HEAD_SEED, SHEET_SEED = 246_813_579, 86_420  # of prompts; training pools and held-out clips use others
JOINTLY_TRAINED = {"joint": "confidence", "refine": "refine"}  # heads by their name in a student's weights
CHUNKS = 4  # of a training clip
HEAD_RATE = 1e-3  # of the heads while the student trains
SAVE_EVERY = {"teacher": 500, "student": 100, "joint": 100, "paper": 100}  # steps
SHEET_STEPS = 16  # of the teacher, for its contact sheet
PER_POOL = 2000  # steps until a pool of clips is drawn anew
# How an object without a past moves is learned last: more cuts, and little of what does not move. The prompt says all
# of this, so it changes how often a case is seen and not what is right in it.
FOCUS = {"cut": 0.4, "weights": {"still": 0.05, "sideways": 0.35, "vertical": 0.35, "diagonal": 0.2, "jumping": 0.05}}
SHOWN = held_out(8, chunks=CHUNKS, seed=SHEET_SEED)
VIDEO: dict[str, Any] = {"height": world.SIZE, "width": world.SIZE, "frames": 48, "fps": 12.0}


@dataclass(frozen=True)
class StageContext:
    """What a stage runs with. Every stage writes under out/<stage> and goes on from the checkpoint it finds there."""

    recipe: Recipe
    out: Path
    device: torch.device = torch.device("cpu")
    compiled: bool = True
    head: str = "pooled"  # the form of the head that `joint` and `paper` train
    student: str = "joint"  # whose heads `head` fits: a stage's folder

    @property
    def past_chunks(self) -> int:
        """Past chunks in the window."""
        return self.recipe.rollout.window // self.recipe.rollout.chunk_frames - 1


def weights_of(ctx: StageContext, folder: str) -> Path:
    """The weights that a stage has left in its folder; FileNotFoundError names the stage that writes them."""
    path = ctx.out / folder / "weights.safetensors"
    if not path.exists():
        stage, _, head = folder.partition("-")
        recipe = f"{stage} --head {head}" if head else stage
        raise FileNotFoundError(f"{path} is not there yet; `dsa-engine train --recipe {recipe}` writes it")
    return path


def load_codec(ctx: StageContext) -> PixelCodec:
    codec = PixelCodec()
    codec.load_state_dict(load_file(weights_of(ctx, "codec")))
    return codec.requires_grad_(False).eval()


def new_generator(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    config = ModelConfig.preset("shapes")
    return nn.ModuleDict({"dit": init_weights(CausalDiT(config)), "text": SlotTextEncoder(config.text_dim)})


def load_teacher(ctx: StageContext) -> nn.ModuleDict:
    """The teacher's averaged weights."""
    teacher = new_generator(0)
    teacher.load_state_dict(load_file(weights_of(ctx, "teacher")))
    return teacher.requires_grad_(False).to(ctx.device)


@torch.no_grad()
def latent_pool(codec: PixelCodec, seed: int, chunk: int, clips: int, **odds) -> tuple[Tensor, Tensor]:
    """Encoded random clips: latents [n, N, F, C, H, W] float16, tokens [n, N, 4]; F = chunk; odds: of
    `world.sample_captions`."""
    rng = np.random.default_rng(seed)
    latents, tokens = [], []
    for done in range(0, clips, 256):
        frames, token = world.sample_clips(rng, min(256, clips - done), CHUNKS, chunk, **odds)
        pixels = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
        latents.append(codec.encode(pixels).half().unflatten(1, (CHUNKS, chunk)))
        tokens.append(torch.from_numpy(token))
    return torch.cat(latents), torch.cat(tokens)


def training_clips(
    ctx: StageContext, codec: PixelCodec, batch: int, start: int, offset: int = 0, focus: float = math.inf
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each step's clips: latents float32 [b, N, F, C, H, W] and tokens [b, N, 4].

    Pools that begin at step `focus` or later have the odds FOCUS.
    """
    processes, recipe = world_size(), ctx.recipe
    if batch % processes:
        nearest = -(-batch // processes)
        raise ValueError(f"batch={batch}: must be a multiple of {processes} processes; nearest is {nearest}")

    def pool(index: int) -> tuple[Tensor, ...]:
        seed = 1_000_000 * recipe.seed + offset + 1000 * index + rank()
        odds = FOCUS if index * PER_POOL >= focus else {}
        return latent_pool(codec, seed, recipe.rollout.chunk_frames, recipe.pool, **odds)

    for latents, tokens in batches(pool, batch // processes, PER_POOL, start):
        yield latents.float().to(ctx.device), tokens


def run_trainer(
    ctx: StageContext,
    stage: str,
    trainer: Trainer,
    codec: PixelCodec,
    text: SlotTextEncoder,
    prepare: Callable[[torch.Generator], tuple],
    preview: Callable[[Pipeline], EvalRollouts],
    preview_steps: str,
    report: Callable[[], dict[str, float]] = dict,
) -> dict[str, float]:
    """Train to the end and write the model folder of the averaged weights; returns the last row of the log.

    With each checkpoint go the averaged weights and a contact sheet of them, always of the same prompts and noise.
    """
    ema: Any = trainer.main.ema
    rollout, folder = ctx.recipe.rollout, trainer.folder
    labels = [" / ".join(dict.fromkeys(map(str, clip))) for clip in SHOWN]

    def on_save() -> None:
        write_tensors(folder / "weights.safetensors", ema.state_dict())
        pipe = Pipeline(Engine(ema["dit"], None, codec, text, rollout), name=ctx.recipe.name, **VIDEO)
        title = f"{stage}, {preview_steps}, after {trainer.main.step} training steps"
        write_sheet(folder / "sheet.png", preview(pipe).frames, labels, title)

    trainer.run(prepare, SAVE_EVERY[stage.partition("-")[0]], stage, report, on_save)
    if rank() > 0:
        return {}
    modules = {"generator": ema["dit"], "codec": codec, "text": text}
    save_model_folder(folder / "model", f"{ctx.recipe.name}-{stage}", modules, rollout, VIDEO)
    return trainer.log.rows[-1]


def train_codec(ctx: StageContext) -> dict[str, float]:
    """A frame to latents and back. Runs in one go: minutes."""
    path = ctx.out / "codec" / "weights.safetensors"
    if path.exists():
        codec = load_codec(ctx)
    else:
        log, start, losses = CsvLog(path.parent), time.perf_counter(), []

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            if (step + 1) % LOG_EVERY == 0:
                seconds = round(time.perf_counter() - start, 1)
                log.add({"step": step + 1, "loss": sum(losses) / len(losses), "seconds": seconds})
                losses.clear()

        codec, _ = pixel_codec.train_codec(ctx.recipe.codec.steps, ctx.recipe.seed, ctx.device, on_step)
        write_tensors(path, codec.state_dict())
        log.plot("codec")
    return {"psnr_db": round(pixel_codec.held_out_psnr(codec), 2)}


def train_teacher(ctx: StageContext) -> dict[str, float]:
    """Flow matching with teacher forcing, from random weights."""
    stage, codec = ctx.recipe.teacher, load_codec(ctx)
    model: Any = new_generator(ctx.recipe.seed).to(ctx.device)
    dit, text, weight = model["dit"], model["text"], stage.motion_weight
    forward = torch.compile(teacher_forced, dynamic=False) if ctx.compiled else teacher_forced

    def loss(latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        with torch.autocast(ctx.device.type, torch.bfloat16):
            return flow_loss(dit, text, latents, tokens, ctx.past_chunks, generator, weight, forward)

    main = Optimized(model, loss, stage.steps, stage.rate, stage.muon)
    averaged: Any = main.ema
    trainer = Trainer(main, ctx.out / "teacher", ctx.recipe.seed)
    trainer.resume()
    clips = training_clips(ctx, codec, stage.batch, main.step, focus=stage.focus * stage.steps)
    return run_trainer(
        ctx,
        "teacher",
        trainer,
        codec,
        averaged["text"],
        prepare=lambda generator: (*next(clips), generator),
        preview=lambda pipe: roll_out_teacher(pipe, SHOWN, SHEET_STEPS),
        preview_steps=f"{SHEET_STEPS} Euler steps",
    )


def train_student(ctx: StageContext, kind: str = "joint") -> dict[str, float]:
    """DMD from the teacher: `joint` with the confidence head's attenuation, `student` without it, all else alike;
    `paper` with the paper's objective and updates. With a head of another form than `pooled` the folder is named so."""
    stage = ctx.recipe.paper if kind == "paper" else ctx.recipe.student
    rollout, codec = ctx.recipe.rollout, load_codec(ctx)
    teacher: Any = load_teacher(ctx)
    torch.manual_seed(ctx.recipe.seed)
    model = nn.ModuleDict({"dit": copy.deepcopy(teacher["dit"]).requires_grad_(True)})
    if kind != "paper":
        model["refine"] = new_head(teacher["dit"].config)
    if kind != "student":
        model["confidence"] = new_head(teacher["dit"].config, ctx.head)
        kind = kind if ctx.head == "pooled" else f"{kind}-{ctx.head}"
    model.to(ctx.device)
    losses = StudentLosses(
        teacher["dit"],
        teacher["text"].null(1),
        model,
        rollout,
        ctx.past_chunks,
        (world.SIZE // codec.spatial_stride,) * 2,
        stage.guidance,
        stage.motion_weight,
        ctx.compiled,
        objective=PAPER if stage is ctx.recipe.paper else JOINT,
    )
    options: dict[str, Any] = {"betas": (0.0, 0.99), "ema_decay": 0.995, "lr_factor": lr_warmup}
    rates = {name: stage.rate if name == "dit" else HEAD_RATE for name in model}
    student = Optimized(model, losses.student_loss, stage.steps, rates, **options)
    critic_steps = stage.critic_steps * stage.steps
    critic = Optimized(losses.critic, losses.critic_loss, critic_steps, stage.critic_rate, **options)
    trainer = Trainer(student, ctx.out / kind, ctx.recipe.seed, {"critic": critic, "norm": losses.norm})
    trainer.resume()
    clips = training_clips(ctx, codec, stage.batch, student.step, offset=500_000, focus=0)

    def prepare(generator: torch.Generator) -> tuple:
        latents, tokens = next(clips)
        rolled = losses.rollout(teacher["text"].table(tokens), generator)
        for _ in range(stage.critic_steps):  # the critic must keep up with the student
            critic.update(rolled, generator)
        return rolled, latents, generator

    return run_trainer(
        ctx,
        kind,
        trainer,
        codec,
        teacher["text"],
        prepare,
        preview=lambda pipe: roll_out(pipe, SHOWN, Fixed(pipe.max_steps)),
        preview_steps=f"{len(rollout.steps)} steps",
        report=lambda: losses.report,
    )


def fit_heads(ctx: StageContext) -> dict[str, Any]:
    """Heads for a frozen student, calibrated alike, and the model folder with one of them.

    `joint` was trained with the generator, `refine` learned self-refinement beside it, where the student's stage trains
    them; `fitted-pooled` and `fitted-token` learn self-refinement now, on rollouts of the frozen generator.
    `head/<kind>.safetensors` holds each; the folder `model` has the one that the recipe names. Of another student than
    `joint` the folders are `head-<student>` and `model-<student>`.
    """
    stage, codec = ctx.recipe.head, load_codec(ctx)
    teacher: Any = load_teacher(ctx)
    weights = load_file(weights_of(ctx, ctx.student))
    teacher["dit"].load_state_dict(part(weights, "dit"))
    suffix = "" if ctx.student == "joint" else f"-{ctx.student}"
    folder, modules = ctx.out / f"model{suffix}", {"generator": teacher["dit"], "codec": codec, "text": teacher["text"]}
    save_model_folder(folder, ctx.recipe.name, modules, ctx.recipe.rollout, VIDEO)
    pipe = Pipeline.from_pretrained(folder, device=ctx.device)  # heads are for the weights as they ship, rounded
    captions = held_out(stage.clips + stage.calibration_clips, chunks=CHUNKS, seed=HEAD_SEED)
    facts: dict[str, Any] = {}
    for form in HEADS:
        fresh = untrained_head(pipe, ctx.recipe.seed, form)
        dataset = collect(pipe, captions, batch=BATCH_CLIPS, seed=HEAD_SEED, head=fresh)
        fitted, other = dataset[: stage.clips], dataset[stage.clips :]
        for kind, head in {**trained_heads(pipe, weights, form), f"fitted-{form}": fresh}.items():
            pipe.engine.head = head
            if head is fresh:
                fit_head(pipe, fitted, other, stage.iterations, ctx.recipe.seed)
            table, by_step = set_thresholds(pipe, other), calibrate.confidence_by_step(head, other)
            fit, presets = measure(head, fitted, other), pipe.config.presets
            facts[kind] = {
                "spearman": fit.spearman,
                "spearman_by_step": fit.spearman_by_step,
                "presets": presets,
                "median_confidence_by_step": np.median(by_step, axis=0).round(3).tolist(),
            }
            path = ctx.out / f"head{suffix}" / f"{kind}.safetensors"
            save_head(path, head, pipe.engine.dit.config, pipe.config, pipe.calibration)
            draw_head(path.with_suffix(".png"), table, by_step, presets)
            if kind == stage.kind:
                shipped = {**modules, "confidence": head}
                save_model_folder(folder, ctx.recipe.name, shipped, pipe.config, VIDEO, calibration=pipe.calibration)
    return facts


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one child module, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def trained_heads(pipe: Pipeline, weights: dict[str, Tensor], form: str) -> dict[str, ConfidenceHead]:
    """The heads of a form that were trained with the student, rounded as they ship."""
    heads = {}
    for kind, child in JOINTLY_TRAINED.items():
        state = part(weights, child)
        if state and form == ("token" if "token" in state else "pooled"):
            head = new_head(pipe.engine.dit.config, form)
            head.load_state_dict(state)
            heads[kind] = head.half().float().to(pipe.device).requires_grad_(False).eval()
    return heads
