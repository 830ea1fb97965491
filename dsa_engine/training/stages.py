"""The stages that make the shipped small model, each from what the one before left in the run's folder.

    dsa-engine train --recipe all --config shapes --out runs

`codec` -> `teacher` -> `student` (control) or `joint` (DSA) -> `head`, which writes the model folder.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_engine.checkpoints.model_folder import save_head, save_model_folder
from dsa_engine.config import ModelConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.evaluation.rollouts import BATCH_CLIPS, EvalRollouts, held_out, roll_out, roll_out_teacher
from dsa_engine.files import atomic_write
from dsa_engine.media.report import write_sheet
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import Fixed
from dsa_engine.shapes import world as shapes_world
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.training import calibrate
from dsa_engine.training import head as head_stage
from dsa_engine.training import pixel_codec as codec_stage
from dsa_engine.training.csv_log import Log
from dsa_engine.training.flow import flow_loss
from dsa_engine.training.head_dataset import collect
from dsa_engine.training.init_weights import init_weights
from dsa_engine.training.recipe import Recipe
from dsa_engine.training.student import StudentLosses
from dsa_engine.training.teacher_forcing import teacher_forced
from dsa_engine.training.trainer import LOG_EVERY, Optimized, Trainer, batches, lr_warmup, rank, world_size

HEAD_SEED, CALIBRATION_SEED, SHEET_SEED = (
    246_813_579,
    123_456_789,
    86_420,
)  # of prompts; training pools and held-out clips use others
CHUNKS = 4  # of a training clip
HEAD_RATE = 1e-3  # of the heads while the student trains
SAVE_EVERY = {"teacher": 500, "student": 100, "joint": 100}  # steps
SHEET_STEPS = 16  # of the teacher, for a look at it
PER_POOL = 2000  # steps until a pool of clips is made anew
# What is learned last is how an object moves that has no past: more cuts, and little of what does not move. The prompt
# says all of this, so it changes how often a case is seen and not what is right in it.
FOCUS = {"cut": 0.4, "weights": {"still": 0.05, "sideways": 0.35, "vertical": 0.35, "diagonal": 0.2, "jumping": 0.05}}
SHOWN = held_out(8, chunks=CHUNKS, seed=SHEET_SEED)
VIDEO = {"height": shapes_world.SIZE, "width": shapes_world.SIZE, "frames": 48, "fps": 12.0}


@dataclass(frozen=True)
class StageContext:
    """What a stage runs with. Every stage writes under out/<stage> and goes on from the checkpoint it finds there."""

    recipe: Recipe
    out: Path
    device: torch.device = torch.device("cpu")
    compiled: bool = True

    @property
    def past_chunks(self) -> int:
        """Past chunks in the window."""
        return self.recipe.rollout.window // self.recipe.rollout.chunk_frames - 1


def save_tensors(path: Path, module: nn.Module) -> None:
    """A module's weights as safetensors, renamed into place."""
    with atomic_write(path) as part:
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, part)


def load_tensors(module: nn.Module, path: Path, stage: str) -> None:
    """Into a module, strictly; FileNotFoundError names the stage that writes the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there yet; `dsa-engine train --recipe {stage}` writes it")
    module.load_state_dict(load_file(path))


def load_codec(ctx: StageContext) -> PixelCodec:
    codec = PixelCodec()
    load_tensors(codec, ctx.out / "codec" / "weights.safetensors", "codec")
    return codec.requires_grad_(False).eval()


@torch.no_grad()
def latent_pool(codec: PixelCodec, seed: int, chunk: int, clips: int, **odds) -> tuple[Tensor, Tensor, Tensor]:
    """Encoded random clips: latents [n, N, F, C, H, W] float16, tokens [n, N, 4], hard [n, N]; F = chunk; odds: of
    `synthetic.sample_captions`."""
    rng = np.random.default_rng(seed)
    latents, tokens, hard = [], [], []
    for done in range(0, clips, 256):
        frames, token, is_hard, _ = shapes_world.pool(rng, min(256, clips - done), CHUNKS, chunk, **odds)
        pixels = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
        latents.append(codec.encode(pixels).half().unflatten(1, (CHUNKS, chunk)))
        tokens.append(torch.from_numpy(token))
        hard.append(torch.from_numpy(is_hard))
    return torch.cat(latents), torch.cat(tokens), torch.cat(hard)


def new_generator(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    config = ModelConfig.preset("shapes")
    return nn.ModuleDict({"dit": init_weights(CausalDiT(config)), "text": SlotTextEncoder(config.text_dim)})


def clips_of(
    ctx: StageContext, codec: PixelCodec, batch: int, start: int, offset: int = 0, focus: float = math.inf
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of each step's clips: latents float32 [b, N, F, C, H, W] and tokens [b, N, 4]. Pools that
    begin at step `focus` or later have the odds FOCUS."""
    if batch % world_size():
        raise ValueError(
            f"batch={batch}: must be a multiple of {world_size()} processes; nearest is {-(-batch // world_size())}"
        )

    def pool(index: int) -> tuple[Tensor, ...]:
        seed = 1_000_000 * ctx.recipe.seed + offset + 1000 * index + rank()
        return latent_pool(
            codec,
            seed,
            ctx.recipe.rollout.chunk_frames,
            ctx.recipe.pool,
            **(FOCUS if index * PER_POOL >= focus else {}),
        )

    for latents, tokens, _ in batches(pool, batch // world_size(), PER_POOL, start):
        yield latents.float().to(ctx.device), tokens


def train_codec(ctx: StageContext) -> dict[str, float]:
    """A frame to latents and back. Runs in one go: minutes."""
    path = ctx.out / "codec" / "weights.safetensors"
    if path.exists():
        codec = load_codec(ctx)
    else:
        log = Log(path.parent)
        start, every = time.perf_counter(), []

        def note(step: int, loss: float) -> None:
            every.append(loss)
            if (step + 1) % LOG_EVERY == 0:
                seconds = round(time.perf_counter() - start, 1)
                log.add({"step": step + 1, "loss": sum(every) / len(every), "seconds": seconds})
                every.clear()

        codec, _ = codec_stage.train_codec(ctx.recipe.codec.steps, ctx.recipe.seed, ctx.device, note)
        save_tensors(path, codec)
        log.plot("codec")
    return {"psnr_db": round(codec_stage.held_out_psnr(codec), 2)}


def train_teacher(ctx: StageContext) -> dict[str, float]:
    """Flow matching with teacher forcing, from random weights."""
    stage, codec, model = ctx.recipe.teacher, load_codec(ctx), new_generator(ctx.recipe.seed).to(ctx.device)
    forward = torch.compile(teacher_forced, dynamic=False) if ctx.compiled else teacher_forced

    def loss(latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        with torch.autocast(ctx.device.type, torch.bfloat16):
            return flow_loss(
                model["dit"], model["text"], latents, tokens, ctx.past_chunks, generator, stage.motion_weight, forward
            )

    main = Optimized(model, loss, stage.steps, stage.rate, stage.muon)
    trainer = Trainer(main, ctx.out / "teacher", ctx.recipe.seed)
    trainer.resume()
    clips = clips_of(ctx, codec, stage.batch, main.step, focus=stage.focus * stage.steps)

    def on_save() -> None:
        save_tensors(trainer.folder / "weights.safetensors", main.ema)
        pipe = pipeline(ctx, main.ema["dit"], main.ema["text"], codec)
        sheet(trainer, roll_out_teacher(pipe, SHOWN, SHEET_STEPS), f"teacher, {SHEET_STEPS} Euler steps")

    trainer.run(
        lambda generator: (*next(clips), generator), save_every=SAVE_EVERY["teacher"], note="teacher", on_save=on_save
    )
    if rank() == 0:
        modules = {"generator": main.ema["dit"], "codec": codec, "text": main.ema["text"]}
        save_model_folder(trainer.folder / "model", f"{ctx.recipe.name}-teacher", modules, ctx.recipe.rollout, VIDEO)
    return trainer.log.rows[-1] if rank() == 0 else {}


def pipeline(ctx: StageContext, dit: CausalDiT, text: SlotTextEncoder, codec: PixelCodec) -> Pipeline:
    """Modules in training as what users run."""
    return Pipeline(Engine(dit, None, codec, text, ctx.recipe.rollout), name=ctx.recipe.name, **VIDEO)


def sheet(trainer: Trainer, rolled: EvalRollouts, title: str) -> None:
    """A contact sheet of the run as it stands, always of the same prompts and noise."""
    path = trainer.folder / "sheet.png"
    labels = [" / ".join(dict.fromkeys(map(str, clip))) for clip in SHOWN]
    write_sheet(path, rolled.frames, labels, f"{title}, after {trainer.main.step} training steps")


def load_teacher(ctx: StageContext) -> nn.ModuleDict:
    """The teacher's averaged weights."""
    teacher = new_generator(0)
    load_tensors(teacher, ctx.out / "teacher" / "weights.safetensors", "teacher")
    return teacher.requires_grad_(False).to(ctx.device)


def train_student(ctx: StageContext, kind: str = "joint") -> dict[str, float]:
    """DMD from the teacher: `joint` with the confidence head's attenuation, `student` without it, all else alike."""
    stage, rollout, codec, teacher = ctx.recipe.student, ctx.recipe.rollout, load_codec(ctx), load_teacher(ctx)
    torch.manual_seed(ctx.recipe.seed)
    model = nn.ModuleDict({"dit": copy.deepcopy(teacher["dit"]).requires_grad_(True)})
    model["refine"] = ConfidenceHead(teacher["dit"].config)
    if kind == "joint":
        model["confidence"] = ConfidenceHead(teacher["dit"].config)
    model.to(ctx.device)
    size = shapes_world.SIZE // codec.spatial_stride
    losses = StudentLosses(
        teacher["dit"],
        teacher["text"],
        model,
        rollout,
        ctx.past_chunks,
        size,
        stage.guidance,
        stage.motion_weight,
        ctx.compiled,
    )
    options = {"betas": (0.0, 0.99), "ema_decay": 0.995, "factor": lr_warmup}
    rates = {name: stage.rate if name == "dit" else HEAD_RATE for name in model}
    student = Optimized(model, losses.student_loss, stage.steps, rates, **options)
    critic_steps = stage.critic_steps * stage.steps
    critic = Optimized(losses.critic, losses.critic_loss, critic_steps, stage.critic_rate, **options)
    trainer = Trainer(student, ctx.out / kind, ctx.recipe.seed, {"critic": critic, "norm": losses.norm})
    trainer.resume()
    clips = clips_of(ctx, codec, stage.batch, student.step, offset=500_000, focus=0)

    def prepare(generator: torch.Generator) -> tuple:
        latents, tokens = next(clips)
        rolled = losses.rollout(tokens, generator)
        for _ in range(stage.critic_steps):  # the critic must keep up with the student
            critic.update(rolled, generator)
        return rolled, latents, tokens, generator

    def on_save() -> None:
        save_tensors(trainer.folder / "weights.safetensors", student.ema)
        pipe = pipeline(ctx, student.ema["dit"], teacher["text"], codec)
        sheet(trainer, roll_out(pipe, SHOWN, Fixed(pipe.max_steps)), f"{kind}, {pipe.max_steps} steps")

    trainer.run(prepare, save_every=SAVE_EVERY[kind], note=kind, report=lambda: losses.report, on_save=on_save)
    if rank() == 0:
        modules = {"generator": student.ema["dit"], "codec": codec, "text": teacher["text"]}
        save_model_folder(trainer.folder / "model", f"{ctx.recipe.name}-{kind}", modules, rollout, VIDEO)
    return trainer.log.rows[-1] if rank() == 0 else {}


def fit_heads(ctx: StageContext) -> dict[str, Any]:
    """Three heads for the frozen student of the joint stage, calibrated alike, and the model folder with one of them.

    `joint` learned the attenuation objective with the generator, `refine` self-refinement beside it, `fitted` learns
    self-refinement now, on rollouts that it is held still for. `head/<kind>.safetensors` holds each; the folder `model`
    has the one that the recipe names.
    """
    stage, rollout, codec, teacher = ctx.recipe.head, ctx.recipe.rollout, load_codec(ctx), load_teacher(ctx)
    model = nn.ModuleDict({name: ConfidenceHead(teacher["dit"].config) for name in ("refine", "confidence")})
    model["dit"] = teacher["dit"]
    load_tensors(model, ctx.out / "joint" / "weights.safetensors", "joint")
    modules = {"generator": model["dit"], "codec": codec, "text": teacher["text"]}
    folder = ctx.out / "model"
    save_model_folder(folder, ctx.recipe.name, modules, rollout, VIDEO)
    pipe = Pipeline.from_pretrained(folder, device=ctx.device)  # heads are made for the weights as they ship, rounded
    captions = held_out(stage.clips + stage.calibration_clips, chunks=CHUNKS, seed=HEAD_SEED)
    rollouts = collect(pipe, captions, batch=BATCH_CLIPS, seed=HEAD_SEED)
    learned, other = rollouts[: stage.clips], rollouts[stage.clips :]
    heads = {"joint": model["confidence"], "refine": model["refine"], "fitted": None}
    facts: dict[str, Any] = {}
    for kind, head in heads.items():
        pipe.engine.head = None if head is None else head.half().float().to(ctx.device).requires_grad_(False).eval()
        if head is None:
            head_stage.fit_head(pipe, learned, other, stage.iterations, ctx.recipe.seed)
        heads[kind] = head = pipe.engine.head
        table = head_stage.set_thresholds(pipe, other)
        by_step = calibrate.confidence_by_step(head, other)
        fit = head_stage.measure(head, learned, other)
        facts[kind] = {
            "spearman": fit.spearman,
            "spearman_by_step": fit.spearman_by_step,
            "presets": pipe.config.presets,
        }
        facts[kind] |= {"median_confidence_by_step": np.median(by_step, axis=0).round(3).tolist()}
        save_head(ctx.out / "head" / f"{kind}.safetensors", head, pipe.engine.dit.config, pipe.config, pipe.calibration)
        head_stage.draw_head(ctx.out / "head" / f"{kind}.png", table, by_step, pipe.config.presets)
        if kind == stage.kind:
            modules["confidence"] = head
            save_model_folder(folder, ctx.recipe.name, modules, pipe.config, VIDEO, calibration=pipe.calibration)
    return facts


STAGES: dict[str, Callable[[StageContext], dict[str, Any]]] = {
    "codec": train_codec,
    "teacher": train_teacher,
    "student": partial(train_student, kind="student"),
    "joint": train_student,
    "head": fit_heads,
}
