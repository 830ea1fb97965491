"""The Wan VAE: equal to diffusers' frame-by-frame one, the same in any chunks, its files told apart."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsa_engine.checkpoints.key_maps import VAE_KEYS, rename, wan_vae_names
from dsa_engine.checkpoints.vae import load_vae
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.models import wan_vae as vae_module
from dsa_engine.models.wan_vae import LATENT_MEAN, LATENT_STD, CausalConv3d, WanVAE

REL = 1e-4
# The geometries diffusers is asked for: its own arguments, and ours
GEOMETRIES = {
    "Wan 2.1, narrow": ({"base_dim": 8}, {"dim": 8}),
    "three levels, both in time": (
        {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 3, 2], "temperal_downsample": [True, True]},
        {"dim": 6, "latent_channels": 4, "multipliers": (1, 3, 2), "time_down": (True, True)},
    ),
    "two levels, one frame each": (
        {"base_dim": 4, "z_dim": 5, "dim_mult": [2, 1], "temperal_downsample": [False]},
        {"dim": 4, "latent_channels": 5, "multipliers": (2, 1), "time_down": (False,)},
    ),
}


def random_weights(model):
    """Every parameter random and the pictures within (0, 1): neither a gain of 1 nor the clamp hides anything."""
    for name, parameter in model.requires_grad_(False).eval().named_parameters():
        parameter.normal_(std=0.15)
        if name.endswith("gamma"):
            parameter += 1
        if name.startswith(("decoder.head.2", "decoder.conv_out")):
            parameter *= 0.3
    return model


def reference(geometry: str):
    """(diffusers' VAE with random weights, the constructor's arguments for ours)."""
    arguments, ours = GEOMETRIES[geometry]
    channels = arguments.get("z_dim", 16)
    statistics = {"mean": LATENT_MEAN[:channels], "std": LATENT_STD[:channels]}
    return random_weights(AutoencoderKLWan(**arguments)), ours | statistics


def with_axes(values):
    return torch.tensor(values)[:, None, None, None]


def check_parity(theirs, ours, statistics, close):
    """Whole clips, of which diffusers encodes four frames and decodes one latent frame at a time."""
    mean, std = with_axes(statistics["mean"]), with_axes(statistics["std"])
    clip = torch.rand(2, 13, 3, 2 * ours.spatial_stride, 3 * ours.spatial_stride)
    expected = theirs.encode(2 * clip.transpose(1, 2) - 1).latent_dist.mode()
    close(ours.encode(clip), ((expected - mean) / std).transpose(1, 2), REL)
    latents = torch.randn(2, 4, ours.latent_channels, 3, 2)
    expected = theirs.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2) / 2 + 0.5
    assert ((expected == 0) | (expected == 1)).float().mean() < 0.1 and expected.std() > 0.05
    frames, _ = ours.decode(latents)
    close(frames, expected, REL)


@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_encode_and_decode_equal_diffusers(geometry, unit, close, monkeypatch):
    """With the outputs of every convolution over time padded to the multiple that tensor cores take, too."""
    monkeypatch.setattr(vae_module, "_unit", lambda x: unit)
    theirs, arguments = reference(geometry)
    ours = WanVAE(**arguments).requires_grad_(False)
    load_strict(ours, wan_vae_names(theirs.state_dict()), "AutoencoderKLWan")
    check_parity(theirs, ours, arguments, close)


def test_a_file_of_diffusers_loads(tmp_path, close):
    theirs, arguments = reference("Wan 2.1, narrow")
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_vae(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    check_parity(theirs, ours, arguments, close)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """Three levels, two of them in time, as few channels as show every kind of layer."""
    torch.manual_seed(0)
    geometry = {"dim": 4, "latent_channels": 3, "multipliers": (1, 2, 2), "time_down": (True, True)}
    return random_weights(WanVAE(**geometry, mean=(0.5, -1.0, 0.1), std=(2.0, 1.5, 0.7)))


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


PARTS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def whole(vae, step, x):
    """A step on a whole clip in a single pass."""
    vae.pass_frames = x.shape[1]
    return step(x)


@given(PARTS, st.integers(1, 5))
def test_any_partition_decodes_to_the_same_frames(vae, parts, pass_frames):
    latents = 4 * random(2, sum(parts), 3, 2, 3) - 2
    expected, _ = whole(vae, vae.decode, latents)
    assert expected.shape == (2, 4 * sum(parts) - 3, 3, 8, 12)
    vae.pass_frames, state, chunks = pass_frames, None, []
    for i, chunk in enumerate(latents.split(parts, dim=1)):
        frames, state = vae.decode(chunk, state)
        assert frames.shape[1] == vae.frames_of(chunk.shape[1], first=i == 0)
        chunks.append(frames)
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=0, atol=1e-5)


@given(PARTS, st.integers(1, 5))
def test_any_partition_encodes_to_the_same_latents(vae, parts, pass_frames):
    clip = random(2, 4 * sum(parts) - 3, 3, 8, 12)
    expected = whole(vae, vae.encode, clip)
    assert expected.shape == (2, sum(parts), 3, 2, 3)
    vae.pass_frames, state, chunks = pass_frames, None, []
    for chunk in clip.split([4 * n - 3 * (i == 0) for i, n in enumerate(parts)], dim=1):
        latents, state = vae.encode_chunk(chunk, state)
        chunks.append(latents)
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_chunk_is_one_call_of_each_layer(vae):
    """First chunk or later, three latent frames or one."""
    calls = Counter()
    layers = [m for m in vae.decoder.modules() if isinstance(m, CausalConv3d)]
    hooks = [layer.register_forward_hook(lambda layer, *_: calls.update([layer])) for layer in layers]
    vae.pass_frames, state = 3, None
    for chunk, frames in enumerate((3, 3, 1)):
        _, state = vae.decode(random(1, frames, 3, 2, 2), state)
        assert [calls[layer] for layer in layers] == [chunk + 1] * len(layers)
    for hook in hooks:
        hook.remove()


def test_a_state_is_a_value(vae):
    """Not changed by the chunk after it, good for a second use and as a copy, and no larger than what it holds."""
    with torch.inference_mode():
        _, state = vae.decode(random(1, 2, 3, 2, 3))
    before = copy.deepcopy(state)
    chunk = random(1, 3, 3, 2, 3)
    first, _ = vae.decode(chunk, state)
    assert all(torch.equal(a, b) for a, b in zip(state, before))
    assert all(torch.equal(first, vae.decode(chunk, s)[0]) for s in (state, before))
    assert all(tail.untyped_storage().nbytes() == tail.nbytes for tail in state)
    assert not torch.equal(first, vae.decode(chunk, vae.decode(random(1, 1, 3, 2, 3))[1])[0])


def test_full_size_has_the_names_and_shapes_of_wan_and_of_diffusers():
    with torch.device("meta"):
        ours, theirs = WanVAE(), AutoencoderKLWan()
    shapes = {name: list(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert len(shapes) == 194 and sum(p.numel() for p in ours.parameters()) == 126_892_531
    expected = {
        "encoder.conv1.weight": [96, 3, 3, 3, 3],
        "encoder.downsamples.3.shortcut.weight": [192, 96, 1, 1, 1],
        "encoder.downsamples.8.time_conv.weight": [384, 384, 3, 1, 1],
        "encoder.head.2.bias": [32],
        "conv1.weight": [32, 32, 1, 1, 1],
        "conv2.weight": [16, 16, 1, 1, 1],
        "decoder.conv1.weight": [384, 16, 3, 3, 3],
        "decoder.middle.0.residual.6.weight": [384, 384, 3, 3, 3],
        "decoder.middle.1.norm.gamma": [384, 1, 1],
        "decoder.middle.1.to_qkv.weight": [1152, 384, 1, 1],
        "decoder.upsamples.3.time_conv.weight": [768, 384, 3, 1, 1],
        "decoder.upsamples.4.shortcut.weight": [384, 192, 1, 1, 1],
        "decoder.upsamples.11.resample.1.weight": [96, 192, 3, 3],
        "decoder.head.0.gamma": [96, 1, 1, 1],
        "decoder.head.2.weight": [3, 96, 3, 3, 3],
    }
    assert expected.items() <= shapes.items()
    diffusers = {name: list(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {rename(name, VAE_KEYS): shape for name, shape in shapes.items()} == diffusers
    assert wan_vae_names(diffusers) == shapes
    assert sum(isinstance(m, CausalConv3d) for m in ours.decoder.modules()) == 32


def test_a_clip_of_21_latent_frames_has_81_frames():
    with torch.device("meta"):
        vae = WanVAE(dim=2).to("meta")
        frames, state = vae.decode(torch.empty(1, 21, 16, 2, 3))
        latents = vae.encode(torch.empty(1, 81, 3, 16, 24))
    assert frames.shape == (1, 81, 3, 16, 24) and latents.shape == (1, 21, 16, 2, 3) and len(state) == 32
    assert vae.spatial_stride == 8 and vae.temporal_stride == 4 and vae.latent_channels == 16
    assert [vae.frames_of(n, first) for n in (1, 3) for first in (True, False)] == [1, 4, 9, 12]
    assert [vae.latent_frames_of(n) for n in (1, 5, 81)] == [1, 2, 21]


def test_what_does_not_fit_is_refused(vae):
    _, state = vae.decode(torch.zeros(1, 1, 3, 2, 2))
    _, encoded = vae.encode_chunk(torch.zeros(1, 1, 3, 8, 8))
    for call, shape, message in [
        (vae.encode, (1, 1, 4, 8, 8), "third axis must be 3"),
        (vae.encode, (1, 1, 3, 10, 9), "multiples of 4; nearest is 8 x 8"),
        (vae.encode, (1, 7, 3, 8, 8), "frames = 7: a clip has 1 [+] 4 n frames; the nearest is 9"),
        (lambda x: vae.encode_chunk(x, encoded), (1, 5, 3, 8, 8), "multiple of 4; the nearest is 4"),
        (vae.decode, (1, 3, 2, 2), "third axis must be 3"),
        (vae.decode, (1, 0, 3, 2, 2), "no axis empty"),
        (lambda x: vae.decode(x, state), (1, 1, 3, 2, 3), "state holds .* where this chunk needs"),
        (lambda x: vae.decode(x, state), (2, 1, 3, 2, 2), "state holds .* where this chunk needs"),
        (lambda x: vae.decode(x, state[:4]), (1, 1, 3, 2, 2), "state holds nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
    for arguments, message in [
        ({"dim": 5}, "nearest is 4"),
        ({"time_down": (True,)}, "one less than the 4"),
        ({"latent_channels": 4}, "mean has 16 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            WanVAE(**{"dim": 2} | arguments)
    for count, near in ((0, 1), (-3, 1), (2, 1), (4, 5), (84, 85)):
        with pytest.raises(ValueError, match=f"frames = {count}: .* nearest is {near}$"):
            vae.latent_frames_of(count)
    with pytest.raises(ValueError, match="latent_frames=0"):
        vae.frames_of(0, first=True)
