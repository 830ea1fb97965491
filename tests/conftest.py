"""One thread, no network, the same random numbers every time; a tiny random model that several tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("repeatable")


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
