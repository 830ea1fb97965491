"""The recipe of the shipped small model, stage by stage: codec -> teacher -> student.

    python -m dsa_engine.training.shapes codec --out runs
    torchrun --nproc-per-node 2 -m dsa_engine.training.shapes teacher --out runs

On a CPU, glibc's allocator gives memory back too eagerly: MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=500000000 make a step 1.3 times faster.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dsa_engine import synthetic
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.pixel_codec import PixelCodec
from dsa_engine.models.text import SlotTextEncoder
from dsa_engine.training.flow import flow_loss
from dsa_engine.training.init import init_weights
from dsa_engine.training.teacher_forcing import teacher_forced
from dsa_engine.training.trainer import Trainer, batches, rank

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("codec", "teacher"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    if args.stage == "teacher":
        train_teacher(args.out, args.steps, args.batch, args.lr, args.seed, not args.eager)


if __name__ == "__main__":
    main()
