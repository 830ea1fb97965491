"""OffloadedCodec parts give what they give on the device; the meta device stands for one that is far away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsa_engine.models import memory_estimate
from dsa_engine.models.offload import DeviceSwap, OffloadedCodec, add_offload_hooks
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.shapes.codec import PixelCodec
from tests.support.live_memory import Live


class Codec(nn.Module):
    """Notes where its weights are when it is called, and fails on demand."""

    spatial_stride = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = self.layer
        self.register_buffer("mean", torch.ones(3), persistent=False)
        self.seen = []

    def note(self, x, state=None):
        self.seen.append([str(t.device) for t in (self.layer.weight, self.tied.bias, self.mean, x)])
        if state == "fail":
            raise RuntimeError("no memory")
        return self.layer(x) + self.mean, state

    def decode(self, latents, state=None):
        return self.note(latents, state)

    def encode(self, frames):
        return self.note(frames)[0]

    def forward(self, x, *rest, scale=None):
        return self.note(x, *rest)[0] * (1 if scale is None else scale)


def test_weights_are_on_the_device_for_a_call_and_at_home_after_it():
    codec = Codec()
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    away = OffloadedCodec(codec, "meta")
    home = [codec.layer.weight, codec.layer.bias, codec.mean]
    for call in (away.decode, away.encode):
        call(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="no memory"):
        away.decode(torch.zeros(2, 3), "fail")
    assert codec.seen == [["meta"] * 4] * 3
    assert all(a is b for a, b in zip(home, [codec.layer.weight, codec.layer.bias, codec.mean]))
    assert codec.tied.weight is codec.layer.weight and not codec.layer.weight.requires_grad
    assert all(codec.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert away.spatial_stride == 4 and sum(p.numel() for p in away.parameters()) == 12
    with pytest.raises(AttributeError, match="nothing"):
        away.nothing  # noqa: B018


def test_what_is_shared_is_moved_once():
    codec, moves = Codec(), []
    swap = DeviceSwap(codec, "meta")
    with Live() as live, swap:
        moves.append(codec.tied.weight is codec.layer.weight)
        assert live.now == (9 + 3 + 3) * 4
    assert moves == [True] and codec.layer.weight.device.type == "cpu"


def test_a_lent_module_takes_its_arguments_along():
    codec = Codec()
    add_offload_hooks(codec, "meta")
    out = codec(torch.zeros(2, 3), None, scale=torch.ones(3))
    assert out.is_meta and codec.seen == [["meta"] * 4] and codec.layer.weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="no memory"):
        codec(torch.zeros(2, 3), "fail")
    assert codec.layer.weight.device.type == codec.mean.device.type == "cpu"


def test_a_loan_under_inference_mode_leaves_usable_weights():
    codec = Codec()
    away = OffloadedCodec(codec, "cpu")
    with torch.inference_mode():
        away.decode(torch.zeros(2, 3))
    assert not codec.layer.weight.is_inference()
    codec(torch.ones(2, 3, requires_grad=True)).sum().backward()


def random_weights(vae):
    for parameter in vae.requires_grad_(False).eval().parameters():
        parameter.normal_(std=0.15)
    return vae


VAES = {
    "wan": lambda: WanVAE(
        dim=4,
        latent_channels=3,
        multipliers=(1, 2, 2),
        time_down=(True, True),
        mean=(0.5, -1.0, 0.1),
        std=(2.0, 1.5, 0.7),
    ),
    "taehv": lambda: TAEHV(widths=(8, 6, 5, 4), latent_channels=3),
    "pixels": PixelCodec,
}


@pytest.mark.parametrize("name", VAES)
def test_an_offloaded_decoder_gives_the_same_frames(name, close):
    codec = random_weights(VAES[name]())
    away = OffloadedCodec(copy.deepcopy(codec), "cpu")
    latents = torch.randn(2, 7, codec.latent_channels, 3, 2)
    state = kept = None
    expected_state = None
    for part in latents.split((3, 3, 1), dim=1):
        kept = state
        expected, expected_state = codec.decode(part, expected_state)
        frames, state = away.decode(part, kept)
        close(frames, expected, 1e-5)
        assert away.decode(part, kept)[0].equal(frames)  # the state given is as it was
        if name == "pixels":
            continue
        assert all(tensor.device.type == "cpu" for tensor in state) and len(state) == len(expected_state)
        for ours, theirs in zip(copy.deepcopy(state), expected_state):
            close(ours, theirs, 1e-5)
    clip = torch.rand(1, 9, 3, 16, 16)
    assert away.encode(clip).equal(codec.encode(clip))
    assert away.frames_of(3, True) == codec.frames_of(3, True) and away.latent_channels == codec.latent_channels
    with pytest.raises(ValueError, match="latents of shape"):
        away.decode(latents[:, :, :2])
    with pytest.raises(ValueError, match="state holds|latents of shape"):
        away.decode(latents[:1], state) if name != "pixels" else away.decode(latents[0], state)


def test_the_wrapper_is_seen_through():
    away = OffloadedCodec(TAEHV(widths=(8, 6, 5, 4)), "cpu")
    assert (
        memory_estimate.vae_footprint(away) == memory_estimate.vae_footprint(away.codec)
        and memory_estimate.vae_footprint(away).name == "TAEHV"
    )
    assert memory_estimate.module_bytes(away) == memory_estimate.module_bytes(away.codec)
