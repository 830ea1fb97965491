"""What FP8 is asked for by name, and scales that no key or value exceeds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.models import fp8
from dsa_engine.models.fp8 import QUANTIZATIONS, cache_scales, quantization

TIMESTEPS = [1000.0, 937.5, 250.0, 0.0]


def modulation(dit, t):
    """shift and scale of every layer's attention at one timestep, by Wan's formulas: [layers, C] each."""
    half = dit.config.freq_dim // 2
    angle = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    time = dit.time_embedding(torch.cat((angle.cos(), angle.sin())).float())
    six = dit.time_projection(time).view(6, -1)
    return [[(block.modulation[0, i] + six[i]).double() for i in range(2)] for block in dit.blocks]


def layer_norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()


@given(st.integers(0, 2**30), st.sampled_from([0.01, 1.0, 30.0]))
def test_no_value_exceeds_its_bound(seed, size):
    """Random tokens, and the worst one of every channel: that which lies along its row of the product."""
    dit = made(seed)
    scales = cache_scales(dit, TIMESTEPS)
    largest = torch.zeros(len(dit.blocks), dit.config.num_heads, dtype=torch.float64)
    for t in TIMESTEPS:
        for layer, (shift, scale) in enumerate(modulation(dit, t)):
            weight, bias = (
                x.double() for x in (dit.blocks[layer].self_attn.v.weight, dit.blocks[layer].self_attn.v.bias)
            )
            along = weight * (1 + scale)
            x = layer_norm(torch.cat((along, -along, size * torch.randn(50, dit.config.dim, dtype=torch.float64))))
            values = (x * (1 + scale) + shift) @ weight.T + bias
            top = values.abs().amax(0).view(dit.config.num_heads, -1).amax(1)
            largest[layer] = torch.maximum(largest[layer], top)
    stored = largest / scales.v.double()
    assert (stored <= 448 * (1 + 1e-5)).all()
    assert (stored >= 0.8 * 448).all()  # nor is the bound larger than it must be


@given(st.integers(0, 2**30))
def test_no_key_exceeds_its_bound(seed):
    """The worst key has all of its length in one pair, which RoPE may turn into one channel."""
    dit = made(seed)
    scales = cache_scales(dit, TIMESTEPS)
    config = dit.config
    for layer, block in enumerate(dit.blocks):
        gain = block.self_attn.norm_k.weight.double()
        x = torch.cat((torch.eye(config.dim), torch.randn(50, config.dim))).double()
        x = x / x.square().mean(-1, keepdim=True).sqrt() * gain
        length = x.unflatten(-1, (-1, 2)).square().sum(-1).sqrt()  # of a pair: the most that a turn can make of it
        top = length.amax(0).view(config.num_heads, -1).amax(1) / scales.k[layer].double()
        torch.testing.assert_close(top, torch.full_like(top, 448.0), rtol=1e-5, atol=0)


def made(seed):
    from dsa_engine.config import ModelConfig
    from dsa_engine.models.dit import CausalDiT

    torch.manual_seed(seed)
    dit = CausalDiT(ModelConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, freq_dim=16))
    for parameter in dit.requires_grad_(False).parameters():
        parameter.normal_(std=0.5)
    return dit


def test_a_head_of_nothing_has_a_scale_of_one(tiny_dit):
    block = tiny_dit.blocks[1]
    for parameter in (block.self_attn.v.weight, block.self_attn.v.bias, block.self_attn.norm_k.weight):
        parameter[:32] = 0
    scales = cache_scales(tiny_dit, TIMESTEPS)
    assert scales.k[1, 0] == scales.v[1, 0] == 1
    assert (scales.k[1, 1:] != 1).all()


def test_names():
    assert quantization(None, "cpu") == (False, False)
    assert {name: tuple(quantization(name, "cpu")) for name in QUANTIZATIONS} == {
        "fp8": (True, True),
        "fp8-linear": (True, False),
        "fp8-cache": (False, True),
    }
    with pytest.raises(ValueError, match="quantization='int4': must be None or one of fp8, fp8-linear, fp8-cache"):
        quantization("int4", "cpu")


@pytest.mark.parametrize(
    "capability, can", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_an_old_device_is_an_error(monkeypatch, capability, can):
    monkeypatch.setattr(fp8.torch, "cuda", SimpleNamespace(get_device_capability=lambda device: capability))
    if can:
        assert quantization("fp8", "cuda:1").cache
        return
    with pytest.raises(
        ValueError, match=rf"quantization='fp8': compute capability {capability[0]}\.{capability[1]}.*8\.9"
    ):
        quantization("fp8", "cuda:1")
    assert quantization(None, "cuda:1") == (False, False)
