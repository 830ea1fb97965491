"""The rotary table against Wan 2.1's own complex formulation, and the properties that a rotation has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.models.rope import axis_pairs, rope_table
from dsa_engine.ops.reference import rotate


def wan_frequencies(positions: int, dim: int) -> torch.Tensor:
    """Wan's `rope_params`: complex [positions, dim / 2]."""
    rates = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).to(torch.float64) / dim)
    angles = torch.outer(torch.arange(positions).to(torch.float64), rates)
    return torch.polar(torch.ones_like(angles), angles)


def wan_rotate(x: torch.Tensor, frames: list[int], height: int, width: int) -> torch.Tensor:
    """Wan's `rope_apply` for one row, token by token: x [T, H, D] with the D / 2 pairs split time, height, width."""
    dim = x.shape[-1]
    side = 2 * (dim // 6)
    time, high, wide = (wan_frequencies(1024, n) for n in (dim - 2 * side, side, side))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    grid = [(f, r, c) for f in frames for r in range(height) for c in range(width)]
    turned = [pairs[i] * torch.cat((time[f], high[r], wide[c])) for i, (f, r, c) in enumerate(grid)]
    return torch.view_as_real(torch.stack(turned)).flatten(-2)


@pytest.mark.parametrize(
    "head_dim, split", [(128, (44, 42, 42)), (64, (24, 20, 20)), (32, (12, 10, 10)), (6, (2, 2, 2))]
)
def test_a_head_is_split_into_time_height_and_width(head_dim, split):
    assert tuple(2 * n for n in axis_pairs(head_dim)) == split


@pytest.mark.parametrize("head_dim", range(6, 130, 2))
def test_every_pair_of_a_head_belongs_to_one_axis(head_dim):
    pairs = axis_pairs(head_dim)
    assert sum(pairs) == head_dim // 2 and min(pairs) >= 1


@pytest.mark.parametrize(
    "head_dim, frames, height, width",
    [(128, [[0, 1, 2]], 2, 3), (32, [[3, 4], [900, 901]], 3, 2), (6, [[1023]], 1, 4), (64, [[7, 2]], 4, 1)],
)
def test_rotation_matches_wans_complex_numbers(head_dim, frames, height, width, close):
    cos, sin = rope_table(torch.tensor(frames), height, width, head_dim)
    x = torch.randn(len(frames), len(frames[0]) * height * width, 2, head_dim)
    assert cos.shape == sin.shape == (*x.shape[:2], head_dim // 2)
    expected = torch.stack([wan_rotate(x[b], row, height, width) for b, row in enumerate(frames)])
    close(rotate(x, cos, sin), expected, rel=1e-6)


@given(start=st.integers(0, 10**7), head_dim=st.sampled_from([6, 32, 128]))
def test_rotation_keeps_the_norm_of_every_pair(start, head_dim):
    cos, sin = rope_table(torch.tensor([[start, start + 1]]), 2, 2, head_dim)
    x = torch.randn(1, 8, 2, head_dim)
    norms = [y.unflatten(-1, (-1, 2)).norm(dim=-1) for y in (x, rotate(x, cos, sin))]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=1e-6)


def scores(query_frame: int, key_frame: int) -> torch.Tensor:
    """Products of every token's query at one frame with every token's key at another, D = 32 on a 2 x 3 grid."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 6, 1, 32, generator=generator)
    q = rotate(q, *rope_table(torch.tensor([[query_frame]]), 2, 3, 32))
    k = rotate(k, *rope_table(torch.tensor([[key_frame]]), 2, 3, 32))
    return q.flatten(0, 2) @ k.flatten(0, 2).T


@given(query=st.integers(0, 5000), key=st.integers(0, 5000), shift=st.integers(0, 10**6))
def test_scores_depend_only_on_the_distance_of_the_frames(query, key, shift):
    torch.testing.assert_close(scores(query + shift, key + shift), scores(query, key), rtol=0, atol=3e-5)


def test_scores_do_depend_on_the_distance():
    assert (scores(3, 1) - scores(3, 2)).abs().max() > 0.1


def test_angles_far_out_keep_float64_accuracy():
    """One turn of the fastest pair is 2 pi frames: at frame 10^7 an angle in float32 would be off by half a radian."""
    cos, sin = rope_table(torch.tensor([[10**7]]), 1, 1, 32)
    exact = torch.polar(torch.ones(6, dtype=torch.float64), 10**7 * 10000.0 ** (-torch.arange(6).double() / 6))
    torch.testing.assert_close(torch.complex(cos, sin)[0, 0, :6], exact.to(torch.complex64), rtol=0, atol=1e-6)
