"""Files that are near what is run: Wan 2.2's, image models, all-in-one files, and broken ones: told in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.checkpoints.load import load_components
from dsa_engine.checkpoints.tensor_io import open_checkpoint
from dsa_engine.checkpoints.vae import load_vae
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.wan_vae import WanVAE

SMALL = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, freq_dim=32)


@pytest.fixture
def weights():
    return CausalDiT(SMALL).state_dict()


def refused(path, *words):
    for call in (load_dit, load_components):
        with pytest.raises(ValueError) as error:
            call(path)
        assert [word for word in words if word not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    "pair, name",
    [
        (("transformer", "transformer_2"), "diffusion_pytorch_model.safetensors"),
        (("high_noise_model", "low_noise_model"), "diffusion_pytorch_model.safetensors"),
    ],
)
def test_two_dits_are_not_half_loaded(tmp_path, weights, pair, name):
    for part in pair:
        (tmp_path / part).mkdir()
        save_file(weights, tmp_path / part / name)
    for path in (tmp_path, tmp_path / pair[0], tmp_path / pair[1] / name):
        assert inspect(path).kind == key_maps.WAN22_PAIR
        refused(
            path, "a Wan 2.2 model of two DiTs", f"{pair[0]} and {pair[1]}", "run are text-to-video models of one DiT"
        )


def test_a_file_called_one_of_two_is_told(tmp_path, weights):
    save_file(weights, tmp_path / "wan2.2_t2v_high_noise_14B.safetensors")
    assert "one of the two DiTs of a Wan 2.2 model" in inspect(tmp_path / "wan2.2_t2v_high_noise_14B.safetensors").note


@pytest.mark.parametrize(
    "inputs, outputs, kind, words",
    [
        (36, 16, key_maps.IMAGE_DIT, "36 channels in and 16 out"),
        (32, 16, key_maps.IMAGE_DIT, "32 channels in and 16 out"),
        (48, 48, key_maps.WAN22_DIT, "48 channels in and out"),
    ],
)
@pytest.mark.parametrize("config", [False, True])
def test_other_channels_are_told_and_refused(tmp_path, inputs, outputs, kind, words, config):
    sizes = replace(SMALL, in_dim=inputs, out_dim=outputs)
    save_file(CausalDiT(sizes).state_dict(), tmp_path / "w.safetensors")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(sizes.to_dict()))
    info = inspect(tmp_path / "w.safetensors")
    assert info.kind == kind and words in info.note
    refused(tmp_path / "w.safetensors", kind, words, "text-to-video models")


@pytest.mark.parametrize(
    "name", ["decoder.upsamples.0.upsamples.0.residual.0.gamma", "encoder.down_blocks.0.resnets.0.norm1.gamma"]
)
def test_wan22s_vae_is_told(tmp_path, name):
    save_file(
        {name: torch.zeros(4), "decoder.up_blocks.0.resnets.0.norm1.gamma": torch.zeros(4)}, tmp_path / "v.safetensors"
    )
    assert inspect(tmp_path / "v.safetensors").kind == key_maps.WAN22_VAE
    with pytest.raises(ValueError, match="holds the Wan 2.2 VAE of 48 latent channels: only Wan 2.1's"):
        load_vae(tmp_path / "v.safetensors")


def test_the_part_that_is_asked_for_is_taken_from_an_all_in_one_file(tmp_path, weights):
    vae = WanVAE(dim=8).state_dict()
    stored = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    stored |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    stored |= {"text_encoders.umt5xxl.transformer.shared.weight": torch.zeros(8, 4)}
    path = tmp_path / "all_in_one.safetensors"
    save_file(stored, path)
    loaded = load_dit(path).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[n], t) for n, t in weights.items())
    loaded = load_vae(path).state_dict()
    assert loaded.keys() == vae.keys() and all(torch.equal(loaded[n], t) for n, t in vae.items())
    info = inspect(path)
    assert (info.kind, info.tensors, info.config) == (key_maps.DIT, len(weights), SMALL)
    assert f"a file with {len(vae) + 1} tensors of other parts" in info.note


def said_of(path) -> str:
    with pytest.raises(ValueError) as error:
        open_checkpoint(path)
    text = str(error.value)
    assert str(path) in text and text.isprintable() and len(text) < 400, text
    return text


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_cut_off_archive_is_told_as_cut_off(tmp_path, weights, kept):
    torch.save(weights, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: int(kept * len(data))])
    assert "it is cut off or damaged; copy or download it again" in said_of(tmp_path / "w.pt")


def test_a_pickle_with_numpy_values_names_what_it_needs(tmp_path, weights):
    torch.save({**weights, "loss": np.float64(1)}, tmp_path / "w.pt")
    text = said_of(tmp_path / "w.pt")
    assert "it needs numpy." in text and "save its tensors alone" in text and "download" not in text


@pytest.mark.parametrize("code, size", [("F4", 1), ("F8_E8M0", 2), ("F12_NEW", 3)])
def test_a_dtype_that_is_not_read_is_named(tmp_path, code, size):
    header = json.dumps({"blocks.0.w": {"dtype": code, "shape": [2], "data_offsets": [0, size]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    text = said_of(tmp_path / "w.safetensors")
    assert f"blocks.0.w is of dtype {code}; known are F64" in text and "download" not in text
