"""The confidence heads: one logit a frame from that frame alone, and next to nothing beside their DiT."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import HEADS, ConfidenceHead, PooledHead, TokenHead, new_head
from dsa_engine.models.dit import CausalDiT

FRAMES, TOKENS = 4, 6


@pytest.fixture(params=HEADS)
def head(tiny_config, request) -> ConfidenceHead:
    head = new_head(tiny_config, request.param).requires_grad_(False).eval()
    for parameter in head.parameters():
        parameter.normal_(std=0.2)
    return head


@pytest.fixture
def states(head, tiny_config):
    """hidden [B, T, dim] for each tap, and time [B, F, dim]."""
    hidden = [3 * torch.randn(2, FRAMES * TOKENS, tiny_config.dim) + 1 for _ in head.taps]
    return hidden, torch.randn(2, FRAMES, tiny_config.dim)


def normed(tokens):
    return [(x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6) for x in tokens]


def naive_pooled(head: PooledHead, hidden, time):
    """The MLP's logit of one frame in float64: hidden [S, dim] per tap, time [dim]."""
    first, second = (head.mlp[i] for i in (0, 2))
    rows = normed(hidden[-1])
    mean = sum(rows) / len(rows)
    deviation = torch.sqrt(sum((x - mean) ** 2 for x in rows) / len(rows) + head.eps)
    inner = first.weight.double() @ torch.cat((mean, deviation, time)) + first.bias.double()
    return second.weight.double()[0] @ (inner * torch.sigmoid(inner)) + second.bias.double()[0]


def naive_token(head: TokenHead, hidden, time):
    """Cross-attention of the learned tokens with explicit keys and values, in float64."""
    outputs = []
    for tap, rows in enumerate(hidden):
        n = torch.stack(normed(rows))
        q, k, v = head.token[tap].double(), n @ head.key[tap].double().T, n @ head.value[tap].double().T
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0].flatten())
    whole = torch.cat(outputs)
    whole = F.layer_norm(whole, whole.shape, head.norm.weight.double(), head.norm.bias.double(), head.norm.eps)
    return head.out.weight.double()[0] @ whole + head.out.bias.double()[0]


def naive_logits(head, hidden, time):
    """The docstring's formula, frame by frame."""
    naive = {PooledHead: naive_pooled, TokenHead: naive_token}[type(head)]
    frames = [
        [h.double().unflatten(1, (FRAMES, TOKENS))[b, f] for h in hidden] for b in range(2) for f in range(FRAMES)
    ]
    return torch.stack([naive(head, *pair) for pair in zip(frames, time.double().flatten(0, 1))]).view(2, FRAMES)


def test_logits_are_the_formula_frame_by_frame(head, states, close):
    logits = head(*states)
    assert logits.shape == (2, FRAMES) and logits.dtype == torch.float32
    close(logits, naive_logits(head, *states), rel=1e-5)


def test_softmax_pooling_is_cross_attention_to_the_last_digit(tiny_config):
    """In float64: pooled with K^T q, then V, against explicit keys and values."""
    head = TokenHead(tiny_config).double().requires_grad_(False)
    torch.nn.init.normal_(head.out.weight)
    hidden = torch.randn(len(head.taps), TOKENS, tiny_config.dim, dtype=torch.float64)
    rows = torch.stack([torch.stack(normed(h)) for h in hidden])
    expected = naive_token(head, hidden, None)
    assert abs(head.logits(rows.flatten()[None]) - expected) < 1e-6 * abs(expected)


def test_what_a_head_is_fitted_to_gives_the_same_logits(head, states, close):
    """Features are stored in half precision at most."""
    close(head.logits(head.features(*states)), head(*states), rel=5e-3)


def test_the_features_of_large_frames_are_a_part_of_their_tokens(tiny_config):
    """Evenly spread: a clip of Wan's would hold gigabytes."""
    head = TokenHead(tiny_config)
    hidden = torch.arange(2 * 200.0).view(1, 400, 1) + torch.randn(1, 400, tiny_config.dim)
    whole = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6).half().unflatten(1, (2, 200))
    read = head.features([hidden] * len(head.taps), torch.zeros(1, 2, tiny_config.dim))
    assert torch.equal(read.unflatten(2, (len(head.taps), -1, tiny_config.dim))[:, :, 0], whole[:, :, ::4])


@pytest.mark.parametrize("frame", range(FRAMES))
def test_a_logit_reads_its_own_frame_only(head, states, frame):
    hidden, time = states
    before = head(hidden, time)
    for h in hidden:
        h[:, frame * TOKENS : (frame + 1) * TOKENS] += torch.randn(TOKENS, h.shape[-1])
    changed = (head(hidden, time) - before).abs() > 1e-6
    assert changed[:, frame].all() and changed.sum() == 2


def test_the_order_of_a_frames_tokens_does_not_matter(head, states, close):
    hidden, time = states
    order = torch.randperm(TOKENS)
    shuffled = [h.unflatten(1, (FRAMES, TOKENS))[:, :, order].flatten(1, 2) for h in hidden]
    close(head(shuffled, time), head(hidden, time), rel=1e-5)


def test_the_pooled_head_reads_the_timestep_and_the_token_head_what_the_blocks_made_of_it(head, states):
    hidden, time = states
    before = head(hidden, time)
    time[:, 2] += 1
    changed = (head(hidden, time) - before).abs() > 1e-6
    assert changed[:, 2].all() == (head.kind == "pooled") and changed.sum() == 2 * (head.kind == "pooled")


@pytest.mark.parametrize("kind", HEADS)
def test_an_untrained_head_says_one_half(tiny_config, states, kind):
    hidden, time = states
    head = new_head(tiny_config, kind)
    assert torch.equal(head([hidden[-1]] * len(head.taps), time).sigmoid(), torch.full((2, FRAMES), 0.5))


def test_half_precision_weights_give_float32_logits(head, states, close):
    expected = naive_logits(head, *states)
    hidden, time = states
    logits = head.bfloat16()([h.bfloat16() for h in hidden], time.bfloat16())
    assert logits.dtype == torch.float32
    close(logits, expected, rel=0.05)


@pytest.mark.parametrize(
    "kind, preset, share",
    [
        ("pooled", "wan2.1-t2v-1.3b", 0.01),
        ("pooled", "shapes", 0.05),
        ("token", "wan2.1-t2v-1.3b", 0.01),
        ("token", "wan2.1-t2v-14b", 0.01),
        ("token", "shapes", 0.01),
    ],
)
def test_a_head_is_a_small_share_of_its_dit(kind, preset, share):
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in made.parameters()) for made in (new_head(config, kind), CausalDiT(config))]
    assert 0 < sizes[0] / sizes[1] < share


def test_taps_are_those_of_the_paper_and_at_the_same_fractions_elsewhere():
    def taps(layers):
        return TokenHead(ModelConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=layers)).taps

    assert taps(30) == (13, 21, 29)
    for layers in range(1, 50):
        exact = {math.ceil(share * layers) - 1 for share in (Fraction(45, 100), Fraction(72, 100), Fraction(1))}
        assert set(taps(layers)) == exact and taps(layers)[-1] == layers - 1


@pytest.mark.parametrize("taps", [[], [0], [2, 1], [2, 2], [-1, 2], [2, 3]])
def test_taps_that_no_dit_has_are_named(tiny_config, taps):
    with pytest.raises(ValueError, match="must rise from 0 on and end with the last block, 2; the default is"):
        TokenHead(tiny_config, taps)


def test_settings_make_the_same_head_again(tiny_config, head):
    again = new_head(tiny_config, **head.settings())
    assert type(again) is type(head) and again.taps == head.taps and again.settings() == head.settings()
    with pytest.raises(ValueError, match="head='tokens': must be one of pooled, token"):
        new_head(tiny_config, "tokens")
