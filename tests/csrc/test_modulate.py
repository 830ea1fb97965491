"""csrc/modulate on the host against plain torch: views, odd sizes, NaN in all that must not be read."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.kernel_types import RowwiseFP8
from dsa_engine.ops import reference
from tests.support.csrc.emulated import check_error, error

EPS = 1e-6
FLOOR = 2e-6  # float32 sums of up to 2176 terms in another order, once for the mean and once for the deviation
# dtype, B, F, S, C: one vector of channels, a part of a warp, Wan's width (a full warp), several warps a row
SHAPES = [
    (torch.bfloat16, 3, 1, 1, 8),
    (torch.bfloat16, 2, 3, 5, 200),
    (torch.bfloat16, 1, 3, 1, 1536),
    (torch.bfloat16, 1, 2, 3, 2176),
    (torch.float32, 2, 3, 3, 136),
    (torch.float32, 1, 1, 2, 2176),
    (torch.float16, 1, 2, 3, 64),
]


def activations(dtype, batch, frames, tokens, channels):
    """x, y [B, T, C] far from zero mean, as views of one tensor with NaN beside them."""
    both = torch.full((batch, frames * tokens, 2 * channels + 8), float("nan")).to(dtype)
    both[..., : 2 * channels] = 3 + 2 * torch.randn(batch, frames * tokens, 2 * channels)
    return both[..., :channels], both[..., channels : 2 * channels]


def modulations(dtype, batch, frames, _, channels):
    """gate, shift, scale [B, F, C], views of one tensor of the dtype, as `unbind` gives them."""
    return torch.randn(batch, frames, 3, channels).to(dtype).unbind(2)


def floats(*tensors):
    return tuple(t.float() if isinstance(t, torch.Tensor) else t for t in tensors)


def check(name, ours, plain, exact):
    """Plain tensors, or `RowwiseFP8` beside unrounded values."""
    if isinstance(ours, RowwiseFP8):
        assert ours.values.dtype == torch.float8_e4m3fn and ours.scale.dtype == torch.float32
        assert ours.scale.shape == plain.scale.shape
        assert error(ours.scale, plain.scale) <= FLOOR, f"{name}: the scales of the rows"
        ours, plain = (x.values.float() * x.scale for x in (ours, plain))
    check_error(name, ours, plain, exact, FLOOR)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_modulate(cuda_orders, shape, fp8):
    x, _ = activations(*shape)
    for dtype in {torch.float32, shape[0]}:
        _, shift, scale = modulations(dtype, *shape[1:])
        plain = reference.modulate(x, shift, scale, EPS, fp8)
        exact = reference.modulate(*floats(x, shift, scale, EPS))
        check("modulate", cuda_orders.modulate(x, shift, scale, EPS, fp8), plain, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_gate_residual(cuda_orders, shape):
    (x, y), (gate, *_) = activations(*shape), modulations(torch.float32, *shape[1:])
    plain, exact = reference.gate_residual(x, y, gate), reference.gate_residual(*floats(x, y, gate))
    check("gate_residual", cuda_orders.gate_residual(x, y, gate), plain, exact)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_modulate(cuda, shape, gated, fp8):
    """The norm is that of the sum that is returned: rounded."""
    cuda.csrc.set_order(5)
    (x, y), (gate, shift, scale) = activations(*shape), modulations(torch.float32, *shape[1:])
    gate = gate if gated else None
    total, normed = cuda.residual_modulate(x, y, gate, shift, scale, EPS, fp8)
    plain = reference.residual_modulate(x, y, gate, shift, scale, EPS, fp8)
    check("sum", total, plain[0], reference.residual_modulate(*floats(x, y, gate, shift, scale, EPS))[0])
    check(
        "norm",
        normed,
        reference.modulate(total, shift, scale, EPS, fp8),
        reference.modulate(*floats(total, shift, scale, EPS)),
    )


def test_one_vector_for_all_tokens(cuda):
    """[1, 1, C], as a plain LayerNorm's weight and bias have it, and a gate a frame."""
    shape = torch.bfloat16, 2, 3, 5, 200
    (x, y), (gate, *_) = activations(*shape), modulations(torch.float32, *shape[1:])
    shift, scale = torch.randn(2, 1, 1, 200).bfloat16()
    total, normed = cuda.residual_modulate(x, y, gate, shift, scale, EPS)
    check(
        "norm",
        normed,
        reference.modulate(total, shift, scale, EPS),
        reference.modulate(*floats(total, shift, scale, EPS)),
    )


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_bias(cuda_orders, shape, fp8):
    x = activations(*shape)[0] - 3
    x[0, 0, :8] = torch.tensor([-100.0, -8.0, -1e-3, 0.0, 1e-3, 8.0, 100.0, -3.0])
    for dtype in {torch.float32, shape[0]}:
        bias = torch.randn(shape[-1]).to(dtype)
        for part in (x, x[0, 0]):
            exact = reference.gelu_bias(*floats(part, bias))
            plain = reference.gelu_bias(part, bias, fp8)
            check("gelu_bias", cuda_orders.gelu_bias(part, bias, fp8), plain, exact)


def test_a_row_of_zeros_has_scale_one(cuda):
    out = cuda.gelu_bias(torch.zeros(1, 2, 16), torch.zeros(16), fp8=True)
    assert out.scale.eq(1).all() and out.values.float().eq(0).all()


def test_equal_channels_have_no_variance_and_give_the_shift(cuda):
    _, shift, scale = modulations(torch.float32, 1, 2, 1, 136)
    out = cuda.modulate(torch.full((1, 2, 136), 7.0), shift, scale, EPS)
    assert torch.equal(out, shift)


def test_nan_stays_in_its_row(cuda):
    x = torch.randn(1, 6, 64)
    x[0, 1, 3] = float("nan")
    shift = torch.zeros(1, 1, 64)
    rows = cuda.modulate(x, shift, shift, EPS).isnan().any(-1)[0]
    assert rows.tolist() == [False, True, False, False, False, False]


def test_refusals_name_the_value_and_the_rule(cuda):
    x, shift = torch.randn(1, 4, 64), torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="modulate: shift of torch.bfloat16 must be float32 or torch.float32"):
        cuda.modulate(x, shift.bfloat16(), shift, EPS)
    with pytest.raises(ValueError, match="gate_residual: y of torch.float16 must be of x's dtype, torch.float32"):
        cuda.gate_residual(x, x.half(), shift)
    with pytest.raises(ValueError, match="modulate: C = 4 must be a multiple of 8 .* nearest is 8"):
        cuda.modulate(x[..., :4].contiguous(), shift[..., :4].contiguous(), shift[..., :4].contiguous(), EPS)
    with pytest.raises(ValueError, match="gelu_bias: x .* rows must be contiguous"):
        cuda.gelu_bias(torch.randn(1, 64, 4).transpose(1, 2), shift[0, 0])
