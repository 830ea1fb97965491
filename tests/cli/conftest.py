"""A tiny model, and the commands run on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsa_engine import cli
from dsa_engine.checkpoints.model_folder import save_model_folder
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Two layers; 32x32 pixels at 12 fps, 15 frames in 5 chunks; random weights, so that confidences differ."""
    torch.manual_seed(0)
    config = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=16)
    dit, head = CausalDiT(config), PooledHead(config)
    for parameter in [*dit.parameters(), *head.mlp[2].parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    modules = {"generator": dit, "confidence": head, "codec": PixelCodec(ch=32), "text": SlotTextEncoder(16)}
    folder = tmp_path_factory.mktemp("tiny")
    rollout = RolloutConfig(window=9, shift=3.0, threshold=0.428, presets={"fast": 0.4})
    save_model_folder(folder, "tiny", modules, rollout, {"height": 32, "width": 32, "frames": 15, "fps": 12.0})
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """run("generate", ...) in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *args: object) -> tuple[int, str, str]:
        extra = ["--model", str(model)] if command == "generate" and "--model" not in args else []
        code = cli.main([command, *map(str, args), *extra])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def facts(run):
    """The JSON of a run that must succeed."""

    def call(*args: object) -> dict:
        code, out, err = run(*args, "--json")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return call
