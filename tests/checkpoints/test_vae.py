"""Video VAEs from files: recognized by their names, refused by name, and found near a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.key_maps import VAE_KEYS, rename, wan_vae_names
from dsa_engine.checkpoints.vae import find_vae, load_vae
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE

SMALL = ModelConfig(dim=256, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=32)


def randomized(model):
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_wan_loads(suffix, tmp_path):
    weights = randomized(WanVAE(dim=4)).state_dict()
    path = tmp_path / f"Wan2.1_VAE{suffix}"
    (torch.save if suffix == ".pth" else save_file)(weights, path)
    loaded = load_vae(path)
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    half = load_vae(path, dtype=torch.bfloat16)
    latents = torch.randn(1, 3, 16, 2, 2)
    (frames, _), (expected, _) = half.decode(latents), loaded.decode(latents)
    assert frames.dtype == torch.bfloat16
    torch.testing.assert_close(frames.float(), expected, rtol=0, atol=0.05)


def test_a_file_loads_and_keeps_the_last_frames_of_a_wider_growth(tmp_path):
    vae = TAEHV()
    weights = vae.state_dict()
    for at in (7, 13, 19):
        name = f"decoder.{at}.conv.weight"
        weights[name] = torch.cat((torch.randn_like(weights[name]), weights[name]))
    torch.save(weights, tmp_path / "taew2_1.pth")
    loaded = load_vae(tmp_path / "taew2_1.pth")
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in vae.named_parameters())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    save_file({k: v for k, v in weights.items() if k != "decoder.7.conv.weight"}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="1 missing: decoder.7.conv.weight"):
        load_vae(tmp_path / "x.safetensors")


def test_a_file_of_another_model_is_named(tmp_path, tiny_dit):
    path = tmp_path / "x.safetensors"
    one = torch.zeros(1)
    for weights, held in [
        (tiny_dit.state_dict(), "holds a DiT; expected the Wan 2.1 VAE or"),
        ({f"model.{k}": v for k, v in tiny_dit.state_dict().items()}, "holds a DiT"),
        ({"shared.weight": one}, "holds a umT5 text encoder: give it as text=; expected"),
        ({"a": one}, "holds no model that is known here (its first names: a); expected"),
    ]:
        save_file(weights, path)
        with pytest.raises(ValueError, match=re.escape(held)) as error:
            load_vae(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(suffix, tmp_path):
    path = tmp_path / f"vae{suffix}"
    (torch.save if suffix == ".pth" else save_file)(WanVAE(dim=2).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_vae(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_vae(tmp_path / "none.pth")


def test_missing_misshapen_and_doubled_tensors_are_named(tmp_path):
    path = tmp_path / "vae.safetensors"
    weights = WanVAE(dim=2).state_dict()
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith("encoder.conv1")}, path)
    with pytest.raises(ValueError, match="2 missing: encoder.conv1.bias, encoder.conv1.weight"):
        load_vae(path)
    save_file(weights | {"conv2.bias": torch.zeros(48)}, path)
    with pytest.raises(ValueError, match=re.escape("conv2.bias [48] instead of [16]")):
        load_vae(path)
    with pytest.raises(ValueError, match="both called 'conv1.bias'"):
        wan_vae_names(weights | {"quant_conv.bias": torch.zeros(32)})


# ---- a VAE that is asked for by its name


@pytest.fixture
def near(tmp_path):
    """models/mine/w.safetensors, for VAEs to be put near it."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    save_file(CausalDiT(SMALL).state_dict(), tmp_path / "models" / "mine" / "w.safetensors")
    return tmp_path / "models" / "mine"


WAN_FILES = WanVAE(dim=2).state_dict()
NAMED = {
    "wan": (WAN_FILES, {rename(name, VAE_KEYS): tensor for name, tensor in WAN_FILES.items()}),
    "taehv": (TAEHV(widths=(4, 4, 4, 4)).state_dict(),),
}


@pytest.mark.parametrize(
    "kind, place, content",
    [
        ("wan", "mine/Wan2.1_VAE.pth", 0),
        ("wan", "mine/vae/diffusion_pytorch_model.safetensors", 1),
        ("wan", "Wan2.1_VAE.safetensors", 0),
        ("wan", "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", 0),
        ("wan", "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", 0),
        ("wan", "mine/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", 0),
        ("wan", "vae/wan_2.1_vae.safetensors", 0),
        ("wan", "SFWan/vae/diffusion_pytorch_model.safetensors", 1),
        ("taehv", "mine/taew2_1.pth", 0),
        ("taehv", "mine/vae/taew2_1.safetensors", 0),
        ("taehv", "other/taew2_1.pth", 0),
    ],
)
def test_a_vae_is_found_near_the_model(near, kind, place, content):
    path = near.parent / place
    path.parent.mkdir(parents=True, exist_ok=True)
    (torch.save if path.suffix == ".pth" else save_file)(NAMED[kind][content], path)
    (near / "transformer").mkdir()
    for model in (near, near / "w.safetensors", near / "transformer" / "diffusion_pytorch_model.safetensors"):
        assert find_vae(model, kind) == path
    other = "wan" if kind == "taehv" else "taehv"
    with pytest.raises(FileNotFoundError, match=f"vae='{other}': no "):
        find_vae(near, other)


def test_the_nearest_vae_is_taken_and_checked_by_its_tensors(near):
    """A tiny VAE under Wan's name is none; the next candidate is."""
    torch.save(NAMED["taehv"][0], near / "Wan2.1_VAE.pth")
    torch.save(NAMED["wan"][0], near.parent / "Wan2.1_VAE.pth")
    assert find_vae(near, "wan") == near.parent / "Wan2.1_VAE.pth"
    (near.parent / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(FileNotFoundError) as error:
        find_vae(near / "w.safetensors", "wan")
    said = str(error.value)
    assert "no Wan2.1_VAE.pth or .safetensors, nor a folder vae with the Wan 2.1 VAE" in said
    assert f"{near / 'Wan2.1_VAE.pth'} holds a tiny VAE (TAEHV)" in said and str(near.parent) in said


def test_a_candidate_that_is_broken_is_named(near):
    (near / "taew2_1.pth").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(ValueError, match=f"{re.escape(str(near / 'taew2_1.pth'))}: a web page"):
        find_vae(near, "taehv")


def test_a_folder_of_several_vaes_is_searched_by_their_names(near, monkeypatch):
    (near.parent / "vae").mkdir()
    torch.save(NAMED["taehv"][0], near.parent / "vae" / "taew2_1.pth")
    torch.save(NAMED["wan"][0], near.parent / "vae" / "Wan2.1_VAE.pth")
    monkeypatch.chdir(near)
    assert find_vae(Path("w.safetensors"), "wan") == near.parent / "vae" / "Wan2.1_VAE.pth"
    assert find_vae(Path("."), "taehv") == near.parent / "vae" / "taew2_1.pth"
