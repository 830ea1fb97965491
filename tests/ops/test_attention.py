"""Attention over the cache and to the prompt, against loops in float64 that read only the frames that count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsa_engine import ops
from dsa_engine.ops import reference


class AcceleratorName(str):
    """Reads as a device that is not the CPU, and is still where a new tensor can be made."""

    type = "accelerator"


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is not on the CPU, so that the path of the other devices runs without one."""

    device = AcceleratorName("cpu")


@pytest.fixture(params=["few keys", "many keys"])
def softmax_path(request, monkeypatch):
    """Both softmaxes of the reference on the CPU, whatever the number of keys in a test."""
    monkeypatch.setattr(reference, "FEW_KEYS", 10**6 if request.param == "few keys" else 0)


@pytest.fixture(params=["rows", "masked"])
def attend(request, monkeypatch, softmax_path):
    """`ops.attention` by either path of the reference; the masks that its softmax gets prove which one ran."""
    masked, masks, sdpa = request.param == "masked", [], reference.sdpa
    monkeypatch.setattr(reference, "sdpa", lambda q, k, v, mask=None: masks.append(mask) or sdpa(q, k, v, mask))

    def call(q, *args):
        return ops.attention(q.as_subclass(Elsewhere) if masked else q, *args).as_subclass(torch.Tensor)

    yield call
    assert masks
    assert all((mask is not None) == masked for mask in masks)


def softmax_attention(q, keys, values):
    """One query [D] over keys, values [n, D], element by element."""
    scores = [sum(a * b for a, b in zip(q.tolist(), key.tolist())) / math.sqrt(len(q)) for key in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w * value for w, value in zip(weights, values)) / sum(weights)


def naive(q, k_cache, v_cache, slot, length):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        keys, values = (c[int(slot[b]), : int(length[b]), :, h].flatten(0, 1).double() for c in (k_cache, v_cache))
        out[b, t, h] = softmax_attention(q[b, t, h].double(), keys, values)
    return out


def cache_with_nan(shape, slot, length):
    """Random frames where they count and NaN everywhere else, the slots of no row included."""
    k, v = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    for s, n in zip(slot, length):
        k[s, :n], v[s, :n] = torch.randn(2, n, *shape[2:])
    return k, v


@pytest.mark.parametrize(
    "slot, length", [([0], [1]), ([2], [5]), ([3, 0], [1, 5]), ([1, 2, 0], [4, 2, 3]), ([3, 2, 1, 0], [5, 5, 5, 5])]
)
def test_rows_read_their_own_slot_and_length(slot, length, attend, close):
    k, v = cache_with_nan((4, 5, 3, 2, 8), slot, length)
    slot, length = torch.tensor(slot), torch.tensor(length)
    q = torch.randn(len(slot), 6, 2, 8)
    close(attend(q, k, v, slot, length), naive(q, k, v, slot, length), rel=1e-5)


def test_infinite_values_in_unused_frames_stay_out(attend, close):
    k, v = cache_with_nan((1, 4, 2, 1, 4), [0], [2])
    q, slot, length = torch.randn(1, 2, 1, 4), torch.tensor([0]), torch.tensor([2])
    expected = naive(q, k, v, slot, length)
    k[:, 2:], v[:, 2:] = float("inf"), float("-inf")
    close(attend(q, k, v, slot, length), expected, rel=1e-5)


def test_large_scores_do_not_overflow(attend, close):
    k, v = torch.randn(2, 1, 3, 4, 2, 8)
    q, slot, length = 100 * torch.randn(1, 4, 2, 8), torch.tensor([0]), torch.tensor([3])
    close(attend(q, k, v, slot, length), naive(q, k, v, slot, length), rel=1e-4)


def test_frames_lie_in_any_order(attend, close):
    """What lets the ring keep its data in place: the order of the frames in a slot does not matter."""
    k, v = torch.randn(2, 1, 5, 3, 2, 8)
    q, slot, length = torch.randn(1, 3, 2, 8), torch.tensor([0]), torch.tensor([5])
    order = torch.tensor([3, 0, 4, 2, 1])
    close(attend(q, k[:, order], v[:, order], slot, length), naive(q, k, v, slot, length), rel=1e-5)


def test_a_half_precision_cache_serves_float32_queries(attend, close):
    k, v = (c.bfloat16() for c in torch.randn(2, 1, 3, 2, 2, 8))
    q, slot, length = torch.randn(1, 2, 2, 8), torch.tensor([0]), torch.tensor([2])
    out = attend(q, k, v, slot, length)
    assert out.dtype == torch.float32
    close(out, naive(q, k, v, slot, length), rel=1e-5)


@pytest.mark.parametrize("batch, queries, keys", [(1, 1, 1), (2, 5, 3), (3, 2, 7)])
def test_cross_attention_attends_to_every_key(batch, queries, keys, softmax_path, close):
    q, (k, v) = torch.randn(batch, queries, 2, 8), torch.randn(2, batch, keys, 2, 8)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(range(batch), range(queries), range(2)):
        expected[b, t, h] = softmax_attention(q[b, t, h].double(), k[b, :, h].double(), v[b, :, h].double())
    close(ops.cross_attention(q, k, v), expected, rel=1e-5)


@pytest.mark.parametrize(
    "q, cache",
    [((1, 4, 2, 8), (1, 3, 4, 2, 6)), ((1, 4, 3, 8), (1, 3, 4, 2, 8)), ((1, 4, 16), (1, 3, 4, 2, 8)),
     ((1, 4, 2, 8), (3, 4, 2, 8))],
)  # fmt: skip
def test_attention_names_shapes_that_do_not_fit(q, cache):
    row = torch.tensor([0])
    with pytest.raises(ValueError, match="attention: q") as error:
        ops.attention(torch.zeros(q), torch.zeros(cache), torch.zeros(cache), row, row + 1)
    assert str(list(q)) in str(error.value) and str(list(cache)) in str(error.value)


@pytest.mark.parametrize(
    "q, k, v",
    [((2, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)), ((1, 4, 2, 8), (1, 3, 2, 6), (1, 3, 2, 6)),
     ((1, 4, 2, 8), (1, 3, 2, 8), (1, 5, 2, 8)), ((1, 4, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8))],
)  # fmt: skip
def test_cross_attention_names_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ValueError, match="cross_attention") as error:
        ops.cross_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert all(str(list(shape)) in str(error.value) for shape in (q, k, v))
