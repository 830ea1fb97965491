"""The joint training of checkpoints with the 1.3B's names and structure, small, in two processes, one run killed.

    python -m tests.support.joint_training FOLDER [LAYERS]

Student, teacher and prompts are made with random weights; `FOLDER/whole` is trained in one go, `FOLDER/parts` is killed
in its second step and run again. The processes are forks, so torch is imported once; each is set up as by torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401  here and not in every process
import torch
import torch._dynamo  # noqa: F401
from safetensors.torch import save_file

from dsa_engine import cli
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.training.trainer import Optimized

PROCESSES, LAYERS = 2, 2  # the 1.3B has 30, which takes minutes
RECIPE = """
name = "small"
[student]
steps = 2
batch = 2
rate = 1e-3
critic_rate = 1e-3
critic_steps = 1
guidance = 3.0
"""


def sizes(layers: int) -> ModelConfig:
    return ModelConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=layers, text_dim=32, text_len=8, freq_dim=32)


def weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    dit = CausalDiT(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.15)
    return dit.state_dict()


def make_inputs(folder: Path, config: ModelConfig) -> None:
    """student/self_forcing.pt as Self-Forcing saves it, teacher/model.safetensors in Wan's names, prompts."""
    for name in ("student", "teacher"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config.to_dict()))
    student = {f"model.{name}": value for name, value in weights(config, 0).items()}
    torch.save({"generator_ema": student}, folder / "student" / "self_forcing.pt")
    save_file(weights(config, 1), folder / "teacher" / "model.safetensors")
    save_file({"prompt_embeds": torch.randn(6, 8, config.text_dim)}, folder / "prompts.safetensors")
    (folder / "small.toml").write_text(RECIPE)


def command(folder: Path, out: str, *more: str) -> list[str]:
    flags = {
        "--recipe": "joint",
        "--model": folder / "student" / "self_forcing.pt",
        "--teacher": folder / "teacher",
        "--prompts": folder / "prompts.safetensors",
        "--config": folder / "small.toml",
        "--out": folder / out,
        "--device": "cpu",
        "--frames": 21,
        "--height": 32,
        "--width": 32,
        "--save-every": 1,
    }
    return ["train", *(str(x) for flag in flags.items() for x in flag), *more]


def train(folder: Path, out: str, *more: str, kill_at: int | None = None) -> list[int]:
    """Exit codes of all processes, negative for a signal. kill_at: SIGKILL at that update of any optimizer."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(PROCESSES):
        if child := os.fork():
            children.append(child)
            continue
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"})
        if kill_at is not None:
            die_at(kill_at)
        os._exit(cli.main(command(folder, out, *more)))
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def die_at(update: int) -> None:
    whole, calls = Optimized.update, []

    def counted(self, *args):
        calls.append(1)
        if len(calls) == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args)

    Optimized.update = counted


def main(folder: Path, layers: int = LAYERS) -> None:
    torch.set_num_threads(1)
    make_inputs(folder, sizes(layers))
    options = ("--head", "token", "--checkpointing")
    codes = {"whole": train(folder, "whole", *options)}
    codes["killed"] = train(folder, "parts", *options, kill_at=4)  # two updates a step: in the second one
    codes["step"] = int(torch.load(folder / "parts" / "checkpoint.pt", weights_only=True)["main"]["step"])
    codes["resumed"] = train(folder, "parts", *options)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
