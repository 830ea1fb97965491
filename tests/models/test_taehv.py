"""TAEHV against its definition written plainly for a whole clip, in any chunks, and its files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.models.taehv import TAEHV

REL = 1e-5


def conv(w, name, x, stride: int = 1):
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride=stride, padding=kernel.shape[-1] // 2)


def memory(w, name, x):
    """x [T, C, H, W]: all frames of a clip beside their predecessors, black before the first."""
    h = torch.cat((x, torch.cat((torch.zeros_like(x[:1]), x[:-1]))), dim=1)
    h = conv(w, f"{name}.conv.0", h).relu()
    h = conv(w, f"{name}.conv.2", h).relu()
    return (x + conv(w, f"{name}.conv.4", h)).relu()


def plain_decode(w, x):
    """latents [F, C, h, w] of a whole clip -> frames [4 F - 3, 3, 8 h, 8 w]."""
    x = conv(w, "decoder.1", torch.tanh(x / 3) * 3).relu()
    for at, frames in ((3, 1), (9, 2), (15, 2)):
        for block in range(at, at + 3):
            x = memory(w, f"decoder.{block}", x)
        x = x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        grown = conv(w, f"decoder.{at + 4}.conv", x).chunk(frames, dim=1)
        x = torch.stack([part[t] for t in range(len(x)) for part in grown])
        x = conv(w, f"decoder.{at + 5}", x)
    return conv(w, "decoder.22", x.relu()).clamp(0, 1)[3:]


def plain_encode(w, x):
    """frames [4 n + 1, 3, H, W] of a whole clip -> latents [n + 1, C, h, w]."""
    x = conv(w, "encoder.0", torch.cat((x, x[-1:], x[-1:], x[-1:]))).relu()
    for at, frames in ((2, 2), (7, 2), (12, 1)):
        rows = torch.stack([torch.cat(list(x[t : t + frames])) for t in range(0, len(x), frames)])
        x = conv(w, f"encoder.{at + 1}", conv(w, f"encoder.{at}.conv", rows), stride=2)
        for block in range(at + 2, at + 5):
            x = memory(w, f"encoder.{block}", x)
    return conv(w, "encoder.17", x)


@pytest.fixture(scope="module")
def vae() -> TAEHV:
    """As few channels as show every kind of layer, weights that keep the pictures within (0, 1)."""
    torch.manual_seed(0)
    vae = TAEHV(widths=(8, 6, 5, 4), latent_channels=3).requires_grad_(False).eval()
    for parameter in vae.parameters():
        parameter.normal_(std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    vae.decoder[-1].weight *= 0.6
    vae.decoder[-1].bias.fill_(0.5)
    return vae


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_decode_equals_the_plain_definition(vae, close):
    latents = 4 * random(2, 5, 3, 2, 3) - 2
    expected = torch.stack([plain_decode(vae.state_dict(), clip) for clip in latents])
    assert expected.shape == (2, 17, 3, 16, 24)
    assert ((expected == 0) | (expected == 1)).float().mean() < 0.1 and expected.std() > 0.05
    close(vae.decode(latents)[0], expected, REL)


@pytest.mark.parametrize("pass_frames", [1, 2, 3, 9])
def test_encode_equals_the_plain_definition(vae, pass_frames, close):
    clip = random(2, 17, 3, 16, 24)
    vae.pass_frames = pass_frames
    expected = torch.stack([plain_encode(vae.state_dict(), frames) for frames in clip])
    assert expected.shape == (2, 5, 3, 2, 3)
    close(vae.encode(clip), expected, REL)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_any_partition_decodes_to_the_same_frames(vae, parts, pass_frames):
    latents = 4 * random(1, sum(parts), 3, 2, 3) - 2
    expected = plain_decode(vae.state_dict(), latents[0])
    vae.pass_frames, state, chunks = pass_frames, None, []
    for i, chunk in enumerate(latents.split(parts, dim=1)):
        frames, state = vae.decode(chunk, state)
        assert frames.shape[1] == vae.frames_of(chunk.shape[1], first=i == 0)
        chunks.append(frames)
    torch.testing.assert_close(torch.cat(chunks, dim=1)[0], expected, rtol=0, atol=1e-5)


def test_a_state_is_a_value(vae):
    with torch.inference_mode():
        _, state = vae.decode(random(1, 2, 3, 2, 3))
    before = copy.deepcopy(state)
    chunk = random(1, 3, 3, 2, 3)
    first, _ = vae.decode(chunk, state)
    assert all(torch.equal(a, b) for a, b in zip(state, before))
    assert all(torch.equal(first, vae.decode(chunk, s)[0]) for s in (state, before))
    assert all(tail.untyped_storage().nbytes() == tail.nbytes for tail in state)
    with pytest.raises(ValueError, match="state holds"):
        vae.decode(random(1, 3, 3, 3, 2), state)


def test_full_size_has_taehv_s_names():
    with torch.device("meta"):
        vae = TAEHV()
        frames, state = vae.decode(torch.empty(1, 21, 16, 2, 3))
    convs = {"encoder": {0, 2, 3, 7, 8, 12, 13, 17}, "decoder": {1, 7, 8, 13, 14, 19, 20, 22}}
    memories = {"encoder": (4, 5, 6, 9, 10, 11, 14, 15, 16), "decoder": (3, 4, 5, 9, 10, 11, 15, 16, 17)}
    inner = {"encoder": {2, 7, 12}, "decoder": {7, 13, 19}}  # TPool and TGrow hold theirs as `conv`
    biased = {"encoder": {0, 17}, "decoder": {1, 22}}
    names = {
        f"{half}.{i}.{'conv.' if i in inner[half] else ''}{kind}"
        for half in convs
        for i in convs[half]
        for kind in ("weight", "bias")
        if kind == "weight" or i in biased[half]
    } | {
        f"{half}.{i}.conv.{j}.{kind}"
        for half in memories
        for i in memories[half]
        for j in (0, 2, 4)
        for kind in ("weight", "bias")
    }
    assert vae.state_dict().keys() == names and len(names) == 128
    assert sum(p.numel() for p in vae.parameters()) == 11_315_539
    assert frames.shape == (1, 81, 3, 16, 24) and len(state) == 9
    assert vae.spatial_stride == 8 and vae.temporal_stride == 4 and vae.latent_channels == 16


def test_what_does_not_fit_is_refused(vae):
    for call, shape, message in [
        (vae.encode, (1, 4, 3, 16, 16), "frames = 4: .* nearest is 5"),
        (vae.encode, (1, 5, 3, 17, 8), "multiples of 8; nearest is 16 x 8"),
        (vae.decode, (1, 2, 4, 2, 2), "third axis must be 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
