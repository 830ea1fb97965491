"""Adaptive LayerNorm and the gated residual, with one modulation per frame, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_engine import ops

EPS = 1e-6
SHAPES = [(1, 1, 1, 4), (2, 3, 4, 6), (3, 2, 1, 5)]  # B, F, S, C


def naive_layer_norm(x):
    values = x.tolist()
    mean = sum(values) / len(values)
    variance = sum((a - mean) ** 2 for a in values) / len(values)
    return torch.tensor([(a - mean) / math.sqrt(variance + EPS) for a in values], dtype=torch.float64)


def naive_modulate(x, shift, scale):
    tokens = x.shape[1] // shift.shape[1]
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            a, m = shift[b, t // tokens].double(), scale[b, t // tokens].double()
            out[b, t] = naive_layer_norm(x[b, t].double()) * (1 + m) + a
    return out


def naive_gate_residual(x, y, gate):
    tokens = x.shape[1] // gate.shape[1]
    out = x.double()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[b, t] += gate[b, t // tokens].double() * y[b, t].double()
    return out


@pytest.mark.parametrize("batch, frames, tokens, channels", SHAPES)
def test_modulate_gives_each_frame_its_own_shift_and_scale(batch, frames, tokens, channels, close):
    x = 3 + 2 * torch.randn(batch, frames * tokens, channels)
    shift, scale = torch.randn(2, batch, frames, channels)
    close(ops.modulate(x, shift, scale, EPS), naive_modulate(x, shift, scale), rel=1e-5)


@pytest.mark.parametrize("batch, frames, tokens, channels", SHAPES)
def test_gate_residual_gives_each_frame_its_own_gate(batch, frames, tokens, channels, close):
    x, y = torch.randn(2, batch, frames * tokens, channels)
    gate = torch.randn(batch, frames, channels)
    close(ops.gate_residual(x, y, gate), naive_gate_residual(x, y, gate), rel=1e-6)


def test_modulate_of_equal_channels_is_the_shift(close):
    """No variance: eps keeps the quotient finite."""
    shift = torch.randn(1, 2, 4)
    out = ops.modulate(torch.full((1, 2, 4), 7.0), shift, torch.randn(1, 2, 4), EPS)
    close(out, shift, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    """Every element is within one rounding of its float64 value; arithmetic in that dtype would round several times."""
    x, y = torch.randn(2, 2, 6, 32).to(dtype)
    shift, scale, gate = torch.randn(3, 2, 3, 32)
    modulated, gated = ops.modulate(x, shift, scale, EPS), ops.gate_residual(x, y, gate)
    assert modulated.dtype == gated.dtype == dtype
    once = {"rtol": torch.finfo(dtype).eps / 2, "atol": 2e-6}
    torch.testing.assert_close(modulated.double(), naive_modulate(x, shift, scale), **once)
    torch.testing.assert_close(gated.double(), naive_gate_residual(x, y, gate), **once)
