"""Statistics of a frame's tokens, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_engine import ops

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
