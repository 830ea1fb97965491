"""The DiT against two models of diffusers: Wan 2.1 for one chunk, block-causal SkyReels-V2 for a rollout with a cache.

Both get random weights and give them to ours through the checkpoint names, in float32.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

from dsa_engine.checkpoints.key_maps import wan_names
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.sampling.kv_cache import KVCache

REL = 1e-4
COMMON = {"text_dim": 40, "text_len": 12, "freq_dim": 64}
CONFIGS = {
    "three heads of 32": ModelConfig(dim=96, ffn_dim=160, num_heads=3, num_layers=3, **COMMON),
    "one head of 128": ModelConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, **COMMON),
    "heads of 10": ModelConfig(dim=40, ffn_dim=72, num_heads=4, num_layers=2, in_dim=5, out_dim=3, **COMMON),
}


def reference(kind, config: ModelConfig):
    """(model of diffusers with random weights in every parameter, our model with the same weights)."""
    theirs = kind(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        eps=config.eps,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    for parameter in theirs.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.15)
    ours = CausalDiT(config).requires_grad_(False).eval()
    load_strict(ours, wan_names(theirs.state_dict()), kind.__name__)
    return theirs, ours


def empty_cache(config: ModelConfig, size, window: int, slots: int = 3) -> KVCache:
    """A cache that holds NaN wherever nothing was written."""
    tokens = config.tokens_per_frame(*size)
    cache = KVCache(config.num_layers, config.num_heads, config.head_dim, tokens, window, slots=slots)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return cache


def forward(model, cache, slot, x, t, text_kv):
    rows = cache.rows(slot, x.shape[1])
    return model(x, t, rows.frames, text_kv, rows).velocity


def one_chunk(model, x, t, text):
    cache = empty_cache(model.config, x.shape[-2:], window=x.shape[1])
    return forward(model, cache, cache.acquire(len(x)), x, t, model.text_kv(text))


def block_causal(theirs, x, t, text, frames: int):
    """SkyReels-V2 on whole clips, [B, F, C, H, W] with timesteps [B, F]; frames attend up to the end of their block."""
    theirs._set_ar_attention(frames)
    return theirs(x.transpose(1, 2), t, text, enable_diffusion_forcing=True, return_dict=False)[0].transpose(1, 2)


@pytest.mark.parametrize("frames, height, width", [(1, 2, 2), (3, 4, 10), (5, 8, 6)])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_chunk_equals_wan(name, frames, height, width, close):
    config = CONFIGS[name]
    theirs, ours = reference(WanTransformer3DModel, config)
    x, text = torch.randn(2, frames, config.in_dim, height, width), torch.randn(2, 12, 40)
    t = torch.tensor([937.5, 36.25])
    expected = theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    close(one_chunk(ours, x, t[:, None].expand(2, frames), text), expected, REL)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_frame_has_its_own_timestep(name, close):
    config = CONFIGS[name]
    theirs, ours = reference(SkyReelsV2Transformer3DModel, config)
    x, text = torch.randn(2, 3, config.in_dim, 4, 6), torch.randn(2, 12, 40)
    t = torch.tensor([[1000.0, 833.33, 0.0], [12.5, 625.0, 1000.0]])
    close(one_chunk(ours, x, t, text), block_causal(theirs, x, t, text, frames=1), REL)


@pytest.mark.parametrize("name, frames", [("three heads of 32", 2), ("three heads of 32", 3), ("heads of 10", 2)])
def test_a_rollout_with_the_cache_equals_the_block_causal_model(name, frames, close):
    """Four chunks of three noisy steps and a clean commit; every step against the whole clip up to that chunk."""
    config = CONFIGS[name]
    theirs, ours = reference(SkyReelsV2Transformer3DModel, config)
    text = torch.randn(2, 12, 40)
    text_kv, cache = ours.text_kv(text), empty_cache(config, (4, 6), window=4 * frames)
    slot = cache.acquire(3)[[2, 0]]
    past = torch.empty(2, 0, config.in_dim, 4, 6)
    for _ in range(4):
        for step in ((1000.0, 1000.0), (937.5, 625.0), (250.0, 833.33), (0.0, 0.0)):
            chunk = torch.randn(2, frames, config.in_dim, 4, 6)
            t = torch.tensor(step)[:, None].expand(2, frames)
            clip, times = torch.cat((past, chunk), dim=1), torch.cat((torch.zeros(past.shape[:2]), t), dim=1)
            expected = block_causal(theirs, clip, times, text, frames)[:, -frames:]
            close(forward(ours, cache, slot, chunk, t, text_kv), expected, REL)
        cache.advance(slot, frames)
        past = clip


def roll(model, position: int, chunks: int = 3, frames: int = 2):
    """Velocities of a committed rollout that starts at an absolute position; the inputs are the same every time."""
    generator = torch.Generator().manual_seed(1)
    cache = empty_cache(model.config, (4, 6), window=chunks * frames)
    slot, text_kv = cache.acquire(1), model.text_kv(torch.randn(1, 12, 40, generator=generator))
    cache.seek(slot, position)
    velocities = []
    for _ in range(chunks):
        x = torch.randn(1, frames, 16, 4, 6, generator=generator)
        velocities.append(forward(model, cache, slot, x, torch.full((1, frames), 500.0), text_kv))
        cache.advance(slot, frames)
    return torch.cat(velocities, dim=1)


@pytest.mark.parametrize("shift", [1021, 5000, 10**6])
def test_a_rollout_is_the_same_at_any_absolute_position(tiny_dit, shift, close):
    """Past Wan's table of 1024 positions too: only distances count."""
    close(roll(tiny_dit, shift), roll(tiny_dit, 0), REL)


def test_rows_of_one_batch_may_be_at_different_chunks(close):
    """Row 0 is at its third chunk and row 1 at its first: each against the whole clip of its own."""
    config = CONFIGS["three heads of 32"]
    theirs, ours = reference(SkyReelsV2Transformer3DModel, config)
    text, clip = torch.randn(2, 12, 40), torch.randn(2, 6, 16, 4, 6)
    text_kv, cache = ours.text_kv(text), empty_cache(config, (4, 6), window=6)
    slot, clean = cache.acquire(2), torch.zeros(1, 2)
    for chunk in (clip[:1, :2], clip[:1, 2:4]):
        forward(ours, cache, slot[:1], chunk, clean, text_kv.select(slice(1)))
        cache.advance(slot[:1], 2)
    x, t = torch.stack((clip[0, 4:], clip[1, :2])), torch.tensor([[625.0, 625.0], [937.5, 937.5]])
    velocity = forward(ours, cache, slot, x, t, text_kv)
    late = block_causal(theirs, clip[:1], torch.cat((torch.zeros(1, 4), t[:1]), dim=1), text[:1], frames=2)[0, 4:]
    early = block_causal(theirs, clip[1:, :2], t[1:], text[1:], frames=2)[0]
    close(velocity, torch.stack((late, early)), REL)


def test_a_short_prompt_is_padded_with_zeros_that_are_attended(close):
    config = CONFIGS["three heads of 32"]
    theirs, ours = reference(WanTransformer3DModel, config)
    x, text, t = torch.randn(1, 2, 16, 4, 4), torch.randn(1, 12, 40), torch.tensor([500.0])
    text[:, 5:] = 0
    expected = theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    close(one_chunk(ours, x, t[:, None].expand(1, 2), text[:, :5]), expected, REL)


def test_one_key_stands_for_all_the_padding(tiny_dit, close):
    """Prompts of 3 and 12 of 12 tokens and an empty one: the collapsed keys give what all of them give."""
    text = torch.randn(3, 12, 40)
    text[0, 3:], text[2] = 0, 0
    text[0, 1] = 0  # a zero inside the prompt is no padding
    whole, collapsed = tiny_dit.text_kv(text), tiny_dit.text_kv(text, collapse=True)
    assert (collapsed.used.tolist(), collapsed.repeat.tolist()) == ([4, 12, 1], [9.0, 1.0, 12.0])
    short = tiny_dit.text_kv(text[:1], collapse=True)
    assert short.kv.shape[3] == 4
    x, t = torch.randn(3, 2, 16, 4, 4), torch.full((3, 2), 500.0)

    def velocity(x, kv):
        cache = empty_cache(tiny_dit.config, (4, 4), window=2, slots=len(x))
        return forward(tiny_dit, cache, cache.acquire(len(x)), x, t[: len(x)], kv)

    expected = velocity(x, whole)
    close(velocity(x, collapsed), expected, REL)
    close(velocity(x[:1], short), expected[:1], REL)


@pytest.mark.parametrize("shape", [(12, 40), (1, 13, 40), (1, 12, 41)])
def test_prompt_embeddings_of_another_shape_are_named(tiny_dit, shape):
    with pytest.raises(ValueError, match="prompt_embeds") as error:
        tiny_dit.text_kv(torch.zeros(shape))
    assert str(list(shape)) in str(error.value) and "[B, L, 40]" in str(error.value) and "12" in str(error.value)


def test_the_outputs_have_the_promised_shapes(tiny_dit):
    cache = empty_cache(tiny_dit.config, (4, 6), window=2)
    rows, text_kv = cache.rows(cache.acquire(2), 2), tiny_dit.text_kv(torch.zeros(2, 1, 40))
    out = tiny_dit(torch.randn(2, 2, 16, 4, 6), torch.zeros(2, 2), rows.frames, text_kv, rows, (0, 2))
    assert list(out.velocity.shape) == [2, 2, 16, 4, 6] and list(out.time.shape) == [2, 2, 96]
    assert [list(x.shape) for x in out.hidden] == [[2, 12, 96]] * 2


def test_bfloat16_stays_near_float32(tiny_dit, close):
    x, t, text = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 833.33), torch.randn(1, 12, 40)
    expected = one_chunk(tiny_dit, x, t, text)
    velocity = one_chunk(tiny_dit.bfloat16(), x, t, text)
    assert velocity.dtype == torch.bfloat16
    close(velocity, expected, rel=0.05)


def test_a_forward_and_its_commit_read_nothing_back_from_the_device(tiny_config):
    """On the meta device there is nothing to read: any `.item()` or shape that depends on a value would raise."""
    with torch.device("meta"):
        model, x = CausalDiT(tiny_config), torch.empty(2, 2, 16, 4, 6)
        text_kv = model.text_kv(torch.empty(2, 12, 40))
        cache = KVCache(3, 3, 32, tokens=6, window=5, sink=1, slots=2, device="meta")
        slot = cache.acquire(2)
        velocity = forward(model, cache, slot, x, torch.empty(2, 2), text_kv)
        cache.advance(slot, 2)
    assert velocity.shape == x.shape and velocity.is_meta
