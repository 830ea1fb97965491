"""A frame's tokens pooled: the reference against loops and explicit attention in float64, the Triton kernels against
float64 beside the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import reference
from dsa_engine.triton_kernels import pooling as kernel
from tests.ops.test_fp8_linear import needs_gpu, surrounded
from tests.support.kernels import DEVICE, DTYPES, compare, poisoned_memory

EPS = 1e-6


def layer_norm(values):
    mean = sum(values) / len(values)
    variance = sum((a - mean) ** 2 for a in values) / len(values)
    return [(a - mean) / math.sqrt(variance + EPS) for a in values]


def naive(hidden, frames):
    """[B, F * S, C] -> [B, F, 2 C]: per frame and channel the mean over tokens, then the deviation about it."""
    batch, count, channels = hidden.shape
    tokens = count // frames
    out = torch.empty(batch, frames, 2 * channels, dtype=torch.float64)
    for b in range(batch):
        for f in range(frames):
            rows = [layer_norm(row) for row in hidden[b, f * tokens : (f + 1) * tokens].double().tolist()]
            for c, column in enumerate(zip(*rows)):
                mean = sum(column) / tokens
                out[b, f, c] = mean
                out[b, f, channels + c] = math.sqrt(sum((a - mean) ** 2 for a in column) / tokens + EPS)
    return out


@pytest.mark.parametrize("batch, frames, tokens, channels", [(1, 1, 4, 3), (2, 3, 5, 8), (3, 2, 16, 4)])
def test_mean_and_deviation_of_each_frame(batch, frames, tokens, channels, close):
    hidden = 2 + 5 * torch.randn(batch, frames * tokens, channels)
    close(ops.pool_frames(hidden, frames, EPS), naive(hidden, frames), rel=1e-5)


def test_a_frame_of_one_token_has_no_deviation(close):
    hidden = torch.randn(2, 3, 8)
    pooled = ops.pool_frames(hidden, 3, EPS)
    close(pooled[..., :8], naive(hidden, 3)[..., :8], rel=1e-5)
    close(pooled[..., 8:], torch.full((2, 3, 8), math.sqrt(EPS)), rel=1e-4)


def test_equal_tokens_stay_finite():
    """The variance may round below zero; its root must not become NaN."""
    pooled = ops.pool_frames(torch.randn(1, 1, 64).expand(1, 33, 64), 1, EPS)
    assert pooled.isfinite().all() and pooled[..., 64:].abs().max() < 2e-3


def test_half_precision_is_pooled_in_float32(close):
    hidden = torch.randn(1, 64, 8).bfloat16()
    pooled = ops.pool_frames(hidden, 2, EPS)
    assert pooled.dtype == torch.float32
    close(pooled, naive(hidden, 2), rel=1e-5)


def test_frames_that_do_not_divide_the_tokens_are_named():
    with pytest.raises(ValueError, match=r"\[1, 7, 4\].*F = 2"):
        ops.pool_frames(torch.randn(1, 7, 4), 2, EPS)


# From here on the Triton kernels, against float64 and beside the reference.


def exact(hidden, frames):
    """`naive` without its loops, in float64."""
    h = hidden.double() - hidden.double().mean(-1, keepdim=True)
    h = (h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()).unflatten(1, (frames, -1))
    return torch.cat((h.mean(2), (h.var(2, correction=0) + EPS).sqrt()), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 3),
    tokens=st.integers(1, 40),
    channels=st.integers(2, 200),
    offset=st.sampled_from((0.0, 20.0)),
)
def test_the_kernels(dtype, batch, frames, tokens, channels, offset):
    hidden = surrounded(batch, frames * tokens, channels, dtype=dtype, scale=5.0, offset=offset)
    with poisoned_memory():
        pooled = kernel.pool_frames(hidden, frames, EPS)
    compare(pooled, reference.pool_frames(hidden, frames, EPS), exact(hidden, frames))


@pytest.mark.parametrize("tokens, channels", [(16, 128), (21, 1536), (150, 96)])
def test_the_kernels_at_the_widths_of_real_models(tokens, channels):
    """One tile, a tile and a part of one, and many."""
    hidden = surrounded(1, tokens, channels, dtype=torch.bfloat16, scale=3.0)
    with poisoned_memory():
        pooled = kernel.pool_frames(hidden, 1, EPS)
    compare(pooled, reference.pool_frames(hidden, 1, EPS), exact(hidden, 1))


def test_tokens_that_agree_but_for_a_little(close):
    """Deviations of 1e-3 about means of 1: E[y^2] - E[y]^2 in float32 would be off by a tenth."""
    hidden = torch.randn(1, 1, 64, device=DEVICE) + 1e-3 * torch.randn(1, 50, 64, device=DEVICE)
    pooled = kernel.pool_frames(hidden, 1, EPS)
    close(pooled[..., 64:].cpu(), exact(hidden, 1)[..., 64:].cpu(), rel=1e-4)


def test_frames_and_rows_do_not_mix():
    """NaN in one frame stays there, though tiles reach beyond the end of a frame."""
    hidden = torch.randn(2, 3 * 5, 40, device=DEVICE)
    hidden[1, 5:10] = float("nan")
    spoilt = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    spoilt[1, 1] = True
    pooled = kernel.pool_frames(hidden, 3, EPS)
    assert torch.equal(pooled.isnan().any(-1), spoilt) and torch.equal(pooled.isnan().all(-1), spoilt)


# attention_pool: the reference against cross-attention with explicit keys and values, the kernels against float64.


def cross_attended(hidden, tokens, key, value, frames):
    """Attention of learnable tokens to LayerNorm(hidden) of each frame, with its keys and values, in float64."""
    n = torch.nn.functional.layer_norm(hidden.double(), hidden.shape[-1:], eps=EPS).unflatten(1, (frames, -1))
    q = tokens.double().expand(*n.shape[:2], -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(q, n @ key.double().T, n @ value.double().T)


@pytest.mark.parametrize("batch, frames, tokens, channels", [(1, 1, 4, 3), (2, 3, 5, 8), (3, 2, 16, 24)])
def test_pooling_with_k_q_is_cross_attention(batch, frames, tokens, channels, close):
    hidden = 2 + 5 * torch.randn(batch, frames * tokens, channels)
    learned, key, value = torch.randn(4, 7), torch.randn(7, channels), torch.randn(9, channels)
    pooled = ops.attention_pool([hidden], (learned @ key / 7**0.5)[None], frames, EPS)[:, :, 0]
    assert pooled.shape == (batch, frames, 4, channels) and pooled.dtype == torch.float32
    close(pooled.double() @ value.double().T, cross_attended(hidden, learned, key, value, frames), rel=1e-5)


@pytest.mark.parametrize("queries", [(2, 3, 8), (2, 0, 4), (1, 3, 4), (3, 4)])
def test_queries_of_another_width_are_named(queries):
    with pytest.raises(ValueError, match=r"queries \[.*\] must be \[N, Q, C\] for hidden \[\[1, 6, 4\], \[1, 6, 4\]\]"):
        ops.attention_pool([torch.randn(1, 6, 4)] * 2, torch.randn(queries), 2, EPS)


def test_blocks_of_other_sizes_are_named():
    with pytest.raises(ValueError, match=r"hidden \[\[1, 6, 4\], \[1, 4, 4\]\] of N blocks"):
        ops.attention_pool([torch.randn(1, 6, 4), torch.randn(1, 4, 4)], torch.randn(2, 3, 4), 2, EPS)


def test_a_gradient_reaches_the_queries_and_the_tokens():
    hidden = [torch.randn(1, 6, 4, requires_grad=True) for _ in range(2)]
    queries = torch.randn(2, 2, 4, requires_grad=True)
    ops.attention_pool(hidden, queries, 2, EPS)[0, 1, 1, 0].sum().backward()
    assert not hidden[0].grad.any() and not hidden[1].grad[:, :3].any() and hidden[1].grad[:, 3:].any()
    assert queries.grad[1, 0].any() and not queries.grad[0].any() and not queries.grad[1, 1].any()


def exact_attention(hidden, queries, frames):
    """Block by block."""
    rows = []
    for h, q in zip(hidden, queries, strict=True):
        y = torch.nn.functional.layer_norm(h.double(), h.shape[-1:], eps=EPS).unflatten(1, (frames, -1))
        rows.append((y @ q.double().T).softmax(dim=2).mT @ y)
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 3),
    tokens=st.integers(1, 40),
    channels=st.integers(2, 200),
    count=st.integers(1, 18),
    sharpness=st.sampled_from((0.1, 3.0)),
)
def test_the_attention_kernels(dtype, batch, frames, tokens, channels, count, sharpness):
    """Flat and near one-hot softmax; scores of a hundred and more do not overflow."""
    hidden = [surrounded(batch, frames * tokens, channels, dtype=dtype, scale=5.0) for _ in range(2)]
    queries = surrounded(2, count, channels, dtype=dtype, scale=sharpness)
    with poisoned_memory():
        pooled = kernel.attention_pool(hidden, queries, frames, EPS)
    compare(pooled, reference.attention_pool(hidden, queries, frames, EPS), exact_attention(hidden, queries, frames))


@pytest.mark.parametrize("tokens, channels", [(16, 128), (21, 1536), (150, 96)])
def test_the_attention_kernels_at_the_widths_of_real_models(tokens, channels):
    hidden = [surrounded(1, tokens, channels, dtype=torch.bfloat16, scale=3.0)]
    queries = surrounded(1, 4, channels, dtype=torch.bfloat16, scale=channels**-0.5)
    with poisoned_memory():
        pooled = kernel.attention_pool(hidden, queries, 1, EPS)
    compare(pooled, reference.attention_pool(hidden, queries, 1, EPS), exact_attention(hidden, queries, 1))


def test_attention_keeps_frames_and_rows_apart():
    hidden = torch.randn(2, 3 * 5, 40, device=DEVICE)
    hidden[1, 5:10] = float("nan")
    spoilt = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    spoilt[1, 1] = True
    pooled = kernel.attention_pool([hidden], torch.randn(1, 3, 40, device=DEVICE), 3, EPS).flatten(2)
    assert torch.equal(pooled.isnan().any(-1), spoilt) and torch.equal(pooled.isnan().all(-1), spoilt)


@pytest.mark.gpu
@needs_gpu
def test_attention_of_wan_on_a_gpu():
    hidden = [surrounded(2, 4680, 1536, dtype=torch.bfloat16, scale=5.0, offset=2.0) for _ in range(3)]
    queries = surrounded(3, 4, 1536, dtype=torch.bfloat16, scale=1536**-0.5)
    with poisoned_memory():
        pooled = [kernel.attention_pool(hidden, queries, 3, EPS) for _ in range(5)]
    compare(pooled[0], reference.attention_pool(hidden, queries, 3, EPS), exact_attention(hidden, queries, 3))
    assert all(torch.equal(pooled[0], again) for again in pooled[1:])


@pytest.mark.gpu
@needs_gpu
def test_wan_on_a_gpu():
    """Real shapes, and the same result every time: nothing is added up in the order of arrival."""
    hidden = surrounded(2, 4680, 1536, dtype=torch.bfloat16, scale=5.0, offset=2.0)
    with poisoned_memory():
        pooled = [kernel.pool_frames(hidden, 3, EPS) for _ in range(5)]
    compare(pooled[0], reference.pool_frames(hidden, 3, EPS), exact(hidden, 3))
    assert all(torch.equal(pooled[0], again) for again in pooled[1:])
