"""Teacher forcing in one pass against the KV cache that serves the same chunks one after another."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.sampling.denoise import commit_chunk
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.training.flow import recached
from dsa_engine.training.teacher_forcing import teacher_forced, whole_clip
from tests.support.checkpoints import velocity

CLIPS, CHUNKS, FRAMES, SIZE = 2, 5, 2, 4


@pytest.mark.parametrize("context", [1, 2, 4])
def test_one_pass_equals_the_cached_rollout(tiny_dit, close, context):
    clean, noisy = torch.randn(2, CLIPS, CHUNKS, FRAMES, 16, SIZE, SIZE).unbind(0)
    sigma = torch.rand(CLIPS, CHUNKS)
    committed, text = torch.randn(2, CLIPS, CHUNKS, 12, 40).unbind(0)
    out = teacher_forced(tiny_dit, clean, noisy, sigma, committed, text, context, (0, 2))
    velocity = out.velocity.view_as(noisy)

    config, window = tiny_dit.config, (context + 1) * FRAMES
    cache = KVCache(config.num_layers, config.num_heads, config.head_dim, 4, window, slots=CLIPS)
    slot = cache.acquire(CLIPS)
    for i in range(CHUNKS):
        rows = cache.rows(slot, FRAMES)
        t = 1000 * sigma[:, i, None].expand(-1, FRAMES)
        served = tiny_dit(noisy[:, i], t, rows.frames, tiny_dit.text_kv(text[:, i]), rows, (0, 2))
        close(velocity[:, i], served.velocity, 1e-4)
        for tap in range(2):
            close(out.hidden[tap].unflatten(0, (CLIPS, CHUNKS))[:, i], served.hidden[tap], 1e-4)
        commit_chunk(tiny_dit, clean[:, i], tiny_dit.text_kv(committed[:, i]), rows)
        cache.advance(slot, FRAMES)


def test_the_future_does_not_reach_the_past(tiny_dit):
    clean, noisy = torch.randn(2, 1, CHUNKS, FRAMES, 16, SIZE, SIZE).unbind(0)
    sigma, text = torch.rand(1, CHUNKS), torch.randn(1, CHUNKS, 12, 40)

    def velocity():
        return teacher_forced(tiny_dit, clean, noisy, sigma, text, text, 2).velocity.view_as(noisy)

    before = velocity()
    clean[:, 2] += 1
    after = velocity()
    changed = [not before[:, i].equal(after[:, i]) for i in range(CHUNKS)]
    assert changed == [False, False, False, True, True]


def test_a_whole_clip_is_one_chunk_without_a_past(tiny_dit, close):
    """Every frame sees every other, as one chunk of all frames does on an empty cache; rows are (clip, chunk)."""
    clean, noisy = torch.randn(2, CLIPS, CHUNKS, FRAMES, 16, SIZE, SIZE).unbind(0)
    sigma, text = torch.rand(CLIPS, 1).expand(-1, CHUNKS), torch.randn(CLIPS, 1, 12, 40).expand(-1, CHUNKS, -1, -1)
    out = whole_clip(tiny_dit, clean, noisy, sigma, text, text, CHUNKS, (1,))
    expected = velocity(tiny_dit, noisy.flatten(1, 2), 1000 * sigma[:, 0], text[:, 0])
    close(out.velocity.view_as(noisy), expected.view_as(noisy), 1e-4)
    assert out.hidden[0].shape == (CLIPS * CHUNKS, FRAMES * 4, 96) and out.time.shape == (CLIPS * CHUNKS, FRAMES, 96)


def test_recached_clips_carry_the_last_prompt_and_learn_only_from_what_follows():
    one, two, three = ([i] * 4 for i in (1, 2, 3))
    tokens = torch.tensor([[one, one, two, two], [one, two, two, three], [one, one, one, one]])
    seen = set()
    for seed in range(40):
        committed, weight = recached(tokens, torch.Generator().manual_seed(seed))
        for clip, (last, switch) in enumerate((([2, 2, 2, 2], 2), ([3, 3, 3, 3], 3), ([1, 1, 1, 1], 0))):
            words = committed[clip, :, 0].tolist()
            learns = weight[clip].tolist()
            if words == tokens[clip, :, 0].tolist():
                assert clip == 2 or learns == [1, 1, 1, 1]
            else:
                assert words == last
                assert learns == [1.0 if i == 0 or i >= switch else 0.0 for i in range(4)]
                seen.add(clip)
    assert seen == {0, 1}
