"""The pixel codec: shapes, independence of frames, refusals, and that a short training run learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.training.pixel_codec import (
    held_out_psnr,
    random_frames,
    reconstruction_loss,
    rescale_latents,
    train_codec,
)


@pytest.fixture(scope="module")
def codec() -> PixelCodec:
    """Untrained, with a normaliser that has seen frames: the weights do not matter for what is tested here."""
    torch.manual_seed(0)
    codec = PixelCodec().requires_grad_(False)
    for seed in range(30):
        codec.encode(random_frames(np.random.default_rng(seed), 8))
    return codec.eval()


def test_shapes_and_strides_agree(codec):
    frames = torch.rand(2, 5, 3, 32, 48)
    latents = codec.encode(frames)
    assert latents.shape == (2, 5, codec.latent_channels, 32 // codec.spatial_stride, 48 // codec.spatial_stride)
    decoded, state = codec.decode(latents)
    assert decoded.shape == frames.shape and state is None
    assert decoded.min() >= 0 and decoded.max() <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_any_partition_into_chunks_decodes_to_the_same_frames(codec, parts):
    latents = torch.randn(1, sum(parts), 16, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, _ = codec.decode(latents)
    state, chunks = None, []
    for i, chunk in enumerate(latents.split(parts, dim=1)):
        frames, state = codec.decode(chunk, state)
        assert frames.shape[1] == codec.frames_of(chunk.shape[1], first=i == 0)
        chunks.append(frames)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=0, atol=1e-6)
    assert codec.latent_frames_of(whole.shape[1]) == sum(parts)


def test_latents_have_unit_deviation_after_rescaling_and_decode_as_before():
    torch.manual_seed(0)
    codec = PixelCodec().requires_grad_(False).eval()  # running statistics 0 and 1: the deviation is far from 1
    frames = random_frames(np.random.default_rng(0), 64)
    before, _ = codec.decode(codec.encode(frames))
    rescale_latents(codec, frames)
    latents = codec.encode(frames)
    torch.testing.assert_close(latents.std(dim=(0, 1, 3, 4)), torch.ones(16))
    torch.testing.assert_close(codec.decode(latents)[0], before, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(codec):
    for call, shape, message in [
        (codec.encode, (1, 2, 4, 64, 64), "third axis must be 3"),
        (codec.encode, (2, 3, 64, 64), "third axis must be 3"),
        (codec.encode, (1, 1, 3, 60, 64), "nearest is 64 x 64"),
        (codec.encode, (1, 1, 3, 3, 81), "nearest is 8 x 80"),
        (codec.decode, (1, 2, 3, 8, 8), "third axis must be 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"frames={count}.* at least 1"):
            codec.latent_frames_of(count)


def test_the_loss_is_the_plain_sum_with_three_times_the_weight_at_outlines():
    """A white square of 4 x 4 on black has an outline 2 px wide: 6 x 6 less 2 x 2 pixels."""
    frames = torch.zeros(1, 1, 3, 16, 16)
    frames[..., 6:10, 6:10] = 1
    output = frames + 0.5
    expected = (256 + 2 * (36 - 4)) / 256 * (0.5**2 + 0.05 * 0.5)
    assert reconstruction_loss(output, frames).item() == pytest.approx(expected)


def test_a_short_run_halves_the_loss_and_repeats_itself():
    losses: list[float] = []
    codec, psnr = train_codec(40, seed=1, log=lambda _, loss: losses.append(loss), progress=False)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2
    assert psnr == held_out_psnr(codec) > 10 and not codec.training
    twins = [train_codec(2, seed=1, progress=False)[0].state_dict().values() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twins))
    with pytest.raises(ValueError, match="iterations=0"):
        train_codec(0)
