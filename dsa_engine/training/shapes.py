"""The recipe of the shipped small model, stage by stage: codec -> teacher -> student -> package.

    python -m dsa_engine.training.shapes codec --out runs
    torchrun --nproc-per-node 2 -m dsa_engine.training.shapes teacher --out runs
    torchrun --nproc-per-node 2 -m dsa_engine.training.shapes student --out runs
    python -m dsa_engine.training.shapes package --out runs

On a CPU, glibc's allocator gives memory back too eagerly: MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000 make a step 1.3 times faster.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_engine import synthetic
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models import package
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.pixel_codec import PixelCodec
from dsa_engine.models.text import SlotTextEncoder
from dsa_engine.pipeline import Pipeline
from dsa_engine.training.calibrate import confidence_by_step, thresholds
from dsa_engine.training.codec import train_codec
from dsa_engine.training.evaluate import held_out
from dsa_engine.training.flow import flow_loss
from dsa_engine.training.head import fit_head
from dsa_engine.training.init import init_weights
from dsa_engine.training.student import StudentLosses
from dsa_engine.training.teacher_forcing import teacher_forced
from dsa_engine.training.trainer import Trainer, batches, level, rank

logger = logging.getLogger(__name__)

ROLLOUT = RolloutConfig(chunk_frames=3, window=9, steps=(1000, 750, 500, 250), shift=3.0)
LATENT_SIZE = 8
HEAD_SEED, CALIBRATION_SEED = 246_813_579, 123_456_789  # of prompts; training pools and held-out clips use others
CHUNK, CHUNKS, CONTEXT = 3, 4, 2  # latent frames a chunk, chunks a clip, past chunks in the window of 9 frames
POOL, PER_POOL = 4096, 2000  # clips in a pool, steps until it is made anew


def load_codec(out: Path) -> PixelCodec:
    codec = PixelCodec()
    codec.load_state_dict(load_file(out / "codec.safetensors"))
    return codec.requires_grad_(False).eval()


@torch.no_grad()
def latent_pool(codec: PixelCodec, seed: int, clips: int = POOL) -> tuple[Tensor, Tensor, Tensor]:
    """Encoded random clips: latents [n, N, F, C, H, W] float16, tokens [n, N, 4], hard [n, N]."""
    rng = np.random.default_rng(seed)
    latents, tokens, hard = [], [], []
    for _ in range(0, clips, 256):
        frames, token, is_hard, _ = synthetic.pool(rng, 256, CHUNKS, CHUNK)
        pixels = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255
        latents.append(codec.encode(pixels).half().unflatten(1, (CHUNKS, CHUNK)))
        tokens.append(torch.from_numpy(token))
        hard.append(torch.from_numpy(is_hard))
    return torch.cat(latents), torch.cat(tokens), torch.cat(hard)


def new_generator(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    config = ModelConfig.preset("shapes")
    return nn.ModuleDict({"dit": init_weights(CausalDiT(config)), "text": SlotTextEncoder(config.text_dim)})


def train_teacher(out: Path, steps: int, batch: int, lr: float, seed: int, compiled: bool) -> None:
    codec = load_codec(out)
    trainer = Trainer(new_generator(seed), out / "teacher", steps, lr, seed)
    trainer.resume()
    forward = torch.compile(teacher_forced, dynamic=False) if compiled else teacher_forced
    data = batches(
        lambda index: latent_pool(codec, 1_000_000 * seed + 1000 * index + rank()), batch, PER_POOL, trainer.step
    )

    def loss(generator: torch.Generator) -> Tensor:
        latents, tokens, _ = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            return flow_loss(
                trainer.model["dit"], trainer.model["text"], latents.float(), tokens, CONTEXT, generator, forward
            )

    trainer.run(loss, note="teacher")


def load_teacher(out: Path) -> nn.ModuleDict:
    """The teacher's averaged weights, from its last checkpoint."""
    teacher = new_generator(0)
    teacher.load_state_dict(torch.load(out / "teacher" / "checkpoint.pt", weights_only=True)["ema"])
    return teacher.requires_grad_(False)


def train_student(out: Path, steps: int, batch: int, lr: float, seed: int, compiled: bool) -> None:
    codec, teacher = load_codec(out), load_teacher(out)
    losses = StudentLosses(teacher["dit"], teacher["text"], ROLLOUT, CONTEXT, LATENT_SIZE, compiled)
    head = ConfidenceHead(teacher["dit"].config)
    model = nn.ModuleDict({"dit": copy.deepcopy(teacher["dit"]).requires_grad_(True), "confidence": head})
    options = dict(betas=(0.0, 0.99), ema_decay=0.995, factor=level)
    rates = {"dit": lr, "confidence": 5 * lr}
    trainer = Trainer(model, out / "student", steps, rates, seed, **options)
    critic = Trainer(losses.critic, out / "critic", 2 * steps, 2.5 * lr, seed, **options)
    if trainer.resume():
        critic.resume()
    data = batches(
        lambda index: latent_pool(codec, 1_000_000 * seed + 500_000 + 1000 * index + rank()),
        batch,
        PER_POOL,
        trainer.step,
    )

    def loss(generator: torch.Generator) -> Tensor:
        latents, tokens, _ = next(data)
        rolled = losses.rollout(model["dit"], tokens, generator)
        for _ in range(2):  # the critic must keep up with the student
            critic.update(losses.critic_loss(rolled, generator))
        return losses.student_loss(model, rolled, (latents.float(), tokens), generator)

    def on_save() -> None:
        critic.save()
        if rank() == 0:
            tensors = {k: v.contiguous() for k, v in trainer.ema.state_dict().items()}
            save_file(tensors, out / "student" / f"step-{trainer.step:05d}.safetensors")

    trainer.run(loss, save_every=100, note="student", report=lambda: losses.report, on_save=on_save)


def make_package(out: Path, student: Path, folder: Path, joint: bool = False, clips: int = 512) -> None:
    """Write the model folder of a student's weights, with thresholds calibrated on held-out clips.

    Its head is fitted to the frozen student by self-refinement, or left as the joint objective made it (`joint`).
    """
    codec, teacher = load_codec(out), load_teacher(out)
    model = nn.ModuleDict({"dit": teacher["dit"], "confidence": ConfidenceHead(teacher["dit"].config)})
    model.load_state_dict(load_file(student))
    modules = {"generator": model["dit"], "confidence": model["confidence"], "codec": codec, "text": teacher["text"]}
    video = {"height": synthetic.SIZE, "width": synthetic.SIZE, "frames": 48, "fps": 12.0}
    package.save(folder, "shapes", modules, ROLLOUT, video)
    pipe = Pipeline.from_pretrained(folder, device="cpu")  # the head is fitted to the weights as they ship, rounded
    if not joint:
        fit_head(pipe, held_out(clips, chunks=8, seed=HEAD_SEED))
    confidence = confidence_by_step(pipe, held_out(clips // 2, chunks=8, seed=CALIBRATION_SEED))
    presets = thresholds(confidence)
    modules["confidence"] = pipe.engine.head
    package.save(folder, "shapes", modules, replace(ROLLOUT, presets=presets, threshold=presets["balanced"]), video)
    logger.info("median confidence after each step %s, thresholds %s", np.median(confidence, 0).round(3), presets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("codec", "teacher", "student", "package"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--student", type=Path, help="package: weights to ship, default the last of the student stage")
    parser.add_argument("--folder", type=Path, default=package.ASSETS / "shapes", help="package: where to write")
    parser.add_argument("--joint", action="store_true", help="package: keep the head of the joint objective")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    args.steps = args.steps or {"codec": 5000, "teacher": 6000, "student": 500}.get(args.stage)
    args.lr = args.lr or {"teacher": 3e-3, "student": 2e-4}.get(args.stage)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    if args.stage == "codec":
        codec, psnr = train_codec(args.steps, args.seed)
        logger.info("held-out PSNR %.1f dB", psnr)
        save_file(codec.state_dict(), args.out / "codec.safetensors")
        return
    if args.stage == "package":
        last = max(
            (args.out / "student").glob("step-*.safetensors"), default=args.out / "student" / "step-00500.safetensors"
        )
        make_package(args.out, args.student or last, args.folder, args.joint)
        return
    train = {"teacher": train_teacher, "student": train_student}[args.stage]
    train(args.out, args.steps, args.batch, args.lr, args.seed, not args.eager)


if __name__ == "__main__":
    main()
