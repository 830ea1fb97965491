"""csrc/epilogue on the host against plain torch: tiles with a rest, views, NaN beside the tokens, all stop rules."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsa_engine.kernel_types import Epilogue, FinalLayer, HeadWeights, StopRule
from dsa_engine.ops import reference
from tests.support.csrc.emulated import check_error

EPS = 1e-6
UNITS = 136  # of the hidden layer: every block has some, the first ones twice
FLOOR = 3e-6  # float32 sums of up to 1536 products in another order, and the statistics before them
# dtype, latent dtype, B, F, c, rows and columns of the token grid, C, patch
SHAPES = [
    (torch.bfloat16, torch.bfloat16, 1, 1, 3, 5, 7, 136, 2),  # three tiles of 16 tokens, the last with 3; P = 12
    (torch.bfloat16, torch.float32, 2, 1, 4, 7, 9, 64, 2),  # tiles of 32, the last with 31
    (torch.bfloat16, torch.bfloat16, 2, 3, 16, 7, 9, 200, 2),  # tiles of 48, the last with 15; P = 64
    (torch.bfloat16, torch.bfloat16, 1, 2, 16, 2, 3, 1536, 2),  # Wan's width
    (torch.float16, torch.float16, 2, 2, 5, 3, 3, 72, 3),  # patches of 3 x 3; P = 45
    (torch.float32, torch.float32, 2, 3, 4, 5, 7, 136, 1),
]


def rule_for(batch, step=2, min_steps=1, max_steps=4, reduce=1, threshold=0.5):
    counts = (torch.full((batch,), n, dtype=torch.int32) for n in (step, min_steps, max_steps, reduce))
    return StopRule(*counts, torch.full((batch,), threshold))


def inputs(shape, head=True):
    """Everything that `epilogue` reads. hidden is far from zero mean and has NaN beside it."""
    dtype, latent_dtype, batch, frames, c, rows, columns, width, patch = shape
    outputs = c * patch**2
    hidden = torch.full((batch, frames * rows * columns, width + 8), float("nan")).to(dtype)
    per_channel = 2 * torch.randn(width)
    hidden[..., :width] = 5 + per_channel + torch.randn(batch, frames * rows * columns, width)
    x, noise = torch.randn(2, batch, frames, c, rows * patch, columns * patch).to(latent_dtype)
    shift, scale = torch.randn(batch, frames, 2, width).unbind(2)
    final = FinalLayer(shift, scale, torch.randn(outputs, width).to(dtype) / width**0.5, torch.randn(outputs).to(dtype))
    weights = HeadWeights(
        torch.randn(UNITS, 3 * width).to(dtype) / width**0.5,
        torch.randn(UNITS).to(dtype),
        torch.randn(1, UNITS).to(dtype),
        torch.randn(1).to(dtype),
    )
    time = torch.randn(batch, frames, width + 8).to(dtype)[..., :width]
    sigma, next_sigma = torch.rand(2, batch, 1).expand(-1, -1, frames)  # as the engine hands them over
    return [hidden[..., :width], time, x, noise, sigma, next_sigma, final, weights if head else None]


def floats(args):
    """The same values in float32, so that nothing is rounded in between."""
    exact = lambda a: a.float() if isinstance(a, torch.Tensor) else a and type(a)(*(t.float() for t in a))  # noqa: E731
    return [exact(a) for a in args]


def logits(state):
    return state[:, :-1].double().logit()


@pytest.mark.parametrize("shape", SHAPES)
def test_latents_and_confidence(cuda_orders, shape):
    args, rule = inputs(shape), rule_for(shape[2])
    ours = cuda_orders.epilogue(*args, rule, EPS)
    plain, exact = reference.epilogue(*args, rule, EPS), reference.epilogue(*floats(args), rule, EPS)
    assert ours.x0.dtype == ours.x.dtype == shape[1] and ours.state.shape == plain.state.shape
    check_error("x0", ours.x0, plain.x0, exact.x0, FLOOR)
    check_error("x", ours.x, plain.x, exact.x, FLOOR)
    check_error("confidence", logits(ours.state), logits(plain.state), logits(exact.state), FLOOR)
    assert torch.equal(ours.state[:, -1], reference.stop_flags(ours.state[:, :-1], rule).float())


def test_the_statistics_survive_a_large_common_part(cuda):
    """Every token has the same large part: sums of squares would lose the deviation, Chan's formula keeps it."""
    shape = torch.float32, torch.float32, 1, 1, 4, 9, 9, 64, 2
    args = inputs(shape)
    args[0] = 100 * torch.randn(64) + 0.1 * torch.randn(1, 81, 64)
    weights = args[-1]._replace(weight1=torch.zeros(UNITS, 192))
    weights.weight1[:, 64:128] = 100 * torch.randn(UNITS, 64)  # the deviations alone
    args[-1] = weights
    ours = cuda.epilogue(*args, rule_for(1), EPS)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    y = torch.nn.functional.layer_norm(doubles[0], (64,), eps=EPS)
    deviation = (y.var(1, correction=0) + EPS).sqrt()
    hidden = torch.nn.functional.silu(deviation @ weights.weight1[:, 64:128].double().T + weights.bias1.double())
    exact = hidden @ weights.weight2.double().T + weights.bias2.double()
    assert (logits(ours.state) - exact).abs().max() < 1e-4 * exact.abs().max().clamp(min=1)


def test_results_do_not_depend_on_the_order_of_threads(cuda):
    args, rule = inputs(SHAPES[2]), rule_for(2)
    results = []
    for order in (0, 1, 7):
        cuda.csrc.set_order(order)
        results.append(cuda.epilogue(*args, rule, EPS))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_views_of_a_batch_of_noise(cuda):
    """Noise drawn for all steps at once, and latents inside of a longer clip."""
    args = inputs(SHAPES[2])
    args[2] = torch.cat((torch.full_like(args[2], float("nan")), args[2]), dim=1)[:, 3:]
    args[3] = torch.stack((torch.full_like(args[3], float("nan")), args[3]), dim=1)[:, 1]
    ours, same = (
        cuda.epilogue(*a, rule_for(2), EPS) for a in (args, [*args[:2], *(t.clone() for t in args[2:4]), *args[4:]])
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, same))


def every_rule():
    """One row for each way of reducing, side of the threshold, and place between min_steps and max_steps."""
    places = [(1, 2, 4), (2, 2, 4), (4, 2, 4), (5, 2, 4), (1, 2, 1)]
    rows = list(itertools.product(places, range(3), (0.0, 0.4, 0.6, 1.0)))
    counts = torch.tensor([(*place, reduce) for place, reduce, _ in rows], dtype=torch.int32)
    return StopRule(*(c.contiguous() for c in counts.unbind(1)), torch.tensor([threshold for *_, threshold in rows]))


@pytest.mark.parametrize("head", ["none", "weights", "logits"])
def test_every_rule_stops_whom_it_should(cuda_orders, head):
    """60 rows in one call. Three of them, one for each way of reducing, would stop for their confidence at a threshold
    of 0, but one of their frames is NaN: they are never confident."""
    rule = every_rule()
    batch = len(rule.step)
    args = inputs((torch.float32, torch.float32, batch, 3, 1, 1, 2, 8, 1), head == "weights")
    args[0][[12, 16, 20], 2, 3] = float("nan")
    if head == "logits":
        args[-1] = torch.randn(batch, 3)
        args[-1][[12, 16, 20], 1] = float("nan")
    state = cuda_orders.epilogue(*args, rule, EPS).state
    exact = reference.epilogue(*args, rule, EPS).state
    assert torch.equal(state[:, -1], exact[:, -1]) and 0 < state[:, -1].sum() < batch
    assert torch.equal(state.isnan(), exact.isnan()) and (head == "none" or state[20, 1].isnan())
    torch.testing.assert_close(state, exact, rtol=0, atol=1e-5, equal_nan=True)


def test_a_head_changes_nothing_but_the_state(cuda):
    args = inputs(SHAPES[0])
    with_head: Epilogue = cuda.epilogue(*args, rule_for(1), EPS)
    without = cuda.epilogue(*args[:-1], None, rule_for(1), EPS)
    assert torch.equal(with_head.x0, without.x0) and torch.equal(with_head.x, without.x)
    assert without.state[0, 0].isnan() and without.state[0, 1] == 0


def test_refusals_name_the_value_and_the_rule(cuda):
    args, rule = inputs(SHAPES[0]), rule_for(1)
    with pytest.raises(ValueError, match="epilogue: sigma of torch.float64 .* must be contiguous torch.float32"):
        cuda.epilogue(*args[:4], args[4].double(), *args[5:], rule, EPS)
    with pytest.raises(ValueError, match="epilogue: noise of torch.float32 must be of x's dtype"):
        cuda.epilogue(*args[:3], args[3].float(), *args[4:], rule, EPS)
    with pytest.raises(ValueError, match="epilogue: step of torch.int64 .* must be contiguous torch.int32"):
        cuda.epilogue(*args, rule._replace(step=rule.step.long()), EPS)
    wide = inputs((torch.bfloat16, torch.bfloat16, 1, 1, 17, 2, 2, 16, 2))
    with pytest.raises(ValueError, match=r"epilogue \[1, 4, 16\]: 68 outputs must be .* at most 64"):
        cuda.epilogue(*wide, rule, EPS)
    wide = inputs((torch.bfloat16, torch.bfloat16, 1, 1, 4, 1, 1, 8192, 2))
    with pytest.raises(ValueError, match="8192 channels do not fit into shared memory; at most 7168"):
        cuda.epilogue(*wide, rule, EPS)
