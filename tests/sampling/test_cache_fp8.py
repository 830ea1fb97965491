"""The e4m3 cache against one in float32 whose numbers are rounded by hand, with e4m3's own definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from dsa_engine import ops
from dsa_engine.kernel_types import CacheScales
from dsa_engine.sampling.kv_cache import E4M3, KVCache
from tests.sampling.test_kv_cache import EPS, GAINS, HEAD_DIM, HEADS, THETA, TOKENS, angles, chunk, rollouts

LAYERS = 2
EVEN = CacheScales(
    torch.tensor([[2**-5, 2**-7], [2**-6, 2**-4]]),
    torch.tensor([[2**-6, 2**-6], [2**-5, 2**-8]]),
)  # powers of two: there and back again is exact, so a sink that is turned is turned from the very same numbers
ODD = CacheScales(
    torch.tensor([[0.011, 0.02], [0.013, 0.007]]),
    torch.tensor([[0.015, 0.009], [0.02, 0.01]]),
)


def by_hand(x):
    """Four exponent bits and three of mantissa: steps of 2^(e - 3) with e at least -6, ties to even, 448 at most."""
    x = x.double()
    _, exponent = torch.frexp(x)
    step = torch.exp2((exponent - 1).clamp(min=-6).double() - 3)
    return ((x / step).round() * step).clamp(-448, 448).float()


def test_by_hand_knows_every_number_of_e4m3():
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    finite = every[every.isfinite()].sort().values
    assert by_hand(finite).equal(finite) and len(finite) == 254
    middle = (finite[1:] + finite[:-1]) / 2
    for x in (middle, middle * (1 + 1e-6), middle * (1 - 1e-6)):
        assert by_hand(x).equal(x.to(E4M3).float())


def caches(scales, window, sink, slots=3, **options):
    """An e4m3 cache, and the float32 one; NaN where nothing was written."""
    quantized = KVCache(
        LAYERS, HEADS, HEAD_DIM, TOKENS, window, sink, slots, dtype=E4M3, theta=THETA, scales=scales, **options
    )
    plain = KVCache(LAYERS, HEADS, HEAD_DIM, TOKENS, window, sink, slots, theta=THETA, **options)
    for x in (quantized.k, quantized.v, plain.k, plain.v):
        x.view(torch.uint8).fill_(0x7F) if x.dtype == E4M3 else x.fill_(float("nan"))
    return quantized, plain


def parts(scales, layer):
    """Scale of keys and of values, for [..., H, D]."""
    return scales.k[layer][:, None], scales.v[layer][:, None]


def round_frames(cache, scales, slot, frames, keys_only=False):
    """What an e4m3 cache would hold of these frames, written back as the float32 numbers that it stands for."""
    for layer in range(LAYERS):
        for x, scale in list(zip((cache.k, cache.v), parts(scales, layer)))[: 1 if keys_only else 2]:
            x[layer, slot, frames] = by_hand(x[layer, slot, frames] / scale) * scale


def attend_plain(rows, qkv, layer, scales):
    """Keys and values go to the float32 cache and are rounded by hand there, before anything attends to them."""
    cache, a = rows.cache, angles(rows.frames)
    q = ops.norm_rope_append(*qkv, *GAINS, a.cos(), a.sin(), EPS, cache.k[layer], cache.v[layer], rows.slot, rows.write)
    for x, scale in zip((cache.k, cache.v), parts(scales, layer)):
        place = (layer, rows.slot[:, None], rows.write)
        x[place] = by_hand(x[place] / scale) * scale
    return ops.attention(q, cache.k[layer], cache.v[layer], rows.slot, rows.keys).flatten(2)


def attend(rows, qkv, layer):
    a = angles(rows.frames)
    return rows.attend(layer, *qkv, GAINS, (a.cos(), a.sin()), EPS)


@pytest.mark.parametrize("rope, scales", [("absolute", ODD), ("absolute", EVEN), ("relative", EVEN)])
@settings(max_examples=40)
@given(rollout=rollouts())
def test_it_is_a_cache_of_rounded_numbers(rope, scales, rollout):
    """Any window, sink and chunk sizes, chunks that are rewritten, sessions at different points; a sink that moves is
    turned from what was stored, and rounded again."""
    window, sink, spare, turns = rollout
    torch.manual_seed(0)
    quantized, plain = caches(scales, window, sink, rope=rope, headroom=spare)
    for cache in (quantized, plain):
        cache.acquire(3)
    for taking_part, frames, writes in turns:
        slot = torch.tensor(taking_part)
        for _ in range(writes):
            rows, expected = quantized.rows(slot, frames), plain.rows(slot, frames)
            if plain.unrotated_sink is not None:
                moved = slot[plain.position[slot] + frames > window]
                for one in moved.tolist():
                    round_frames(plain, scales, one, slice(sink), keys_only=True)
            for layer in range(LAYERS):
                qkv = chunk(len(taking_part), frames)
                out, by_rounding = attend(rows, qkv, layer), attend_plain(expected, qkv, layer, scales)
                torch.testing.assert_close(out, by_rounding, rtol=0, atol=1e-5)
        for cache in (quantized, plain):
            cache.advance(slot, frames)
    for layer in range(LAYERS):
        for x, y, scale in zip((quantized.k, quantized.v), (plain.k, plain.v), parts(scales, layer)):
            stands_for = x[layer].float() * scale
            torch.testing.assert_close(stands_for, y[layer], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_one_forward_commits_a_chunk_and_starts_the_next():
    torch.manual_seed(0)
    quantized, plain = caches(ODD, window=6, sink=1, headroom=2)
    slot = torch.tensor([1])
    for _ in range(6):
        both = chunk(2, 2)
        rows, expected = (c.rows(slot.repeat(2), 2, ahead=torch.tensor([0, 2])) for c in (quantized, plain))
        for layer in range(LAYERS):
            torch.testing.assert_close(
                attend(rows, both, layer), attend_plain(expected, both, layer, ODD), rtol=0, atol=1e-5
            )
        for cache in (quantized, plain):
            cache.advance(slot, 2)


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_a_saved_state_goes_on_in_another_slot(rope):
    cache, _ = caches(EVEN, window=5, sink=1, rope=rope)
    a, b = torch.tensor([0]), torch.tensor([2])
    for _ in range(4):
        for layer in range(LAYERS):
            attend(cache.rows(a, 2), chunk(1, 2), layer)
        cache.advance(a, 2)
    state, qkv = cache.save(a), [chunk(1, 2) for _ in range(4)]

    def run(slot):
        outs = []
        for x in qkv:
            outs += [attend(cache.rows(slot, 2), x, layer) for layer in range(LAYERS)]
            cache.advance(slot, 2)
        return torch.stack(outs)

    first = run(a)
    cache.load(b, state)
    assert run(b).equal(first) and first.isfinite().all()


def test_a_state_of_another_dtype_is_refused_before_anything_changes():
    quantized, plain = caches(ODD, window=4, sink=0)
    slot = torch.tensor([1])
    for cache, other in ((quantized, plain), (plain, quantized)):
        before = [x.view(torch.uint8).clone() for x in (cache.k, cache.v)]
        with pytest.raises(ValueError, match=r"state of a cache of torch\.float.*this one's is torch\.float"):
            cache.load(slot, other.save(slot))
        assert all(x.view(torch.uint8).equal(y) for x, y in zip((cache.k, cache.v), before))


@pytest.mark.parametrize("dtype, scales", [(E4M3, None), (torch.float32, ODD), (torch.bfloat16, ODD)])
def test_e4m3_has_scales_and_no_other_dtype(dtype, scales):
    with pytest.raises(ValueError, match="float8_e4m3fn has them"):
        KVCache(LAYERS, HEADS, HEAD_DIM, TOKENS, 4, dtype=dtype, scales=scales)


def test_half_the_memory_and_its_scales():
    """Of a 21-frame Wan clip 3.02 GB instead of 6.04; the scales of a slot are 2,880 bytes."""
    scales = CacheScales(torch.ones(30, 12), torch.ones(30, 12))
    cache = KVCache(30, 12, 128, 1560, window=21, slots=2, device="meta", dtype=E4M3, scales=scales)
    assert cache.nbytes == 2 * (2 * 30 * 21 * 1560 * 1536 + 4 * 30 * (12 + 12))
