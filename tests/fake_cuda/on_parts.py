"""Parts of a model on the pretend GPU, VAEs captured and offloaded, a LoRA merged: the results are a CPU's."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch

from dsa_engine import Fixed, Pipeline
from dsa_engine.engine.graphed_decoder import GraphedDecoder
from dsa_engine.models.offload import OffloadedCodec, add_offload_hooks
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from tests.support.fake_cuda.device import READ, TO_DEVICE, TO_HOST, device

MAKE = {"wan": lambda: WanVAE(dim=16), "taehv": TAEHV}


@pytest.fixture(scope="module", params=MAKE)
def codec(request):
    torch.manual_seed(0)
    return MAKE[request.param]().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(4, 1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(1))


def decoded(codec, latents) -> list[torch.Tensor]:
    """Chunk by chunk, on the CPU then."""
    state, frames = None, []
    for chunk in latents:
        pixels, state = codec.decode(chunk, state)
        frames.append(pixels.cpu())
    return frames


@pytest.fixture(scope="module")
def expected(codec, latents):
    with torch.no_grad():
        return decoded(codec, latents)


def check(frames, expected) -> None:
    for ours, theirs in zip(frames, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_captured_chunks_are_the_codecs(codec, latents, expected):
    """And a replay copies nothing between the host and the device."""
    decoder = GraphedDecoder(copy.deepcopy(codec).to("cuda"), latents.shape[1:])
    decoder.capture()
    there = latents.to("cuda")
    device.phase = f"replays {type(codec).__name__}"
    state, frames = None, []
    for chunk in there:
        pixels, state = decoder.decode(chunk, state)
        frames.append(pixels)
    assert not device.of(device.phase, READ, TO_DEVICE, TO_HOST)
    device.phase = "after"
    check([f.cpu() for f in frames], expected)


def test_an_offloaded_codec_leaves_nothing_on_the_device(codec, latents, expected):
    gc.collect()  # what earlier tests have left
    before = device.memory.now
    offloaded = OffloadedCodec(copy.deepcopy(codec), "cuda")
    there = latents.to("cuda")
    with torch.no_grad():
        frames = decoded(offloaded, there)
    check(frames, expected)
    del there
    assert device.memory.now == before


def test_frames_are_encoded_where_the_codec_is(codec):
    frames = torch.rand(1, 9, 3, 32, 48)
    with torch.no_grad():
        ours = copy.deepcopy(codec).to("cuda").encode(frames.to("cuda"))
        assert ours.is_cuda
        check([ours.cpu()], [codec.encode(frames)])


@pytest.mark.parametrize("pin", [False, True])
def test_a_module_that_is_lent_is_there_for_its_forward_only(pin, request):
    layer, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad():
        expected = layer(x)
        add_offload_hooks(layer, "cuda", pin)
        before, device.phase = device.memory.now, request.node.name
        ours = layer(x)
    weights = [e.detail for e in device.of(device.phase, TO_DEVICE) if e.detail.endswith((" 256 bytes", " 32 bytes"))]
    assert len(weights) == 2 and all(w.startswith("pinned, asynchronous" if pin else "pageable") for w in weights)
    assert ours.is_cuda and torch.equal(ours.cpu(), expected)
    assert layer.weight.device.type == "cpu" and device.memory.now == before + ours.nbytes


def test_a_checkpoint_with_a_lora(tmp_path, tiny_dit, tiny_config):
    """Merged on the way to the device."""
    weights = tiny_dit.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    torch.save({"generator": {f"model.{name}": x for name, x in weights.items()}}, tmp_path / "base.pt")
    name, pair = "blocks.1.ffn.0", {}
    rows, columns = weights[f"{name}.weight"].shape
    pair[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
    pair[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4)
    torch.save({"generator_lora": pair}, tmp_path / "lora.pt")
    noise, embeds = torch.randn(1, 6, 16, 8, 8), torch.randn(1, 4, tiny_config.text_dim)
    options = {"vae": False, "text": False, "dtype": torch.float32, "family": "self-forcing"}
    made = {}
    for device_name, lora in (("cpu", "lora.pt"), ("cuda", "lora.pt"), ("cuda", None)):
        adapter = None if lora is None else tmp_path / lora
        pipe = Pipeline.from_pretrained(tmp_path / "base.pt", lora=adapter, device=device_name, **options)
        made[device_name, lora] = pipe.generate_latents(noise, embeds, step_policy=Fixed(2)).cpu()
    check([made["cuda", "lora.pt"]], [made["cpu", "lora.pt"]])
    assert (made["cuda", None] - made["cpu", "lora.pt"]).abs().max() > 0.1
