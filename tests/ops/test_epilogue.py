"""The end of a denoising step: the clean estimate and the re-noising against element-wise arithmetic in float64 and the
flow they invert; then the whole, reference and Triton kernels, against float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_engine import ops
from dsa_engine.ops import FinalLayer, HeadWeights, StopRule, reference
from dsa_engine.triton_kernels import epilogue as kernel
from tests.ops.test_fp8_linear import needs_gpu, surrounded
from tests.support.kernels import DEVICE, DTYPES, compare, poison, poisoned_memory

EPS = 1e-6
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


# From here on the whole end of a step: the reference against float64, the Triton kernels against float64 beside it.


class Step(NamedTuple):
    """The arguments of `epilogue`, in its order."""

    hidden: Tensor
    time: Tensor
    x: Tensor
    noise: Tensor
    sigma: Tensor
    next_sigma: Tensor
    final: FinalLayer
    head: HeadWeights | None
    rule: StopRule
    eps: float = EPS


def rules(step, min_steps, max_steps, reduce, threshold):
    integers = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (step, min_steps, max_steps, reduce)]
    return StopRule(*integers, torch.tensor(threshold, dtype=torch.float32, device=DEVICE))


def random_step(batch, frames, grid, channels, latent=4, patch=2, dtype=torch.float32, units=20) -> Step:
    """Rows and frames that differ in everything; hidden states and latents between NaN."""
    height, width = (patch * n for n in grid)
    outputs = patch * patch * latent

    def weights(*shape):
        return torch.randn(shape, device=DEVICE).div(shape[-1] ** 0.5 if len(shape) > 1 else 1).to(dtype)

    vectors = torch.randn(batch, frames, 2, channels, device=DEVICE).unbind(2)
    rule = rules([2] * batch, [1] * batch, [4] * batch, [b % 3 for b in range(batch)], [0.5] * batch)
    return Step(
        surrounded(batch, frames * math.prod(grid), channels, dtype=dtype, scale=3.0, offset=1.0),
        torch.randn(batch, frames, channels, device=DEVICE).to(dtype),
        surrounded(batch, frames, latent, height, width, dtype=dtype),
        surrounded(batch, frames, latent, height, width, dtype=dtype),
        *torch.rand(2, batch, frames, device=DEVICE),
        FinalLayer(*vectors, weights(outputs, channels), weights(outputs)),
        HeadWeights(weights(units, 3 * channels), weights(units), weights(1, units), weights(1)),
        rule,
    )


def layer_norm(x):
    x = x.double() - x.double().mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def exact_latents(s: Step):
    """x0 and the next x in float64; each output of each token is put to its place by itself."""
    batch, frames, latent, height, width = s.x.shape
    patch = math.isqrt(s.final.weight.shape[0] // latent)
    tokens = layer_norm(s.hidden).unflatten(1, (frames, -1))
    shift, scale = (m.double()[:, :, None] for m in s.final[:2])
    products = (tokens * (1 + scale) + shift) @ s.final.weight.double().T + s.final.bias.double()
    velocity = torch.empty(s.x.shape, dtype=torch.float64, device=DEVICE)
    for token, output in itertools.product(range(products.shape[2]), range(products.shape[3])):
        line, column = divmod(token, width // patch)
        place, channel = divmod(output, latent)
        down, right = divmod(place, patch)
        velocity[:, :, channel, line * patch + down, column * patch + right] = products[:, :, token, output]
    sigma, level = (x.double()[:, :, None, None, None] for x in (s.sigma, s.next_sigma))
    x0 = s.x.double() - sigma * velocity
    return x0, (1 - level) * x0 + level * s.noise.double()


def exact_confidence(s: Step):
    h = layer_norm(s.hidden).unflatten(1, (s.x.shape[1], -1))
    features = torch.cat((h.mean(2), (h.var(2, correction=0) + EPS).sqrt(), s.time.double()), dim=-1)
    w1, b1, w2, b2 = (w.double() for w in s.head)
    units = features @ w1.T + b1
    return torch.sigmoid((units * torch.sigmoid(units)) @ w2[0] + b2)


def stops(confidence: list[float], step, min_steps, max_steps, reduce, threshold) -> bool:
    """The rule in words; a frame whose confidence is not a number makes the row unconfident."""
    if step >= max_steps:
        return True
    value = [min, lambda c: sum(c) / len(c), max][reduce](confidence)
    return step >= min_steps and not any(map(math.isnan, confidence)) and value >= threshold


GRIDS = st.sampled_from(((1, 1), (1, 5), (3, 7), (4, 4), (3, 11)))


@pytest.mark.parametrize("patch, latent", [(1, 3), (2, 4), (2, 16)])
def test_the_reference_of_the_whole(patch, latent, close):
    s = random_step(2, 3, (2, 3), 24, latent, patch)
    out = reference.epilogue(*s)
    x0, x = exact_latents(s)
    close(out.x0, x0, rel=1e-5)
    close(out.x, x, rel=1e-5)
    close(out.state[:, :3], exact_confidence(s), rel=1e-5)
    expected = [stops(c, 2, 1, 4, b % 3, 0.5) for b, c in enumerate(out.state[:, :3].tolist())]
    assert out.state[:, 3].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=5)
@given(batch=st.integers(1, 2), frames=st.integers(1, 3), grid=GRIDS, channels=st.sampled_from((24, 96, 128)))
def test_the_kernels_of_the_whole(dtype, batch, frames, grid, channels):
    check_kernels(random_step(batch, frames, grid, channels, dtype=dtype))


@pytest.mark.parametrize("patch, latent", [(1, 16), (2, 16), (3, 5)])
def test_the_kernels_with_other_patches(patch, latent):
    """Outputs a power of two or not, fewer than a tile of the tensor cores or more."""
    check_kernels(random_step(1, 2, (2, 5), 64, latent, patch, torch.bfloat16))


def test_the_kernels_at_the_width_of_wan():
    check_kernels(random_step(1, 1, (2, 10), 1536, 16, dtype=torch.bfloat16))


def check_kernels(s: Step):
    with poisoned_memory():
        out = kernel.epilogue(*s)
    plain, (x0, x), frames = reference.epilogue(*s), exact_latents(s), s.x.shape[1]
    compare(out.x0, plain.x0, x0)
    compare(out.x, plain.x, x)
    compare(out.state[:, :frames], plain.state[:, :frames], exact_confidence(s))
    for row, *rule in zip(out.state.tolist(), *(x.tolist() for x in s.rule)):
        assert row[-1] == stops(row[:-1], *rule)


@pytest.mark.parametrize("op", [reference, kernel])
def test_without_a_head_rows_stop_by_count(op):
    """No confidence, whatever the threshold; the hidden states are not pooled, so `time` may be anything."""
    s = random_step(4, 2, (1, 3), 24)
    s = s._replace(
        head=None, time=poison(4, 2, 24), rule=rules([1, 2, 3, 4], [0] * 4, [3] * 4, [0, 1, 2, 1], [0.0] * 4)
    )
    out = op.epilogue(*s)
    assert out.state[:, :2].isnan().all() and out.state[:, 2].tolist() == [0, 0, 1, 1]
    x0, x = exact_latents(s)
    compare(out.x0, reference.epilogue(*s).x0, x0)
    compare(out.x, reference.epilogue(*s).x, x)


@pytest.mark.parametrize("op", [reference, kernel])
def test_logits_that_are_there_already_are_taken_as_they_are(op):
    """One frame is NaN: its row is never confident. The latents are those of a step without a head."""
    s = random_step(2, 3, (1, 3), 24)
    logits = torch.tensor([[0.5, -1.0, 3.0], [4.0, float("nan"), 4.0]], device=DEVICE)
    rule = rules([2, 2], [1, 1], [4, 4], [2, 1], [0.9, 0.1])
    out, without = (op.epilogue(*s._replace(head=head, time=poison(2, 3, 24), rule=rule)) for head in (logits, None))
    torch.testing.assert_close(out.state[:, :3], 1 / (1 + torch.exp(-logits)), equal_nan=True)
    assert out.state[:, 3].tolist() == [1, 0]
    assert torch.equal(out.x0, without.x0) and torch.equal(out.x, without.x)


def with_logits(logits: list[list[float]]) -> Step:
    """A step whose frames have these logits: the MLP passes on the first channel of `time`, raised so that SiLU is the
    identity and lowered again at the end."""
    batch, frames, channels, raised = len(logits), len(logits[0]), 24, 40.0
    s = random_step(batch, frames, (1, 2), channels, units=3)
    s.time[:, :, 0] = torch.tensor(logits) + raised
    weight1, weight2 = torch.zeros(3, 3 * channels, device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    weight1[1, 2 * channels] = weight2[0, 1] = 1
    bias2 = torch.full((1,), -raised, device=DEVICE)
    return s._replace(head=HeadWeights(weight1, torch.zeros(3, device=DEVICE), weight2, bias2))


@st.composite
def decisions(draw):
    """Logits [B, F], now and then NaN, and a rule for each row."""
    frames, number = draw(st.integers(1, 5)), st.one_of(st.floats(-4, 4, width=16), st.just(float("nan")))
    rows = draw(st.lists(st.lists(number, min_size=frames, max_size=frames), min_size=1, max_size=4))
    counts = st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 2), st.sampled_from((0.0, 0.25, 0.5, 0.9, 2.0)))
    return rows, [draw(counts) for _ in rows]


@pytest.mark.parametrize("op", [reference, kernel])
@settings(max_examples=10)
@given(case=decisions())
def test_the_decision_of_each_row(op, case):
    logits, per_row = case
    s = with_logits(logits)._replace(rule=rules(*zip(*per_row)))
    state = op.epilogue(*s).state.double().cpu()
    torch.testing.assert_close(
        state[:, :-1], torch.tensor(logits).double().sigmoid(), rtol=0, atol=2e-6, equal_nan=True
    )
    for row, rule in zip(state.tolist(), per_row):
        value = [min(row[:-1]), sum(row[:-1]) / len(row[:-1]), max(row[:-1])][rule[3]]
        if not abs(value - rule[4]) < 1e-6:  # at the threshold rounding decides
            assert row[-1] == stops(row[:-1], *rule)


@pytest.mark.parametrize("op", [reference, kernel])
def test_the_threshold_itself_is_enough(op):
    s = with_logits([[0.0, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    s = s._replace(rule=rules([1] * 4, [1, 2, 1, 1], [4] * 4, [0, 0, 2, 0], [0.5] * 4))
    assert op.epilogue(*s).state[:, -1].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("op", [reference, kernel])
def test_a_frame_that_is_not_a_number_makes_its_row_unconfident(op):
    """Whichever of the three is asked for, and wherever the frame is; `max_steps` still ends the row."""
    nan = float("nan")
    s = with_logits([[nan, 3.0, 3.0], [3.0, nan, 3.0], [3.0, 3.0, nan], [3.0, 3.0, 3.0], [nan, 3.0, 3.0]])
    s = s._replace(rule=rules([2] * 5, [1] * 5, [4, 4, 4, 4, 2], [0, 1, 2, 0, 0], [0.5] * 5))
    assert op.epilogue(*s).state[:, -1].tolist() == [0, 0, 0, 1, 1]


def test_frames_and_rows_do_not_mix():
    """NaN in the hidden states of one frame reaches its latents and its confidence alone."""
    s = random_step(2, 3, (1, 5), 24, dtype=torch.bfloat16)
    s.hidden[1, 5:10] = float("nan")
    spoilt = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    spoilt[1, 1] = True
    out = kernel.epilogue(*s)
    for latents in (out.x0, out.x):
        assert torch.equal(latents.flatten(2).isnan().any(-1), spoilt)
    assert torch.equal(out.state[:, :3].isnan(), spoilt)


def test_the_next_input_comes_from_the_rounded_estimate():
    """One rounding away from what is returned as x0; from the unrounded one it would be up to twice as far."""
    s = random_step(1, 2, (3, 7), 24, dtype=torch.bfloat16)
    out = kernel.epilogue(*s)
    level = s.next_sigma.double()[:, :, None, None, None]
    exact = (1 - level) * out.x0.double() + level * s.noise.double()
    compare(out.x, reference.renoise(out.x0, s.noise, s.next_sigma), exact, factor=1.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["velocity_to_x0", "renoise"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 4, 7, 5), (1, 2, 16, 10, 8)])
def test_the_element_wise_kernels(name, shape, dtype):
    a, b = (surrounded(*shape, dtype=dtype) for _ in range(2))
    sigma = torch.rand(shape[:2], device=DEVICE)
    s = sigma.double()[:, :, None, None, None]
    exact = a.double() - s * b.double() if name == "velocity_to_x0" else (1 - s) * a.double() + s * b.double()
    with poisoned_memory():
        out = getattr(kernel, name)(a, b, sigma)
    compare(out, getattr(reference, name)(a, b, sigma), exact)


def test_the_element_wise_kernels_at_the_ends_of_the_schedule():
    x0, noise = torch.randn(2, 1, 2, 3, 4, 4, device=DEVICE)
    one, zero = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    assert torch.equal(kernel.renoise(x0, noise, one), noise)
    assert torch.equal(kernel.renoise(x0, noise, zero), x0)
    assert torch.equal(kernel.velocity_to_x0(x0, noise, zero), x0)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: {"head": torch.zeros(1, 3)}, r"logits torch.float32 \[1, 3\] must be float32 \[1, 2\]"),
        (lambda s: {"head": torch.zeros(1, 2).half()}, r"logits torch.float16 \[1, 2\] must be float32 \[1, 2\]"),
        (lambda s: {"hidden": s.hidden[:, :-1]}, r"hidden \[1, 11, 24\], x \[1, 2, 4, 4, 6\] and weight \[16, 24\]"),
        (lambda s: {"final": s.final._replace(weight=s.final.weight[:12])}, r"weight \[12, 24\]"),
        (lambda s: {"noise": s.noise[:, :1]}, r"noise \[1, 1, 4, 4, 6\]"),
        (lambda s: {"next_sigma": s.next_sigma[:, :1]}, r"next_sigma \[1, 1\]"),
        (lambda s: {"time": s.time[..., :-1]}, r"time \[1, 2, 23\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, match):
    s = random_step(1, 2, (2, 3), 24)
    with pytest.raises(ValueError, match=match):
        ops.epilogue(*s._replace(**change(s)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_wan_on_a_gpu(batch):
    """Real shapes, and the same result every time: nothing is added up in the order of arrival."""
    s = random_step(batch, 3, (30, 52), 1536, 16, dtype=torch.bfloat16, units=768)
    check_kernels(s)
    first, again = kernel.epilogue(*s), kernel.epilogue(*s)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
