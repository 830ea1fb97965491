"""A rollout on the ring cache against one that keeps every key for ever, and its two commit modes."""

from __future__ import annotations

import pytest
import torch

from dsa_engine import Fixed, PerChunk
from dsa_engine.config import RolloutConfig
from dsa_engine.engine.engine import Engine

SIZE, CHUNKS, FRAMES = 4, 6, 2


def engine(dit, **options) -> Engine:
    return Engine(dit, None, None, None, RolloutConfig(chunk_frames=FRAMES, shift=3.0, **options), max_sessions=2)


def rollout(dit, noise, embeds, counts=(2,), given=None, begun=None, init_latents=None, strength=1.0, **options):
    made = engine(dit, **options)
    return made.rollout(
        embeds,
        height=SIZE,
        width=SIZE,
        frames=CHUNKS * FRAMES,
        policy=PerChunk(list(counts)),
        seeds=range(len(noise)),
        config=made.config,
        initial_noise=noise,
        renoise=given,
        given=begun,
        init_latents=init_latents,
        strength=strength,
    )


def run(roll, chunks_wanted=CHUNKS) -> torch.Tensor:
    chunks = []
    for _ in range(chunks_wanted):
        result = roll.denoise()
        roll.accept(result.latents)
        chunks.append(result.latents)
    return torch.cat(chunks, dim=1)


def rotated(x, heads, cos, sin):
    z = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)).contiguous())
    return torch.view_as_real(z * torch.complex(cos.double(), sin.double())[:, :, None]).flatten(-2).float()


class Everything:
    """A memory that concatenates every frame's keys and slices out the sink and the last window - sink frames."""

    def __init__(self, layers, heads, tokens, window, sink):
        self.kv = [[] for _ in range(layers)]
        self.heads, self.tokens, self.window, self.sink, self.keep = heads, tokens, window, sink, False

    def attend(self, layer, q, k, v, gains, rope, eps):
        def norm(x, gain):
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

        q, k = rotated(norm(q, gains[0]), self.heads, *rope), rotated(norm(k, gains[1]), self.heads, *rope)
        v = v.unflatten(-1, (self.heads, -1))
        past = self.kv[layer] + [(k, v)]
        if self.keep:
            self.kv[layer] = past
        keys, values = (torch.cat([pair[i] for pair in past], dim=1) for i in (0, 1))
        sink, ring = self.sink * self.tokens, (self.window - self.sink) * self.tokens
        start = max(sink, keys.shape[1] - ring)
        keys, values = (torch.cat((x[:, :sink], x[:, start:]), dim=1) for x in (keys, values))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(2)


def naive(dit, noise, embeds, counts, renoise, sigmas, window, sink, commit="clean", begun=()):
    """begun: chunks of clean latents that are committed before anything is made."""
    config = dit.config
    memory = Everything(config.num_layers, config.num_heads, 4, window, sink)
    text_kv, out, first = dit.text_kv(embeds), [], 0
    memory.keep = True
    for chunk in begun:
        frames = torch.arange(first, first + chunk.shape[1]).expand(len(chunk), -1)
        dit(chunk, torch.zeros(chunk.shape[:2]), frames, text_kv, memory)
        first += chunk.shape[1]
    for c in range(noise.shape[1] // FRAMES):
        x = noise[:, c * FRAMES : (c + 1) * FRAMES]
        frames = torch.arange(first + c * FRAMES, first + (c + 1) * FRAMES).expand(len(x), -1)
        memory.keep = False
        count = counts[min(c, len(counts) - 1)]
        for step in range(count):
            memory.keep = commit == "exit_step" and step == count - 1
            x0 = (
                x - sigmas[step] * dit(x, torch.full((len(x), FRAMES), 1000 * sigmas[step]), frames, text_kv, memory)[0]
            )
            if step + 1 < count:
                s = sigmas[step + 1]
                x = (1 - s) * x0 + s * renoise[:, c * FRAMES : (c + 1) * FRAMES]
        if commit == "clean":
            memory.keep = True
            dit(x0, torch.zeros(len(x), FRAMES), frames, text_kv, memory)
        memory.keep = False
        out.append(x0)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    "window, sink, commit",
    [(None, 0, "clean"), (6, 0, "clean"), (5, 0, "clean"), (6, 2, "clean"), (7, 3, "clean"), (6, 1, "exit_step")],
)
def test_ring_equals_a_cache_that_keeps_everything(tiny_dit, close, window, sink, commit):
    noise, given = torch.randn(2, 2, CHUNKS * FRAMES, 16, SIZE, SIZE).unbind(0)
    embeds, counts = torch.randn(2, 5, 40), (2, 1, 3, 2)
    options = dict(window=window, sink=sink, commit=commit)
    roll = rollout(tiny_dit, noise, embeds, counts, given, **options)
    roll.cache.k.fill_(float("nan"))
    roll.cache.v.fill_(float("nan"))
    sigmas = roll.schedule.sigmas
    expected = naive(tiny_dit, noise, embeds, counts, given, sigmas, window or CHUNKS * FRAMES, sink, commit)
    close(run(roll), expected, 1e-4)


def test_a_switch_with_recache_equals_a_past_made_under_the_new_prompt(tiny_dit, close):
    """Global window: after the switch the cache must be what committing the same latents under the new prompt gives."""
    noise, given = torch.randn(2, 1, CHUNKS * FRAMES, 16, SIZE, SIZE).unbind(0)
    old, new = torch.randn(2, 1, 5, 40).unbind(0)
    switched = rollout(tiny_dit, noise, old, given=given, window=None)
    for _ in range(3):
        switched.accept(switched.denoise().latents)
    switched.set_prompt(tiny_dit.text_kv(new), recache=True)
    fresh = rollout(tiny_dit, noise, new, given=given, window=None)
    for _, latents in list(switched.past):
        fresh.accept(latents)
        fresh.flush_cache()
    close(switched.denoise().latents, fresh.denoise().latents, 1e-6)


@pytest.mark.parametrize("window, sink", [(6, 0), (7, 3), (6, 2), (5, 0)])
def test_recache_under_the_same_prompt_keeps_every_frame_at_its_place(tiny_dit, window, sink):
    """The first layer's keys depend on a frame's latents and position alone, so a replay must bring them all back."""
    noise, embeds = torch.randn(1, CHUNKS * FRAMES, 16, SIZE, SIZE), torch.randn(1, 5, 40)
    roll = rollout(tiny_dit, noise, embeds, window=window, sink=sink)
    run(roll)
    roll.flush_cache()

    def first_layer_keys():
        keys = roll.cache.k[0, roll.slot].flatten(2)[0]
        return keys[keys[:, 0].argsort()]

    before, position = first_layer_keys(), roll.cache.position.clone()
    roll.set_prompt(roll.text_kv, recache=True)
    roll.flush_cache()
    torch.testing.assert_close(first_layer_keys(), before, rtol=0, atol=1e-5)
    assert roll.cache.position.equal(position)


def test_without_recache_the_past_keeps_the_old_prompt(tiny_dit):
    noise, (old, new) = torch.randn(1, CHUNKS * FRAMES, 16, SIZE, SIZE), torch.randn(2, 1, 5, 40).unbind(0)
    outcomes = {}
    for recache in (True, False):
        roll = rollout(tiny_dit, noise, old, window=None)
        for _ in range(2):
            roll.accept(roll.denoise().latents)
        roll.flush_cache()
        kept = roll.cache.k[:, roll.slot, : 2 * FRAMES].clone()
        roll.set_prompt(tiny_dit.text_kv(new), recache)
        outcomes[recache] = roll.denoise().latents
        assert roll.cache.k[:, roll.slot, : 2 * FRAMES].equal(kept) is not recache
    assert not outcomes[True].equal(outcomes[False])


def test_positions_are_absolute(tiny_dit):
    """A chunk's frames are counted from the clip's start, also after the ring has wrapped."""
    noise, embeds = torch.randn(1, CHUNKS * FRAMES, 16, SIZE, SIZE), torch.randn(1, 5, 40)
    roll = rollout(tiny_dit, noise, embeds, window=4)
    run(roll)
    frames = roll.cache.rows(roll.slot, FRAMES).frames - FRAMES
    assert frames.tolist() == [[(CHUNKS - 2) * FRAMES, (CHUNKS - 2) * FRAMES + 1]]  # the last chunk is not committed


def test_too_few_slots_is_an_error_that_says_what_to_do(tiny_dit):
    made = engine(tiny_dit, window=4)
    cache = made._pool(made._pool_shape(SIZE, SIZE, None, made.config), 1).cache
    cache.acquire(1)
    with pytest.raises(RuntimeError, match="max_sessions"):
        cache.acquire(1)


def test_an_endless_rollout_needs_a_window(tiny_dit):
    made = engine(tiny_dit, window=None)
    with pytest.raises(ValueError, match="rolling window"):
        made.rollout(
            torch.randn(1, 5, 40), height=SIZE, width=SIZE, frames=None, policy=Fixed(1), seeds=[0], config=made.config
        )


@pytest.mark.parametrize("window, sink", [(None, 0), (6, 0), (7, 3)])
@pytest.mark.parametrize("begun", [(1,), (2,), (1, 2), (2, 2)])
def test_a_clip_goes_on_from_what_it_was_given(tiny_dit, close, begun, window, sink):
    """A picture (one frame), a chunk, a picture and a chunk, two chunks: committed as they are, then as always."""
    noise, given = torch.randn(2, 1, 4 * FRAMES, 16, SIZE, SIZE).unbind(0)
    embeds, latents = torch.randn(1, 5, 40), torch.randn(1, sum(begun), 16, SIZE, SIZE)
    roll = rollout(tiny_dit, noise, embeds, (2, 1), given, begun=latents, window=window, sink=sink)
    expected = naive(
        tiny_dit,
        noise,
        embeds,
        (2, 1),
        given,
        roll.schedule.sigmas,
        window or CHUNKS * FRAMES,
        sink,
        begun=latents.split(list(begun), dim=1),
    )
    close(run(roll, 4), expected, 1e-4)
    assert roll.position == sum(begun) + 4 * FRAMES
    roll.restart()
    close(run(roll, 4), expected, 1e-4)


def test_of_a_long_video_only_the_window_is_committed(tiny_dit, close):
    """The ring's keys come from the last frames given, at their places; a shorter replay, so only the first layer's
    keys, which depend on nothing else, must be those of the whole."""
    noise, embeds = torch.randn(1, 2, 16, SIZE, SIZE), torch.randn(1, 5, 40)
    latents = torch.randn(1, 21, 16, SIZE, SIZE)
    roll = rollout(tiny_dit, noise, embeds, begun=latents, window=7, sink=2)
    roll.flush_cache()
    whole = rollout(tiny_dit, torch.randn(1, 24, 16, SIZE, SIZE), embeds, begun=latents[:, :1], window=7, sink=2)
    for chunk in latents[:, 1:].split(FRAMES, dim=1):
        whole.flush_cache()
        whole.accept(chunk)
    whole.flush_cache()

    def kept(r):
        return r.cache.k[0, r.slot, r.cache._ring_index(torch.tensor([0, 1, 16, 17, 18, 19, 20]))]

    assert (roll.position, roll.cache.position.item()) == (21, 21)
    assert len(roll.past) < 6
    close(kept(roll), kept(whole), 1e-5)


@pytest.mark.parametrize("strength, levels", [(1.0, 3), (0.7, 2), (0.5, 2), (0.34, 1), (0.01, 1)])
def test_a_guide_is_noised_to_the_strength_and_denoised_from_there(tiny_dit, close, strength, levels):
    noise, given, init_latents = torch.randn(3, 1, CHUNKS * FRAMES, 16, SIZE, SIZE).unbind(0)
    embeds = torch.randn(1, 5, 40)
    options = dict(init_latents=init_latents, strength=strength, steps=(1000.0, 600.0, 200.0))
    roll = rollout(tiny_dit, noise, embeds, (levels,), given, **options)
    sigmas = [3 * s / (1 + 2 * s) for s in (1.0, 0.6, 0.2)][-levels:]
    start = (1 - sigmas[0]) * init_latents + sigmas[0] * noise
    expected = naive(tiny_dit, start, embeds, (levels,), given, sigmas, CHUNKS * FRAMES, 0)
    close(run(roll), expected, 1e-4)
