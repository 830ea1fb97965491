"""Adaptive LayerNorm, the gated residual and the biased activation: the reference against loops in float64, the Triton
kernels against float64 beside the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import reference
from dsa_engine.triton_kernels import modulate as kernel
from tests.ops.test_fp8_linear import HAS_FP8, assert_quantized, needs_fp8, needs_gpu, surrounded
from tests.support.kernels import DEVICE, DTYPES, compare, poison, poisoned_memory

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


def naive_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch, frames, tokens, channels", SHAPES)
def test_residual_modulate_ends_a_sublayer_and_norms_for_the_next(batch, frames, tokens, channels, gated, close):
    """The gate is one of each frame, the norm a plain one with its affine: shift and scale for all."""
    x, y = torch.randn(2, batch, frames * tokens, channels)
    gate, shift, scale = torch.randn(batch, frames, channels), *torch.randn(2, 1, 1, channels)
    residual, out = ops.residual_modulate(x, y, gate if gated else None, shift, scale, EPS)
    close(residual, naive_gate_residual(x, y, gate if gated else torch.ones_like(gate)), rel=1e-6)
    close(out, naive_modulate(residual, *(m.expand(batch, 1, channels) for m in (shift, scale))), rel=1e-5)


def test_gelu_bias_is_the_tanh_approximation(close):
    x, bias = 4 * torch.randn(3, 2, 10), torch.randn(10)
    expected = [naive_gelu(a + b) for row in x.view(-1, 10).tolist() for a, b in zip(row, bias.tolist())]
    close(ops.gelu_bias(x, bias).flatten(), torch.tensor(expected, dtype=torch.float64), rel=1e-6)


def test_linear_gelu_is_the_tanh_approximation_of_the_product(close):
    """The exact GELU differs by up to 4.7e-4, which this notices."""
    x, weight, bias = torch.randn(2, 3, 6), torch.randn(10, 6), torch.randn(10)
    y = ops.linear_gelu(x, weight, bias)
    close(y, exact_gelu(x.double() @ weight.double().T, bias), rel=1e-6)
    assert (y - F.gelu(F.linear(x, weight, bias))).abs().max() > 1e-4


@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: ops.modulate(x, m, m[..., :-1], EPS),
        lambda x, m: ops.gate_residual(x, x, m[:, :1].expand(-1, 4, -1)),
        lambda x, m: ops.residual_modulate(x, x[:, :3], None, m, m, EPS),
        lambda x, m: ops.gelu_bias(x, m[0, 0, :3]),
        lambda x, m: ops.linear_gelu(x, m[0].T, m[0, 0]),
        lambda x, m: ops.linear_gelu(x, m[0], m[0, 0, :1]),
    ],
)
def test_shapes_that_do_not_fit_are_named(call):
    x, m = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"\[2, 6, 4\]|bias \[3\] must be \[4\]"):
        call(x, m)


# From here on the Triton kernels, against float64 and beside the reference.


def per_token(m, x):
    """A vector a frame, [B, F, C] or [1, 1, C], -> one a token, [B, T, C], in float64."""
    return m.double().repeat_interleave(x.shape[1] // m.shape[1], dim=1).expand(x.shape)


def exact_modulate(x, shift, scale):
    h = x.double() - x.double().mean(-1, keepdim=True)
    h = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    return h * (1 + per_token(scale, x)) + per_token(shift, x)


def exact_gelu(x, bias):
    h = x.double() + bias.double()
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def vectors(batch, frames, channels, dtype, alone=False):
    """Shift, scale and gate as views of one [B, F, 6, C], with NaN in the others; alone: one vector for all."""
    batch, frames = (1, 1) if alone else (batch, frames)
    whole = poison(batch, frames, 6, channels, dtype=dtype)
    whole[:, :, 1:4] = torch.randn(batch, frames, 3, channels)
    return whole.unbind(2)[1:4]


KERNEL_SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 200))
MIXED = [*((dtype, dtype) for dtype in DTYPES), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype, vector", MIXED)
@settings(max_examples=8)
@given(shape=KERNEL_SHAPES, alone=st.booleans(), offset=st.sampled_from((0.0, 20.0)))
def test_the_kernel_of_modulate(dtype, vector, shape, alone, offset):
    batch, frames, tokens, channels = shape
    x = surrounded(batch, frames * tokens, channels, dtype=dtype, scale=3.0, offset=offset)
    shift, scale, _ = vectors(batch, frames, channels, vector, alone)
    with poisoned_memory():
        out = kernel.modulate(x, shift, scale, EPS)
    compare(out, reference.modulate(x, shift, scale, EPS), exact_modulate(x, shift, scale))


@pytest.mark.parametrize("dtype, vector", MIXED)
@settings(max_examples=8)
@given(shape=KERNEL_SHAPES)
def test_the_kernel_of_gate_residual(dtype, vector, shape):
    batch, frames, tokens, channels = shape
    x, y = (surrounded(batch, frames * tokens, channels, dtype=dtype) for _ in range(2))
    gate = vectors(batch, frames, channels, vector)[0]
    with poisoned_memory():
        out = kernel.gate_residual(x, y, gate)
    compare(out, reference.gate_residual(x, y, gate), x.double() + y.double() * per_token(gate, x))


@pytest.mark.parametrize("dtype, vector", MIXED)
@settings(max_examples=8)
@given(shape=KERNEL_SHAPES, gated=st.booleans(), alone=st.booleans())
def test_the_kernel_of_residual_modulate(dtype, vector, shape, gated, alone):
    batch, frames, tokens, channels = shape
    x, y = (surrounded(batch, frames * tokens, channels, dtype=dtype, scale=2.0) for _ in range(2))
    gate = vectors(batch, frames, channels, vector)[2] if gated else None
    shift, scale, _ = vectors(batch, frames, channels, vector, alone)
    with poisoned_memory():
        residual, out = kernel.residual_modulate(x, y, gate, shift, scale, EPS)
    plain, _ = reference.residual_modulate(x, y, gate, shift, scale, EPS)
    compare(residual, plain, x.double() + y.double() * (per_token(gate, x) if gated else 1))
    compare(out, reference.modulate(residual, shift, scale, EPS), exact_modulate(residual, shift, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(rows=st.integers(1, 4), channels=st.integers(1, 300), scale=st.sampled_from((0.1, 3.0, 30.0)))
def test_the_kernel_of_gelu_bias(dtype, rows, channels, scale):
    """For values so far from 0 that the exponential overflows."""
    x, bias = surrounded(rows, channels, dtype=dtype, scale=scale), surrounded(channels, dtype=dtype)
    with poisoned_memory():
        out = kernel.gelu_bias(x, bias)
    compare(out, reference.gelu_bias(x, bias), exact_gelu(x, bias))


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=5)
@given(shape=KERNEL_SHAPES, alone=st.booleans())
def test_the_kernels_quantize_what_they_would_have_written(dtype, shape, alone):
    """In float32: what is rounded to the dtype first would be off by more than half a step of e4m3 now and then."""
    batch, frames, tokens, channels = shape
    x, y = (surrounded(batch, frames * tokens, channels, dtype=dtype) for _ in range(2))
    shift, scale, gate = vectors(batch, frames, channels, torch.float32, alone)
    with poisoned_memory():
        normed = kernel.modulate(x, shift, scale, EPS, fp8=True)
        residual, then = kernel.residual_modulate(x, y, gate, shift, scale, EPS, fp8=True)
        activated = kernel.gelu_bias(x, shift[0, 0], fp8=True)
    assert residual.dtype == dtype and not residual.isnan().any()
    for got, exact in (
        (normed, exact_modulate(x, shift, scale)),
        (then, exact_modulate(residual, shift, scale)),
        (activated, exact_gelu(x, shift[0, 0])),
    ):
        assert_quantized(got, exact, slack=2.0**-18)


@pytest.mark.parametrize("channels", [128, 1536, 5120])
def test_the_widths_of_real_models(channels):
    """One warp a row, and several."""
    x, y = (surrounded(2, 3, channels, dtype=torch.bfloat16) for _ in range(2))
    shift, scale, gate = vectors(2, 3, channels, torch.float32)
    wide, bias = surrounded(2, 8960, dtype=torch.bfloat16), surrounded(8960, dtype=torch.bfloat16)
    with poisoned_memory():
        residual, out = kernel.residual_modulate(x, y, gate, shift, scale, EPS)
        activated = kernel.gelu_bias(wide, bias)
    compare(out, reference.modulate(residual, shift, scale, EPS), exact_modulate(residual, shift, scale))
    compare(activated, reference.gelu_bias(wide, bias), exact_gelu(wide, bias))


def test_a_mean_far_from_zero_does_not_cancel():
    """E[x^2] - E[x]^2 would lose every digit in float32."""
    x = surrounded(1, 4, 1536, dtype=torch.float32, offset=3000.0)
    zero = torch.zeros(1, 1, 1536, device=DEVICE)
    out = kernel.modulate(x, zero, zero, EPS)
    assert (out.double() - exact_modulate(x, zero, zero)).abs().max() < 2e-3  # half a step of float32 at 3000 is 1.2e-4


def test_a_frame_reads_no_vector_but_its_own():
    """NaN in one frame of one row stays there."""
    x, (shift, scale, gate) = torch.randn(2, 6, 40, device=DEVICE), vectors(2, 3, 40, torch.float32)
    for m in (shift, scale, gate):
        m[1, 1] = float("nan")
    spoilt = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    spoilt[1, 2:4] = True
    outs = (
        kernel.modulate(x, shift, scale, EPS),
        kernel.gate_residual(x, x, gate),
        *kernel.residual_modulate(x, x, gate, shift, scale, EPS),
    )
    for out in outs:
        assert torch.equal(out.isnan().all(-1), spoilt) and torch.equal(out.isnan().any(-1), spoilt)


def test_frames_of_two_kinds_are_named():
    x, m = torch.randn(1, 6, 8, device=DEVICE), torch.zeros(1, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="modulation of 2 frames beside one of 3: must be 1 or 3"):
        kernel.modulate(x, m, m[:, :2], EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_are_followed(dtype):
    """Rows of a slice, and vectors whose channels are not side by side."""
    x = torch.randn(2, 6, 80, device=DEVICE).to(dtype)[..., ::2]
    m = torch.randn(40, 3, device=DEVICE).t()[None]
    compare(kernel.modulate(x, m, m, EPS), reference.modulate(x, m, m, EPS), exact_modulate(x, m, m))
    compare(kernel.gate_residual(x, x, m), reference.gate_residual(x, x, m), x.double() * (1 + per_token(m, x)))


@pytest.mark.gpu
@needs_gpu
def test_wan_on_a_gpu():
    """Real shapes: 2 rows of a chunk, all variants."""
    x, y = (surrounded(2, 4680, 1536, dtype=torch.bfloat16, scale=3.0) for _ in range(2))
    shift, scale, gate = vectors(2, 3, 1536, torch.float32)
    wide, bias = surrounded(2, 4680, 8960, dtype=torch.bfloat16), surrounded(8960, dtype=torch.bfloat16)
    with poisoned_memory():
        residual, out = kernel.residual_modulate(x, y, gate, shift, scale, EPS)
        gated, activated = kernel.gate_residual(x, y, gate), kernel.gelu_bias(wide, bias)
    compare(residual, reference.gate_residual(x, y, gate), x.double() + y.double() * per_token(gate, x))
    compare(gated, reference.gate_residual(x, y, gate), x.double() + y.double() * per_token(gate, x))
    compare(out, reference.modulate(residual, shift, scale, EPS), exact_modulate(residual, shift, scale))
    compare(activated, reference.gelu_bias(wide, bias), exact_gelu(wide, bias))
    weight = surrounded(8960, 1536, dtype=torch.bfloat16, scale=0.03)
    with torch.no_grad():
        epilogue = ops.linear_gelu(x, weight, bias)
    product = x.double() @ weight.double().T
    compare(epilogue, F.gelu(F.linear(x, weight, bias), approximate="tanh"), exact_gelu(product, bias))
    if HAS_FP8:
        assert_quantized(kernel.modulate(x, shift, scale, EPS, fp8=True), exact_modulate(x, shift, scale), 2.0**-16)
        assert_quantized(kernel.gelu_bias(wide, bias, fp8=True), exact_gelu(wide, bias), 2.0**-16)
