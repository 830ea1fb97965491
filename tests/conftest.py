"""One thread, no network, the same random numbers every time; tiny random models that several tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, from whatever folder pytest is run

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: they then run on CPU tensors

from benchmarks.common.limit import UNFINISHED, Limit
from dsa_engine import Pipeline
from dsa_engine.checkpoints.model_folder import save_model_folder
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--limit", type=float, metavar="SECONDS", help="begin no test later; what is left out is said")


def pytest_configure(config):
    config.limit = Limit(config.getoption("--limit"))


def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and item.config.limit.over():
        item.session.shouldstop = f"--limit is over, {nextitem.nodeid} and what follows was not run"


def pytest_sessionfinish(session):
    if session.config.limit.over() and session.shouldstop:
        session.exitstatus = UNFINISHED


def pytest_collection_modifyitems(items):
    """The interpreter would take hours for what is meant for a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def close():
    """close(actual, expected, rel): the largest error is at most `rel` of the largest expected magnitude.

    A failure names the worst element. NaN is never close to anything.
    """

    def check(actual, expected, rel: float) -> None:
        expected = expected.detach().double()
        bound = rel * expected.abs().max().item()
        torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=bound)

    return check


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Three heads of 32 and three layers: every axis of RoPE and every kind of weight, in milliseconds."""
    return ModelConfig(dim=96, ffn_dim=160, num_heads=3, num_layers=3, text_dim=40, text_len=12, freq_dim=64)


@pytest.fixture
def tiny_dit(tiny_config) -> CausalDiT:
    """Random weights everywhere, so that no gate, gain or bias is at the value that would hide it."""
    model = CausalDiT(tiny_config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.15)
    return model


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A model folder in the project's format with random weights, whose confidence varies enough to stop anywhere."""
    torch.manual_seed(7)
    config = ModelConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=32)
    dit = CausalDiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    head = PooledHead(config)
    torch.nn.init.normal_(head.mlp[2].weight, std=2.0)
    folder = tmp_path_factory.mktemp("untrained")
    modules = {"generator": dit, "confidence": head, "codec": PixelCodec(), "text": SlotTextEncoder(16)}
    rollout = RolloutConfig(window=9, sink=0, shift=3.0, threshold=0.5)
    video = {"height": 64, "width": 64, "frames": 12, "fps": 12.0}
    save_model_folder(folder, "untrained", modules, rollout, video, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu")
