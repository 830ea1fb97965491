"""Public checkpoints: a family's rollout, components of their folder or from elsewhere, offloaded or not."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from dsa_engine import Pipeline
from dsa_engine.checkpoints import tensor_io
from dsa_engine.checkpoints.components import apply_offload
from dsa_engine.checkpoints.load import load_components, logger
from dsa_engine.checkpoints.text import save_prompts
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.models import memory_estimate, offload
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.offload import OffloadedCodec
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from tests.support.checkpoints import WEB_PAGE, RunsCode, raises_naming, write, write_sparse
from tests.support.umt5 import save_tokenizer

SMALL = ModelConfig(dim=256, ffn_dim=64, num_heads=2, num_layers=1, text_dim=24, freq_dim=32)  # heads of 128


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A small model with every part, written by diffusers and transformers themselves."""
    torch.manual_seed(4)
    root = tmp_path_factory.mktemp("components") / "SFWan2.1-small"
    dit = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        ffn_dim=64,
        text_dim=24,
        freq_dim=32,
        num_layers=1,
        cross_attn_norm=True,
    )
    vae = AutoencoderKLWan(base_dim=8)
    text = UMT5EncoderModel(UMT5Config(vocab_size=6, d_model=24, d_kv=8, d_ff=20, num_layers=1, num_heads=2))
    for module, place in ((dit, "transformer"), (vae, "vae"), (text, "text_encoder")):
        for parameter in module.requires_grad_(False).parameters():
            parameter.normal_(std=0.1)
        module.save_pretrained(root / place)
    save_tokenizer(["a", "red", "panda"], root / "tokenizer")
    return root


def test_a_folder_brings_all_its_components(wan):
    components = load_components(wan)
    assert (components.name, components.info.family, components.rollout) == (
        "SFWan2.1-small",
        "self-forcing",
        RolloutConfig(),
    )
    assert components.dit.config == SMALL and (
        components.height,
        components.width,
        components.frames,
        components.fps,
    ) == (480, 832, 81, 16.0)
    embeds = components.text.encode(["a red panda"])
    assert embeds.shape == (1, 512, 24) and embeds[0, :4].ne(0).any(-1).all() and not embeds[0, 4:].any()
    assert components.decoder.decode(torch.randn(1, 3, 16, 4, 4))[0].shape == (1, 9, 3, 32, 32)
    with Pipeline.from_pretrained(wan, device="cpu") as pipe:
        clip = pipe("a red panda", height=32, width=32, num_frames=21, step_policy="fixed:1")
    assert clip.frames.shape == (1, 21, 32, 32, 3)


def test_a_file_takes_its_components_from_elsewhere(wan, tmp_path):
    bare = tmp_path / "longlive.safetensors"
    save_file(load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors"), bare)
    assert load_components(bare).decoder is None and load_components(bare).text is None
    for vae, text in ((wan, wan), (wan / "vae", wan / "text_encoder")):
        components = load_components(bare, vae=vae, text=text)
        assert (
            components.rollout.window == 12
            and components.text.text_dim == 24
            and components.decoder.latent_channels == 16
        )
    again = load_components(bare, vae=components.decoder, text=components.text, family="krea")
    assert (again.decoder, again.text, again.rollout.window) == (components.decoder, components.text, 6)
    save_prompts(tmp_path / "prompts.safetensors", components.text, ["a red panda"])
    known = load_components(bare, text=tmp_path / "prompts.safetensors")
    assert known.text.encode(["a red panda"]).shape == (1, 4, 24)


def test_components_can_be_left_out(wan, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape("dsa-engine[models]")):
        load_components(wan)
    components = load_components(wan, vae=False, text=False)
    assert (components.decoder, components.text) == (None, None)


def test_taehv_is_recognized_by_its_names(wan, tmp_path):
    torch.save(TAEHV().state_dict(), tmp_path / "taew2_1.pth")
    assert isinstance(load_components(wan, vae=tmp_path / "taew2_1.pth").decoder, TAEHV)


def test_components_that_do_not_fit_are_named(wan, tmp_path, untrained):
    with pytest.raises(ValueError, match="a text encoder; expected|holds a umT5|text encoder"):
        load_components(wan, vae=wan / "text_encoder")
    with pytest.raises(ValueError, match="the Wan 2.1 VAE under diffusers' names: give it as vae="):
        load_components(wan, text=wan / "vae")
    save_prompts(
        tmp_path / "wide.safetensors", type("Wide", (), {"encode": lambda s, p: torch.ones(1, 3, 40)})(), ["a"]
    )
    with pytest.raises(ValueError, match="text=.*wide.safetensors: text_dim=40, but .* needs 24"):
        load_components(wan, text=tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="latent_channels=4, but .* needs 16"):
        load_components(wan, vae=WanVAE(dim=8, latent_channels=4, mean=(0.0,) * 4, std=(1.0,) * 4))
    with pytest.raises(ValueError, match="family, vae: .* is a whole model of this project"):
        load_components(untrained, family="krea", vae=wan)
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load_components(wan, vae=tmp_path / "absent.safetensors")


def test_the_choice_of_a_rollout_is_logged(wan, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=logger.name):
        load_components(wan)
        assert caplog.records[-1].levelname == "INFO" and "rollout of self-forcing (it is called" in caplog.text
        unknown = tmp_path / "w.safetensors"
        save_file(load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors"), unknown)
        load_components(unknown)
        assert caplog.records[-1].levelname == "WARNING" and "no known family" in caplog.text
        load_components(unknown, family="wan")
        assert caplog.records[-1].levelname == "WARNING" and "a base model" in caplog.text
        load_components(unknown, family="longlive")
        assert caplog.records[-1].levelname == "WARNING" and "needs its LoRA" in caplog.text


@pytest.fixture
def checkpoint(wan, tmp_path):
    """A DiT alone, under the name of Self-Forcing's file."""
    path = tmp_path / "checkpoints" / "self_forcing_dmd.safetensors"
    path.parent.mkdir()
    save_file(load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors"), path)
    return path


def test_a_vae_can_be_asked_for_by_its_name(wan, checkpoint):
    assert isinstance(load_components(wan, vae="wan", text=False).decoder, WanVAE)
    with pytest.raises(FileNotFoundError, match="vae='taehv': no taew2_1.pth or .safetensors"):
        load_components(wan, vae="taehv", text=False)
    (checkpoint.parent / "Wan2.1-T2V-1.3B").mkdir()
    torch.save(WanVAE(dim=8).state_dict(), checkpoint.parent / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth")
    torch.save(TAEHV().state_dict(), checkpoint.parent / "taew2_1.pth")
    for name, kind in (("wan", WanVAE), ("taehv", TAEHV)):
        with Pipeline.from_pretrained(checkpoint, vae=name, device="cpu") as pipe:
            assert isinstance(pipe.engine.decoder, kind)
    assert load_components(checkpoint).decoder is None  # nothing is taken from elsewhere unasked


def test_light_tae_is_refused_for_its_name(wan, tmp_path):
    torch.save(TAEHV().state_dict(), tmp_path / "lighttaew2_1.pth")
    with pytest.raises(ValueError, match="lighttaew2_1.pth: LightTAE, whose latents have Wan's mean.*taew2_1.pth"):
        load_components(wan, vae=tmp_path / "lighttaew2_1.pth", text=False)


WAYS_IN = {
    "model": lambda path, model: load_components(path),
    "vae": lambda path, model: load_components(model, vae=path, text=False),
    "text": lambda path, model: load_components(model, text=path),
    "lora": lambda path, model: load_components(model, lora=path),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_no_checkpoint_is_refused_wherever_it_is_given(checkpoint, tmp_path, way, suffix):
    path, proof = tmp_path / f"file{suffix}", tmp_path / "code_was_run"
    path.write_text(WEB_PAGE)
    assert "a web page" in raises_naming(ValueError, path, lambda: WAYS_IN[way](path, checkpoint))
    torch.save({"model": {"a": torch.zeros(1)}, "payload": RunsCode(proof)}, path)
    said = raises_naming(ValueError, path, lambda: WAYS_IN[way](path, checkpoint))
    assert ("weights_only=True" if suffix == ".pth" else "should end in .pt") in said and not proof.exists()
    write(path, {"a": torch.zeros(999)})
    os.truncate(path, path.stat().st_size // 2)
    raises_naming(ValueError, path, lambda: WAYS_IN[way](path, checkpoint))
    path.unlink()
    raises_naming(FileNotFoundError, path, lambda: WAYS_IN[way](path, checkpoint))


@pytest.mark.parametrize("way", ["vae", "text", "lora"])
def test_a_whole_model_in_place_of_a_component_is_refused_unread(checkpoint, tmp_path, monkeypatch, way):
    """28 GB of it: a header, and a hole in the file."""
    monkeypatch.setattr(tensor_io, "_read", lambda *_: pytest.fail("a tensor was read"))
    path = tmp_path / "Wan2.1-T2V-14B.safetensors"
    write_sparse(path, ModelConfig.preset("wan2.1-t2v-14b"))
    assert "expected" in raises_naming(ValueError, path, lambda: WAYS_IN[way](path, checkpoint))


def test_offloaded_components_make_the_same_clip(wan):
    options = {"height": 32, "width": 32, "num_frames": 21, "step_policy": "fixed:1", "seed": 3}
    clips = []
    for placement in (None, ("text", "vae")):
        components = apply_offload(load_components(wan), placement)
        engine = Engine(components.dit, components.head, components.decoder, components.text, components.rollout)
        pipe = Pipeline(engine, name="x", height=32, width=32, frames=21, fps=16.0)
        clips.append(torch.from_numpy(pipe("a red panda", **options).frames))
        with pipe.session("a red panda", num_frames=21, seed=3, step_policy="fixed:1") as session:
            chunks = [session.next_chunk().frames, session.next_chunk().frames]
        assert torch.equal(torch.from_numpy(np.concatenate(chunks)), (clips[-1][0] * 255).round().to(torch.uint8))
    torch.testing.assert_close(*clips, rtol=0, atol=1e-5)
    assert isinstance(components.decoder, OffloadedCodec) and components.text.offload
    assert apply_offload(components, "text,vae").decoder is components.decoder  # it is there already


def test_what_is_not_there_or_not_movable_is_passed_over(untrained, checkpoint):
    bare = load_components(checkpoint)
    assert apply_offload(bare, "text,vae") == bare
    small = load_components(untrained)
    placed = apply_offload(small, ("text", "vae"))
    assert placed.text is small.text and placed.decoder.codec is small.decoder
    with pytest.raises(ValueError, match="offload=dit: must be 'auto'"):
        apply_offload(small, "dit")


def test_auto_fits_the_model_into_what_the_device_has(wan, monkeypatch, caplog):
    components = load_components(wan)
    assert (
        apply_offload(components, "auto") is components and apply_offload(components, None) is components
    )  # a CPU has nothing to spare
    there, on_device = memory_estimate.measure(components.modules), 1000
    there["weights"]["vae"] = {"cpu": 7, "cuda": on_device}
    monkeypatch.setattr(CausalDiT, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(memory_estimate, "measure", lambda components: there)
    monkeypatch.setattr(offload, "DeviceSwap", lambda *args, **options: None)
    workload, sizes = (
        memory_estimate.Workload(sessions=2, dtype=torch.float32),
        memory_estimate.footprints(components.modules),
    )
    rollout = RolloutConfig(window=12)
    peaks = [
        memory_estimate.predict(SMALL, rollout, workload, offload=name, **sizes).peak
        for name in memory_estimate.PLACEMENTS
    ]
    assert peaks[0] > peaks[1] > peaks[2]
    for short, expected in ((0, (False, False)), (1, (True, False)), (1 + peaks[0] - peaks[1], (True, True))):
        components = replace(components, text=copy.copy(components.text))
        monkeypatch.setattr(
            memory_estimate,
            "free_bytes",
            lambda d, short=short: peaks[0] - memory_estimate.CUDA_CONTEXT_BYTES - on_device - short,
        )
        with caplog.at_level(logging.INFO, logger=memory_estimate.__name__):
            placed = apply_offload(components, "auto", rollout, sessions=2)
        assert (placed.text.offload, isinstance(placed.decoder, OffloadedCodec)) == expected
        assert caplog.records[-1].levelname == "INFO" and caplog.records[-1].message.startswith("offload ")
