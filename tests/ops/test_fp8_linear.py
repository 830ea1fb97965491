"""Rows in e4m3 and their GEMM: the reference against closed forms in float64, the Triton kernel and the call of the
tensor cores against float64 beside the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import RowwiseFP8, reference
from dsa_engine.triton_kernels import fp8_linear as kernel
from tests.support.kernels import DEVICE, DTYPES, compare, poison, poisoned_memory

HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="e4m3 needs compute capability 8.9")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
BACKENDS = [pytest.param(reference, id="reference"), pytest.param(kernel, id="triton", marks=needs_fp8)]


def surrounded(*shape, dtype, scale=1.0, offset=0.0):
    """Random rows between NaN, which must not be read."""
    buffer = poison(math.prod(shape) + 64, dtype=dtype)
    x = buffer[32:-32].view(shape)
    return x.copy_(offset + scale * torch.randn(shape, device=DEVICE))


def assert_quantized(got: RowwiseFP8, exact: torch.Tensor, slack: float = 2.0**-20) -> None:
    """got is exact [..., C] (float64) by rows: scales max / 448, and values within half a step of e4m3.

    slack: relative error that what was quantized may have. Any other rounding is off by up to a whole step.
    """
    values, scale, exact = got.values.double().cpu(), got.scale.double().cpu(), exact.double().cpu()
    assert got.values.dtype == torch.float8_e4m3fn and got.scale.dtype == torch.float32
    assert values.shape == exact.shape and scale.shape == (*exact.shape[:-1], 1)
    top = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, torch.where(top > 0, top / 448, 1.0), rtol=slack, atol=0)
    ratio = exact / scale
    step = torch.exp2((torch.frexp(ratio).exponent - 1).clamp(min=-6) - 3.0)
    error = (values - ratio).abs()
    assert (error <= step / 2 + 448 * slack).all(), f"worst by {(error - step / 2).max():.3g} more than half a step"


def random_rows(rows, channels, dtype, low=-8.0, high=8.0):
    """Rows of unlike size, the last of zeros."""
    x = torch.randn(rows, channels) * torch.exp2(torch.empty(rows, 1).uniform_(low, high))
    x[-1] = 0
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("op", BACKENDS)
def test_each_row_has_its_own_scale(op):
    x = torch.tensor([[448.0, -3.0, 0.0], [1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], device=DEVICE)
    values, scale = op.quantize(x)
    expected = torch.tensor([[1.0], [2 / 448], [1.0]])
    torch.testing.assert_close(scale.cpu(), expected, rtol=1e-7, atol=0)
    assert values.float().tolist() == [[448.0, -3.0, 0.0], [224.0, -448.0, 112.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("op", BACKENDS)
def test_ties_go_to_the_even_number(op):
    """The row's maximum makes its scale 1, so that ties stay ties; 2^-10 is half of the smallest number."""
    ties = {
        17.0: 16.0,
        19.0: 20.0,
        -17.0: -16.0,
        -19.0: -20.0,
        1.0625: 1.0,
        1.1875: 1.25,
        432.0: 448.0,
        400.0: 384.0,
        15.5: 16.0,
        2**-10: 0.0,
        3 * 2**-10: 2**-8,
    }
    values, scale = op.quantize(torch.tensor([[448.0, *ties]], device=DEVICE))
    assert scale.item() == 1 and values.float()[0, 1:].tolist() == list(ties.values())


@pytest.mark.parametrize("op", BACKENDS)
def test_every_number_of_e4m3_comes_back(op):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].to(DEVICE)
    values, scale = op.quantize(2.0**-20 * finite[None])
    assert scale.item() == 2.0**-20 and torch.equal(values.float()[0], finite)


@needs_fp8
def test_the_smallest_of_rows_stay_finite():
    """448 / max overflows there, and 0 * inf would be NaN."""
    x = torch.tensor([[1e-38, 0.0], [1e-44, 0.0], [0.0, -0.0]], device=DEVICE)
    values, scale = kernel.quantize(x)
    assert values.float().isfinite().all() and (values.float() * scale - x).abs().max() < 1e-38


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 4), channels=st.integers(1, 300))
def test_the_kernel_of_quantize(dtype, rows, channels):
    x = surrounded(rows, channels, dtype=dtype)
    x.copy_(random_rows(rows, channels, dtype))
    with poisoned_memory():
        assert_quantized(kernel.quantize(x), x)
    assert_quantized(reference.quantize(x), x)


@needs_fp8
@pytest.mark.parametrize("shape", [(2, 3, 1536), (1, 1, 8960), (0, 16)])
def test_the_kernel_keeps_the_shape(shape):
    x = torch.randn(shape, device=DEVICE).bfloat16()
    with poisoned_memory():
        got = kernel.quantize(x)
    assert got.values.shape == shape and got.scale.shape == (*shape[:-1], 1)
    if x.numel():
        assert_quantized(got, x)


def test_how_a_row_is_split():
    """Little padding at the models' widths, and all of every row; 16 bytes of the widest tensor per thread."""
    assert kernel.row_split(torch.empty(1536).bfloat16(), torch.empty(1536)) == (1024, 512, 4, 1)
    assert kernel.row_split(torch.empty(8960).bfloat16()) == (8192, 1024, 8, 8)
    assert kernel.row_split(torch.empty(128)) == (64, 64, 4, 1)
    for channels in range(1, 3000, 7):
        head, tail, *_ = kernel.row_split(torch.empty(channels))
        assert channels <= head + tail < 2 * channels + 2
        assert head & (head - 1) == tail & (tail - 1) == 0


def exact_gemm(x: RowwiseFP8, weight: RowwiseFP8, bias=None):
    """float64, dequantized."""
    x, weight = (q.values.double() * q.scale.double() for q in (x, weight))
    return x @ weight.T + (0 if bias is None else bias.double())


def quantized_operands(rows, inputs, outputs):
    """Tokens [1, rows, K], weights [N, K] and a bias, with channels and tokens of unlike size."""
    x = reference.quantize(random_rows(rows, inputs, torch.float32, -3, 3)[None])
    weight = reference.quantize(random_rows(outputs, inputs, torch.float32, -6, 0))
    return x, weight, torch.randn(outputs, device=DEVICE).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 3, 2), (5, 32, 16), (3, 96, 40)])
def test_the_reference_multiplies_what_the_numbers_stand_for(rows, inputs, outputs, biased, close):
    x, weight, bias = quantized_operands(rows, inputs, outputs)
    bias = bias if biased else None
    close(reference.fp8_linear(x, weight, bias, torch.float32), exact_gemm(x, weight, bias), rel=1e-6)


def test_an_input_that_is_not_quantized_is(close):
    x, weight = torch.randn(2, 3, 32), reference.quantize(torch.randn(16, 32))
    close(ops.fp8_linear(x, weight, None, torch.float32), exact_gemm(reference.quantize(x), weight), rel=1e-6)


def test_fp8_costs_a_few_percent():
    """Of the root mean square: three bits of mantissa are off by 3.6 % at most on average."""
    x, weight = torch.randn(64, 256), torch.randn(64, 256)
    exact = x.double() @ weight.double().T
    error = ops.fp8_linear(x, reference.quantize(weight), dtype=torch.float32).double() - exact
    assert 0.005 < (error.square().mean() / exact.square().mean()).sqrt() < 0.05


@needs_fp8
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(5, 16, 32), (21, 1536, 48), (16, 96, 16)])
def test_the_product_of_the_tensor_cores(rows, inputs, outputs, biased):
    x, weight, bias = quantized_operands(rows, inputs, outputs)
    bias = bias if biased else None
    out = kernel.fp8_linear(x, weight, bias, torch.bfloat16)
    compare(out, reference.fp8_linear(x, weight, bias, torch.bfloat16), exact_gemm(x, weight, bias))


def test_how_the_tensor_cores_are_called(monkeypatch):
    """What cuBLAS takes for one scale a row: row-major times column-major, scales [M, 1] and [1, N] in float32, bias in
    the dtype of the output, and sums in float32."""
    seen = {}

    def scaled_mm(a, b, **options):
        seen.update(a=a, b=b, **options)
        return torch.zeros(a.shape[0], b.shape[1], dtype=options["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight, _ = quantized_operands(6, 32, 48)
    x = RowwiseFP8(x.values.view(2, 3, 32), x.scale.view(2, 3, 1))
    out = kernel.fp8_linear(x, weight, torch.randn(48), torch.bfloat16)
    assert out.shape == (2, 3, 48) and out.dtype == torch.bfloat16
    assert seen["a"].shape == (6, 32) and seen["a"].stride() == (32, 1)
    assert seen["b"].shape == (32, 48) and seen["b"].stride() == (1, 32)
    for name, shape in (("scale_a", (6, 1)), ("scale_b", (1, 48))):
        assert seen[name].shape == shape and seen[name].is_contiguous() and seen[name].dtype == torch.float32
    assert seen["bias"].dtype == seen["out_dtype"] == torch.bfloat16
    assert seen["use_fast_accum"] is False


@pytest.mark.parametrize("inputs, outputs, near", [(40, 32, "[32, 32]"), (32, 8, "[16, 32]"), (1544, 50, "[48, 1536]")])
def test_sizes_off_the_tensor_cores_are_named(inputs, outputs, near):
    x, weight, _ = quantized_operands(2, inputs, outputs)
    with pytest.raises(ValueError, match="multiples of 16") as error:
        kernel.fp8_linear(x, weight, None, torch.bfloat16)
    assert f"weight [{outputs}, {inputs}]" in str(error.value) and near in str(error.value)


def test_another_dtype_is_named():
    x, weight, _ = quantized_operands(2, 16, 16)
    with pytest.raises(ValueError, match=r"torch.float16.*torch.bfloat16"):
        kernel.fp8_linear(x, weight, None, torch.float16)


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match=r"x \[2, 32\] and weight \[16, 48\]"):
        ops.fp8_linear(torch.randn(2, 32), reference.quantize(torch.randn(16, 48)))


@pytest.mark.gpu
@needs_gpu
@needs_fp8
@pytest.mark.parametrize("inputs, outputs", [(1536, 1536), (1536, 8960), (8960, 1536)])
def test_the_products_of_wan_on_a_gpu(inputs, outputs):
    x = torch.randn(1, 4680, inputs, device=DEVICE).bfloat16()
    quantized, weight = kernel.quantize(x), kernel.quantize(torch.randn(outputs, inputs, device=DEVICE))
    assert_quantized(quantized, x)
    bias = torch.randn(outputs, device=DEVICE).bfloat16()
    out = kernel.fp8_linear(quantized, weight, bias, torch.bfloat16)
    exact = exact_gemm(quantized, weight, bias)
    # Tensor cores add up 128 products at a time with some 14 bits before float32 takes over: more than one rounding to
    # bfloat16, and 100 times less than what e4m3 has lost.
    error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4e-3
