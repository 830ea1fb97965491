"""The patched interpreter: small floats round, multiply and raise as they should, against torch and float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.support import interpreter

interpreter.install()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter")

SMALL = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def masked_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < N // 2, other=1.5))


@triton.jit
def add_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(x + at))


def same(a, b):
    """Equal bit by bit, NaN of any kind counting as NaN."""
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def hostile(dtype):
    """float32 numbers at which a rounding to dtype may go wrong: all of its numbers, the ties between neighbours, what
    lies next to a tie, numbers beyond its range and below its smallest, NaN."""
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    numbers = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    numbers = numbers[:: max(1, len(numbers) // 4096)] if dtype.itemsize == 2 else numbers
    above = torch.nextafter(numbers.to(dtype).float(), torch.tensor(float("inf")))
    ties = (numbers[1:] + numbers[:-1]) / 2
    top = torch.finfo(dtype).max
    odd = torch.tensor([0.0, -0.0, float("nan"), top, -top, 1e-40, 1e-30, -1e-9, 3.14159])
    x = torch.cat((numbers, above, ties, torch.nextafter(ties, ties * 2), odd, 3 * torch.randn(500)))
    return torch.cat((x, torch.zeros(triton.next_power_of_2(len(x)) - len(x))))


@pytest.mark.parametrize("dtype", SMALL)
def test_casts_round_to_nearest_even(dtype):
    x = hostile(dtype)
    out = torch.zeros(len(x), dtype=dtype)
    cast_kernel[(1,)](x, out, len(x))
    top = torch.finfo(dtype).max
    assert same(out, (x.clamp(-top, top) if dtype.itemsize == 1 else x).to(dtype))


def test_numbers_beyond_fp8_become_its_largest():
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](torch.tensor([1e6, -470.0, float("inf"), float("nan")]), out, 4)
    assert out[:3].float().tolist() == [448, -448, 448] and out[3].isnan()


def test_bfloat16_ties_go_both_ways():
    """1 + 2^-8 lies between 1 and 1 + 2^-7 and goes down, 1 + 3 * 2^-8 goes up: truncation would send both down."""
    out = torch.zeros(2, dtype=torch.bfloat16)
    cast_kernel[(1,)](torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]), out, 2)
    assert out.tolist() == [1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", SMALL)
def test_casts_back_are_exact(dtype):
    x = torch.arange(256, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    for wide in (torch.float32, torch.float16) if dtype.itemsize == 1 else (torch.float32,):
        out = torch.zeros(256, dtype=wide)
        cast_kernel[(1,)](x, out, 256)
        assert same(out, x.to(wide))


@pytest.mark.parametrize("source", [torch.int32, torch.float16])
def test_other_types_become_bfloat16_by_value(source):
    x = torch.tensor([0, 1, -7, 257]).to(source)
    out = torch.zeros(4, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, 4)
    assert torch.equal(out, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, *SMALL])
def test_dot_multiplies_numbers(dtype):
    """Products of such numbers fit float32, so only its sums round."""
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.full((32, 32), float("nan"))
    dot_kernel[(1,)](a, b, out, 32)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_masked_loads_fill_in_a_number(dtype):
    x = torch.randn(8).to(dtype)
    out = torch.zeros(8, dtype=dtype)
    masked_kernel[(1,)](x, out, 8)
    assert out.float().tolist() == [*x[:4].float().tolist(), *[1.5] * 4]


def test_arithmetic_on_raw_bits_raises():
    x = torch.randn(4).bfloat16()
    with pytest.raises(Exception, match="arithmetic on bf16"):
        add_kernel[(1,)](x, torch.zeros_like(x), 4)


def test_installing_twice_changes_nothing():
    before = dict(vars(interpreter.InterpreterBuilder))
    interpreter.install()
    assert vars(interpreter.InterpreterBuilder) == before
