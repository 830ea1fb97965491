"""Bias, RMSNorm over the channels and SiLU: the reference against loops in float64, the Triton kernels against float64
beside the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import reference
from dsa_engine.triton_kernels import norm_silu as kernel
from tests.support.kernels import DEVICE, DTYPES, compare, poison, poisoned_memory

LEAST = 1e-12


def naive_norm_silu(x, weight, silu, bias):
    """Pixel by pixel, over lists of Python's own floats."""
    weight, bias = weight.tolist(), [0.0] * len(weight) if bias is None else bias.tolist()
    pixels = []
    for pixel in x.reshape(-1, x.shape[-1]).tolist():
        y = [a + b for a, b in zip(pixel, bias)]
        norm = max(math.sqrt(math.fsum(a * a for a in y)), LEAST)
        z = [a * math.sqrt(len(y)) / norm * g for a, g in zip(y, weight)]
        pixels.append([a / (1 + math.exp(-a)) if silu and a > -700 else 0.0 if silu else a for a in z])
    return torch.tensor(pixels, dtype=torch.float64).view(x.shape)


def exact_norm_silu(x, weight, silu, bias):
    """The same in float64, where the naive one would take too long."""
    y = x.double() if bias is None else x.double() + bias.double()
    z = torch.nn.functional.normalize(y, dim=-1) * y.shape[-1] ** 0.5 * weight.double()
    return z * torch.sigmoid(z) if silu else z


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (2, 3, 2, 2, 6), (1, 2, 96)])
def test_the_norm_is_over_the_channels_of_each_pixel(shape, biased, silu, close):
    x, weight = 5 * torch.randn(shape), torch.randn(shape[-1])
    bias = torch.randn(shape[-1]) if biased else None
    expected = naive_norm_silu(x.double(), weight, silu, bias)
    close(ops.norm_silu(x, weight, silu, bias), expected, rel=1e-5)
    close(exact_norm_silu(x, weight, silu, bias), expected, rel=1e-12)


def test_a_pixel_of_zeros_stays_one_and_a_large_gain_saturates():
    out = ops.norm_silu(torch.tensor([[0.0, 0.0], [3.0, -4.0]]), torch.tensor([1e4, 1e4]))
    assert out[0].tolist() == [0, 0] and out[1, 1] == 0
    assert out[1, 0] == pytest.approx(1e4 * 0.6 * 2**0.5)


def test_the_bias_comes_before_the_norm():
    """A pixel that the bias takes to zero has nothing left to normalise."""
    x, bias = torch.tensor([[2.0, -1.0]]), torch.tensor([-2.0, 1.0])
    assert ops.norm_silu(x, torch.ones(2), False, bias).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, y = (3 * torch.randn(2, 2, 40, 96)).to(dtype)
    weight, bias = torch.randn(96).to(dtype), torch.randn(96).to(dtype)
    once = {"rtol": torch.finfo(dtype).eps / 2, "atol": 2e-6}
    normed = ops.norm_silu(x, weight, True, bias)
    torch.testing.assert_close(normed.double(), exact_norm_silu(x, weight, True, bias), **once)
    total = ops.bias_residual(x, y, bias)
    assert normed.dtype == total.dtype == dtype
    torch.testing.assert_close(total.double(), x.double() + y.double() + bias.double(), **once)


def test_the_result_goes_where_it_is_told():
    """Behind two frames of a longer clip, and nowhere else."""
    whole, x, weight = torch.full((2, 5, 2, 2, 4), 7.0), torch.randn(2, 3, 2, 2, 4), torch.randn(4)
    part = whole[:, 2:]
    assert ops.norm_silu(x, weight, out=part) is part
    assert torch.equal(whole[:, 2:], ops.norm_silu(x, weight)) and bool((whole[:, :2] == 7).all())


def test_gradients_flow_through_the_reference():
    x, weight, bias = (torch.randn(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 3), (3,), (3,)))
    got = torch.autograd.grad(ops.norm_silu(x, weight, True, bias).sum(), (x, weight, bias))
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(exact_norm_silu(wide[0], wide[1], True, wide[2]).sum(), wide)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, v: ops.norm_silu(x, v[:3]), r"norm_silu: x \[2, 5, 4\] and a vector \[3\]"),
        (lambda x, v: ops.norm_silu(x, v, True, v[:1]), r"a vector \[1\] must be"),
        (lambda x, v: ops.norm_silu(x[0, 0], v), r"norm_silu: x \[4\] must be \[B, ..., C\]"),
        (lambda x, v: ops.norm_silu(x, v, out=x[:, :3]), r"out \[2, 3, 4\] of torch.float32 must be \[2, 5, 4\]"),
        (lambda x, v: ops.norm_silu(x, v, out=x.half()), "of torch.float16 must be"),
        (lambda x, v: ops.bias_residual(x, x[:1], v), r"x \[2, 5, 4\] and y \[1, 5, 4\] must be alike"),
        (lambda x, v: ops.bias_residual(x, x, v[:2]), r"bias_residual: .* a vector \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5, 4), torch.zeros(4))


# The Triton kernels

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(1, 200))


def case(batch, frames, pixels, channels, dtype, past=0):
    """(x, weight, bias, room for the result behind `past` frames); NaN lies between the rows of x, and in the room."""
    around = poison(batch, frames + 1, pixels, channels, dtype=dtype)
    around[:, 1:] = (3 * torch.randn(batch, frames, pixels, channels, device=DEVICE) + 0.5).to(dtype)
    weight, bias = (torch.randn(2, channels, device=DEVICE) + 1).to(dtype)
    return around[:, 1:], weight, bias, poison(batch, frames + past, pixels, channels, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10)
@given(shape=SHAPES, silu=st.booleans(), biased=st.booleans(), past=st.integers(0, 2))
def test_the_kernel_of_norm_silu(dtype, shape, silu, biased, past):
    x, weight, bias, room = case(*shape, dtype, past)
    bias = bias if biased else None
    kernel.norm_silu(x, weight, silu, bias, room[:, past:])
    exact = exact_norm_silu(x, weight, silu, bias)
    compare(room[:, past:], reference.norm_silu(x, weight, silu, bias), exact)
    assert room[:, :past].isnan().all()  # the past is not its own to write
    with poisoned_memory():
        assert torch.equal(kernel.norm_silu(x, weight, silu, bias), room[:, past:])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6)
@given(shape=SHAPES)
def test_the_kernel_of_bias_residual(dtype, shape):
    (x, _, bias, _), (y, *_) = case(*shape, dtype), case(*shape, dtype)
    with poisoned_memory():
        out = kernel.bias_residual(x, y, bias)
    compare(out, reference.bias_residual(x, y, bias), x.double() + y.double() + bias.double())


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_the_widths_of_wan(channels):
    """More pixels than a block has, and not a multiple of it."""
    x, weight, bias, room = case(1, 2, 4096 // channels + 5, channels, torch.bfloat16, 2)
    kernel.norm_silu(x, weight, True, bias, room[:, 2:])
    compare(room[:, 2:], reference.norm_silu(x, weight, True, bias), exact_norm_silu(x, weight, True, bias))
    with poisoned_memory():
        out = kernel.bias_residual(x, x, bias)
    compare(out, reference.bias_residual(x, x, bias), 2 * x.double() + bias.double())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_far_from_zero_the_kernel_neither_overflows_nor_divides_by_nothing():
    x = torch.tensor([[[0.0] * 4, [1e3, -1e3, 1e-3, 0.0], [1e-20] * 4]], device=DEVICE)
    weight = torch.full((4,), 1e5, device=DEVICE)
    out = kernel.norm_silu(x, weight)
    assert out.isfinite().all()
    compare(out, reference.norm_silu(x, weight), exact_norm_silu(x, weight, True, None))


def test_strides_are_followed_or_refused():
    """Pixels of a slice are made dense; a result cannot be written into one."""
    x, weight = torch.randn(2, 3, 12, device=DEVICE)[..., ::2], torch.randn(12, device=DEVICE)[::2]
    compare(kernel.norm_silu(x, weight), reference.norm_silu(x, weight), exact_norm_silu(x, weight, True, None))
    with pytest.raises(ValueError, match="must be contiguous within each row of the batch"):
        kernel.norm_silu(x, weight, out=torch.empty(2, 3, 12, device=DEVICE)[..., ::2])


def test_nothing_is_nothing():
    empty = torch.empty(2, 0, 4, device=DEVICE)
    vector = torch.ones(4, device=DEVICE)
    assert (
        kernel.norm_silu(empty, vector, out=empty) is empty and kernel.bias_residual(empty, empty, vector).numel() == 0
    )


@pytest.mark.gpu
def test_wan_on_a_gpu():
    """The largest activation of a chunk at 480 x 832."""
    x, weight, bias, room = case(1, 12, 480 * 832, 96, torch.bfloat16, 2)
    kernel.norm_silu(x, weight, True, bias, room[:, 2:])
    for frame in (0, 11):
        got, given = room[:, 2 + frame], x[:, frame]
        compare(got, reference.norm_silu(given, weight, True, bias), exact_norm_silu(given, weight, True, bias))
