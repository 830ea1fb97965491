"""The clean estimate and the re-noising, against element-wise arithmetic in float64 and the flow they invert."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import ops

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 4, 2, 3)]


def elementwise(formula, a, b, sigma):
    """formula(a, b, sigma of the row and frame) for each element, in float64."""
    out = torch.empty(a.shape, dtype=torch.float64)
    for index in itertools.product(*map(range, a.shape)):
        out[index] = formula(a[index].double(), b[index].double(), sigma[index[:2]].double())
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_to_x0_uses_each_frames_sigma(shape, close):
    (x, v), sigma = torch.randn(2, *shape), torch.rand(shape[:2])
    close(ops.velocity_to_x0(x, v, sigma), elementwise(lambda x, v, s: x - s * v, x, v, sigma), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_renoise_uses_each_frames_sigma(shape, close):
    (x0, noise), sigma = torch.randn(2, *shape), torch.rand(shape[:2])
    expected = elementwise(lambda x0, e, s: (1 - s) * x0 + s * e, x0, noise, sigma)
    close(ops.renoise(x0, noise, sigma), expected, rel=1e-6)


@given(low=st.floats(0, 1), high=st.floats(0, 1))
def test_the_true_velocity_gives_back_the_clean_chunk(low, high):
    """v = noise - x0 undoes the noising at every level."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 2, 3, 4, 4)
    sigma = torch.tensor([[low, high]])
    back = ops.velocity_to_x0(ops.renoise(x0, noise, sigma), noise - x0, sigma)
    torch.testing.assert_close(back, x0, rtol=0, atol=2e-6)


def test_the_ends_of_the_schedule_are_exact():
    x0, noise = torch.randn(2, 1, 2, 3, 4, 4)
    assert torch.equal(ops.renoise(x0, noise, torch.ones(1, 2)), noise)
    assert torch.equal(ops.renoise(x0, noise, torch.zeros(1, 2)), x0)
    assert torch.equal(ops.velocity_to_x0(x0, noise, torch.zeros(1, 2)), x0)


@pytest.mark.parametrize("op", [ops.velocity_to_x0, ops.renoise])
def test_half_precision_is_rounded_once_at_the_end(op):
    """Every element is within one rounding of its float64 value; arithmetic in bfloat16 would round several times."""
    (a, b), sigma = torch.randn(2, 1, 2, 3, 4, 4).bfloat16(), torch.rand(1, 2)
    formula = (lambda x, v, s: x - s * v) if op is ops.velocity_to_x0 else (lambda x0, e, s: (1 - s) * x0 + s * e)
    out = op(a, b, sigma)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), elementwise(formula, a, b, sigma), rtol=2**-8, atol=1e-6)
