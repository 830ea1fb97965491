"""RMSNorm, rotation and the append to the cache, against loops in float64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from dsa_engine import ops

EPS = 1e-6


def naive_rms_norm(x, gain):
    """x [C], gain [C] -> list of floats."""
    scale = 1 / math.sqrt(sum(a * a for a in x.tolist()) / len(x) + EPS)
    return [a * scale * g for a, g in zip(x.tolist(), gain.tolist())]


def naive_norm_rope(x, gain, cos, sin):
    """x [B, T, C] -> [B, T, H, D]: each neighbouring pair is a complex number that is turned."""
    batch, tokens, channels = x.shape
    pairs = cos.shape[-1]
    out = torch.zeros(batch, tokens, channels // (2 * pairs), 2 * pairs, dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            normed = naive_rms_norm(x[b, t], gain)
            for i in range(channels // 2):
                h, j = divmod(i, pairs)
                turned = complex(normed[2 * i], normed[2 * i + 1]) * complex(cos[b, t, j], sin[b, t, j])
                out[b, t, h, 2 * j], out[b, t, h, 2 * j + 1] = turned.real, turned.imag
    return out


def inputs(batch, frames, tokens, heads, head_dim):
    """q, k, v [B, T, C] of unlike scale, gains [C], and angles that differ in every row, token and pair."""
    scales = torch.tensor([3.0, 0.2, 1.0])
    q, k, v = torch.randn(3, batch, frames * tokens, heads * head_dim) * scales[:, None, None, None]
    angles = 100 * torch.rand(batch, frames * tokens, head_dim // 2)
    return q, k, v, *torch.randn(2, heads * head_dim), angles.cos(), angles.sin()


@pytest.mark.parametrize("shape", [(8,), (3, 12), (2, 3, 10)])
def test_rms_norm_is_over_the_last_dim(shape, close):
    x, gain = 5 * torch.randn(shape), torch.randn(shape[-1])
    expected = torch.tensor([naive_rms_norm(row, gain) for row in x.double().view(-1, shape[-1])]).view(shape)
    close(ops.rms_norm(x, gain, EPS), expected, rel=1e-5)


def test_rms_norm_of_zeros_is_zero():
    assert ops.rms_norm(torch.zeros(2, 4), torch.ones(4), EPS).abs().max() == 0


def test_rms_norm_takes_its_mean_in_float32(close):
    """Squares of 1000 overflow half precision's range, and 0.001 underflows it."""
    x = torch.tensor([[1000.0, -1000.0, 500.0, 250.0], [1e-3, 2e-3, -1e-3, 3e-3]]).half()
    out = ops.rms_norm(x, torch.ones(4), EPS)
    assert out.dtype == torch.float16
    close(out, torch.tensor([naive_rms_norm(row, torch.ones(4)) for row in x.double()]), rel=1e-3)


@pytest.mark.parametrize("batch, frames, tokens, heads, head_dim", [(1, 1, 1, 1, 6), (2, 3, 2, 3, 8), (3, 1, 4, 2, 16)])
def test_norm_rope_normalises_the_full_width_then_turns_pairs(batch, frames, tokens, heads, head_dim, close):
    q, k, _, gain_q, gain_k, cos, sin = inputs(batch, frames, tokens, heads, head_dim)
    rotated_q, rotated_k = ops.norm_rope(q, k, gain_q, gain_k, cos, sin, EPS)
    close(rotated_q, naive_norm_rope(q, gain_q, cos, sin), rel=1e-5)
    close(rotated_k, naive_norm_rope(k, gain_k, cos, sin), rel=1e-5)


def test_a_quarter_turn(close):
    """(1, 0) by 90 degrees is (0, 1): the direction of the rotation."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).view(1, 1, 6)
    turn = [cmath.rect(1, math.pi / 2)] * 3
    cos, sin = torch.tensor([z.real for z in turn]).view(1, 1, 3), torch.tensor([z.imag for z in turn]).view(1, 1, 3)
    q, _ = ops.norm_rope(x, x, torch.ones(6), torch.ones(6), cos, sin, EPS)
    scale = math.sqrt(6 / 4)
    close(q.flatten(), scale * torch.tensor([0.0, 1.0, -1.0, 0.0, -1.0, 1.0]), rel=1e-5)


def append(q, k, v, gain_q, gain_k, cos, sin, cache, slot, write):
    return ops.norm_rope_append(q, k, v, gain_q, gain_k, cos, sin, EPS, *cache, slot, write)


@pytest.mark.parametrize(
    "slot, write", [([0], [[0]]), ([2], [[1, 2]]), ([3, 0], [[0, 1], [3, 4]]), ([1, 2, 0], [[4, 1], [1, 2], [0, 3]])]
)
def test_append_writes_the_named_frames_and_no_others(slot, write, close):
    frames, tokens, heads, head_dim = len(write[0]), 3, 2, 8
    q, k, v, gain_q, gain_k, cos, sin = inputs(len(slot), frames, tokens, heads, head_dim)
    cache = torch.randn(2, 4, 5, tokens, heads, head_dim)
    before = cache.clone()
    out = append(q, k, v, gain_q, gain_k, cos, sin, cache, torch.tensor(slot), torch.tensor(write))

    close(out, naive_norm_rope(q, gain_q, cos, sin), rel=1e-5)
    keys = naive_norm_rope(k, gain_k, cos, sin)
    untouched = torch.ones(cache.shape[1:3], dtype=torch.bool)
    for b, (s, row) in enumerate(zip(slot, write)):
        for f, w in enumerate(row):
            chunk = slice(f * tokens, (f + 1) * tokens)
            close(cache[0, s, w], keys[b, chunk], rel=1e-5)
            assert torch.equal(cache[1, s, w], v[b, chunk].view(tokens, heads, head_dim))
            untouched[s, w] = False
    assert torch.equal(cache[:, untouched], before[:, untouched])


def test_append_rounds_to_the_dtype_of_the_cache(close):
    q, k, v, gain_q, gain_k, cos, sin = inputs(1, 1, 2, 2, 8)
    cache = torch.zeros(2, 1, 3, 2, 2, 8, dtype=torch.bfloat16)
    append(q, k, v, gain_q, gain_k, cos, sin, cache, torch.tensor([0]), torch.tensor([[1]]))
    close(cache[0, 0, 1], naive_norm_rope(k, gain_k, cos, sin)[0], rel=2**-8)
    assert torch.equal(cache[1, 0, 1], v[0].view(2, 2, 8).bfloat16())


@pytest.mark.parametrize("wrong", ["k", "v", "frames", "tokens"])
def test_append_names_shapes_that_do_not_fit(wrong):
    q, k, v, gain_q, gain_k, cos, sin = inputs(1, 2, 3, 2, 8)
    k = k[:, :-1] if wrong == "k" else k
    v = v[..., :-1] if wrong == "v" else v
    write = torch.zeros(1, 3 if wrong == "frames" else 2, dtype=torch.long)
    cache = torch.zeros(2, 1, 5, 4 if wrong == "tokens" else 3, 2, 8)
    with pytest.raises(ValueError, match="norm_rope_append: q") as error:
        append(q, k, v, gain_q, gain_k, cos, sin, cache, torch.tensor([0]), write)
    assert all(str(list(x.shape)) in str(error.value) for x in (q, k, v))
    assert f"F = {write.shape[1]}" in str(error.value) and f"S = {cache.shape[3]}" in str(error.value)
    assert cache.abs().max() == 0
