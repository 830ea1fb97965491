"""Attention over the cache and to the prompt: the reference against loops in float64 that read only valid frames."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import CacheScales, reference
from tests.support.kernels import DEVICE


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


def frames_of(runs):
    """The frames of one row's runs, in their order."""
    return [frame for start, stop in runs for frame in range(start, stop)]


def naive(q, k_cache, v_cache, slot, keys):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        frames = frames_of(keys[b].tolist())
        if frames:
            k, v = (c[int(slot[b]), frames, :, h].flatten(0, 1).double() for c in (k_cache, v_cache))
            out[b, t, h] = softmax_attention(q[b, t, h].double(), k, v)
    return out


def cache_with_nan(shape, slot, keys):
    """Random frames where they count and NaN everywhere else, the slots of no row included."""
    k, v = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    for s, runs in zip(slot, keys):
        frames = frames_of(runs)
        k[s, frames], v[s, frames] = torch.randn(2, len(frames), *shape[2:])
    return k, v


@pytest.mark.parametrize(
    "slot, keys",
    [
        ([0], [[(0, 1)]]),
        ([2], [[(0, 5)]]),
        ([3, 0], [[(2, 3)], [(0, 5)]]),
        ([1, 2, 0], [[(1, 4)], [(0, 2)], [(3, 5)]]),
        ([2], [[(0, 1), (3, 5)]]),
        ([1, 3], [[(3, 5), (0, 2)], [(1, 1), (4, 5)]]),
        ([0, 0], [[(0, 2)], [(1, 4)]]),
        ([1, 2], [[(2, 3), (0, 0), (4, 5)], [(3, 3), (2, 2), (5, 5)]]),
    ],
)
def test_rows_read_their_own_slot_and_runs(slot, keys, attend, close):
    k, v = cache_with_nan((4, 5, 3, 2, 8), slot, keys)
    slot, keys = torch.tensor(slot), torch.tensor(keys)
    q = torch.randn(len(slot), 6, 2, 8)
    close(attend(q, k, v, slot, keys), naive(q, k, v, slot, keys), rel=1e-5)


def test_a_row_without_keys_gives_zeros(attend):
    k, v = cache_with_nan((2, 4, 2, 1, 4), [0, 1], [[(1, 1)], [(0, 2)]])
    out = attend(torch.randn(2, 3, 1, 4), k, v, torch.tensor([0, 1]), torch.tensor([[[1, 1]], [[0, 2]]]))
    assert out[0].abs().max() == 0 and out[1].abs().min() > 0


ALL = torch.tensor([[[0, 3]]])  # one row, one run, three frames


def test_infinite_values_in_unused_frames_stay_out(attend, close):
    k, v = cache_with_nan((1, 4, 2, 1, 4), [0], [[(0, 3)]])
    q, slot = torch.randn(1, 2, 1, 4), torch.tensor([0])
    expected = naive(q, k, v, slot, ALL)
    k[:, 3:], v[:, 3:] = float("inf"), float("-inf")
    close(attend(q, k, v, slot, ALL), expected, rel=1e-5)


def test_large_scores_do_not_overflow(attend, close):
    k, v = torch.randn(2, 1, 3, 4, 2, 8)
    q, slot = 100 * torch.randn(1, 4, 2, 8), torch.tensor([0])
    close(attend(q, k, v, slot, ALL), naive(q, k, v, slot, ALL), rel=1e-4)


def test_frames_lie_in_any_order(attend, close):
    """What lets the ring keep its data in place: the order of the frames in a slot does not matter."""
    k, v = torch.randn(2, 1, 3, 5, 2, 8)
    q, slot = torch.randn(1, 3, 2, 8), torch.tensor([0])
    order = torch.tensor([2, 0, 1])
    close(attend(q, k[:, order], v[:, order], slot, ALL), naive(q, k, v, slot, ALL), rel=1e-5)


def test_a_half_precision_cache_serves_float32_queries(attend, close):
    k, v = (c.bfloat16() for c in torch.randn(2, 1, 3, 2, 2, 8))
    q, slot = torch.randn(1, 2, 2, 8), torch.tensor([0])
    out = attend(q, k, v, slot, ALL)
    assert out.dtype == torch.float32
    close(out, naive(q, k, v, slot, ALL), rel=1e-5)


def random_scales(slots, heads):
    """One scale per slot and head for keys and values."""
    return CacheScales(*(0.5 + torch.rand(2, slots, heads, device=DEVICE)))


def test_an_fp8_cache_is_scaled_by_slot_and_head(attend, close):
    """Closed form: key = k * stored, value = v * stored; NaN in what stays unused."""
    slot, runs = [2, 0], [[(1, 3)], [(0, 2)]]
    k, v = (x.to(torch.float8_e4m3fn) for x in cache_with_nan((3, 4, 2, 2, 8), slot, runs))
    slot, keys, scales = torch.tensor(slot), torch.tensor(runs), CacheScales(*(x.cpu() for x in random_scales(3, 2)))
    q = torch.randn(2, 3, 2, 8)
    wide = (c.float() * s[:, None, None, :, None] for c, s in zip((k, v), scales))
    close(attend(q, k, v, slot, keys, scales), naive(q, *wide, slot, keys), rel=1e-5)


@pytest.mark.parametrize("batch, queries, keys", [(1, 1, 1), (2, 5, 3), (3, 2, 7)])
def test_cross_attention_attends_to_every_key(batch, queries, keys, softmax_path, close):
    q, (k, v) = torch.randn(batch, queries, 2, 8), torch.randn(2, batch, keys, 2, 8)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(range(batch), range(queries), range(2)):
        expected[b, t, h] = softmax_attention(q[b, t, h].double(), k[b, :, h].double(), v[b, :, h].double())
    close(ops.cross_attention(q, k, v), expected, rel=1e-5)


def test_keys_beyond_those_used_stay_out(softmax_path, close):
    q, (k, v) = torch.randn(2, 3, 2, 8), torch.randn(2, 2, 5, 2, 8)
    k[0, 2:], v[0, 2:], k[1, 4:], v[1, 4:] = (float("nan"),) * 4
    out = ops.cross_attention(q, k, v, torch.tensor([2, 4]), torch.ones(2))
    for b, n in enumerate((2, 4)):
        close(out[b : b + 1], ops.cross_attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]), rel=1e-5)


@st.composite
def collapsed(draw):
    """Rows with the keys they use and how often the last of them counts."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    used = draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
    return length, used, draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))


def repeated(x, used, repeat):
    """One row [L, H, D]: its used keys, the last of them `repeat` times."""
    return torch.cat((x[:used], x[used - 1 : used].expand(repeat - 1, -1, -1)))


@given(case=collapsed())
def test_one_key_stands_for_many_equal_ones(case):
    length, used, repeat = case
    q, (k, v) = torch.randn(len(used), 3, 2, 8), torch.randn(2, len(used), length, 2, 8)
    out = ops.cross_attention(q, k, v, torch.tensor(used), torch.tensor(repeat).float())
    for b, counts in enumerate(zip(used, repeat)):
        every = ops.cross_attention(q[b : b + 1], *(repeated(x[b], *counts)[None] for x in (k, v)))
        assert (out[b] - every[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "q, cache",
    [
        ((1, 4, 2, 8), (1, 3, 4, 2, 6)),
        ((1, 4, 3, 8), (1, 3, 4, 2, 8)),
        ((1, 4, 16), (1, 3, 4, 2, 8)),
        ((1, 4, 2, 8), (3, 4, 2, 8)),
    ],
)
def test_attention_names_shapes_that_do_not_fit(q, cache):
    row = torch.tensor([0])
    with pytest.raises(ValueError, match="attention: q") as error:
        ops.attention(torch.zeros(q), torch.zeros(cache), torch.zeros(cache), row, torch.zeros(1, 1, 2))
    assert str(list(q)) in str(error.value) and str(list(cache)) in str(error.value)


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)),
        ((1, 4, 2, 8), (1, 3, 2, 6), (1, 3, 2, 6)),
        ((1, 4, 2, 8), (1, 3, 2, 8), (1, 5, 2, 8)),
        ((1, 4, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8)),
    ],
)
def test_cross_attention_names_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ValueError, match="cross_attention") as error:
        ops.cross_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert all(str(list(shape)) in str(error.value) for shape in (q, k, v))
