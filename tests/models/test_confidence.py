"""The confidence head: one logit a frame from that frame alone, and next to nothing beside its DiT."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT

FRAMES, TOKENS = 4, 6


@pytest.fixture
def head(tiny_config) -> ConfidenceHead:
    head = ConfidenceHead(tiny_config).requires_grad_(False).eval()
    for parameter in head.parameters():
        parameter.normal_(std=0.2)
    return head


@pytest.fixture
def states(tiny_config):
    """hidden [B, T, dim] and time [B, F, dim]."""
    return 3 * torch.randn(2, FRAMES * TOKENS, tiny_config.dim) + 1, torch.randn(2, FRAMES, tiny_config.dim)


def naive_logits(head: ConfidenceHead, hidden, time):
    """The docstring's formula, frame by frame in float64."""
    first, second = (head.mlp[i] for i in (0, 2))
    out = torch.empty(time.shape[:2], dtype=torch.float64)
    for b in range(time.shape[0]):
        for f in range(time.shape[1]):
            tokens = hidden[b, f * TOKENS : (f + 1) * TOKENS].double()
            normed = [(x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + head.eps) for x in tokens]
            mean = sum(normed) / TOKENS
            deviation = torch.sqrt(sum((x - mean) ** 2 for x in normed) / TOKENS + head.eps)
            features = torch.cat((mean, deviation, time[b, f].double()))
            inner = first.weight.double() @ features + first.bias.double()
            out[b, f] = second.weight.double()[0] @ (inner * torch.sigmoid(inner)) + second.bias.double()[0]
    return out


def test_logits_are_the_formula_frame_by_frame(head, states, close):
    logits = head(*states)
    assert logits.shape == (2, FRAMES) and logits.dtype == torch.float32
    close(logits, naive_logits(head, *states), rel=1e-5)


@pytest.mark.parametrize("frame", range(FRAMES))
def test_a_logit_reads_its_own_frame_only(head, states, frame):
    hidden, time = states
    before = head(hidden, time)
    hidden[:, frame * TOKENS : (frame + 1) * TOKENS] += torch.randn(TOKENS, hidden.shape[-1])
    changed = (head(hidden, time) - before).abs() > 1e-6
    assert changed[:, frame].all() and changed.sum() == 2


def test_the_order_of_a_frames_tokens_does_not_matter(head, states, close):
    hidden, time = states
    shuffled = hidden.unflatten(1, (FRAMES, TOKENS))[:, :, torch.randperm(TOKENS)].flatten(1, 2)
    close(head(shuffled, time), head(hidden, time), rel=1e-5)


def test_the_timestep_is_read(head, states):
    hidden, time = states
    before = head(hidden, time)
    time[:, 2] += 1
    changed = (head(hidden, time) - before).abs() > 1e-6
    assert changed[:, 2].all() and changed.sum() == 2


def test_an_untrained_head_says_one_half(tiny_config, states):
    assert torch.equal(ConfidenceHead(tiny_config)(*states).sigmoid(), torch.full((2, FRAMES), 0.5))


def test_half_precision_weights_give_float32_logits(head, states, close):
    expected = naive_logits(head, *states)
    logits = head.bfloat16()(*(x.bfloat16() for x in states))
    assert logits.dtype == torch.float32
    close(logits, expected, rel=0.05)


@pytest.mark.parametrize("preset, share", [("wan2.1-t2v-1.3b", 0.01), ("shapes", 0.05)])
def test_the_head_is_a_small_share_of_its_dit(preset, share):
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in kind(config).parameters()) for kind in (ConfidenceHead, CausalDiT)]
    assert 0 < sizes[0] / sizes[1] < share
