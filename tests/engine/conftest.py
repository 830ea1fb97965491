"""An untrained pipeline of the small model's make, sized down."""

from __future__ import annotations

import pytest
import torch

from dsa_engine import Pipeline
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models import package
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.pixel_codec import PixelCodec
from dsa_engine.models.text import SlotTextEncoder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A model folder in the project's format with random weights, whose confidence varies enough to stop at any step."""
    torch.manual_seed(7)
    config = ModelConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=32)
    dit = CausalDiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    head = ConfidenceHead(config)
    torch.nn.init.normal_(head.mlp[2].weight, std=2.0)
    folder = tmp_path_factory.mktemp("untrained")
    modules = {"generator": dit, "confidence": head, "codec": PixelCodec(), "text": SlotTextEncoder(16)}
    rollout = RolloutConfig(window=9, sink=0, shift=3.0, threshold=0.5)
    video = {"height": 64, "width": 64, "frames": 12, "fps": 12.0}
    package.save(folder, "untrained", modules, rollout, video, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu")
