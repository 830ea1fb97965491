"""`inspect` tells what a file is: kind, dialect, family, sizes and amounts, without reading the weights."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import find_vae, inspect
from dsa_engine.checkpoints.vae_names import to_diffusers
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE

SMALL = ModelConfig(dim=256, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=32)  # heads of 128


@pytest.fixture
def weights():
    return CausalDiT(SMALL).state_dict()


def parameters(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def hole(path, tensors, start="") -> None:
    """A bfloat16 file of these shapes whose data is a hole: as long as the real one, and there at once."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[start + name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("preset, total", [("wan2.1-t2v-1.3b", 1_418_996_800), ("wan2.1-t2v-14b", 14_288_491_584)])
def test_a_published_size_is_told_at_once(tmp_path, preset, total):
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        tensors = CausalDiT(config).state_dict()
    path = tmp_path / "krea-realtime-video.safetensors"
    hole(path, tensors, start="model.")
    start = time.perf_counter()
    found = inspect(path)
    assert time.perf_counter() - start < 5
    assert (found.kind, found.dialect, found.config, found.config_by) == (key_maps.DIT, "wan", config, "the tensors")
    assert (found.tensors, found.parameters) == (len(tensors), total)
    assert found.dtypes == {"bfloat16": total} and found.bytes == path.stat().st_size > 2 * total
    assert (found.family, found.rollout) == ("krea", key_maps.FAMILIES["krea"].rollout)
    assert "krea-realtime-video" in found.family_by and found.note


def test_a_training_save(tmp_path, weights):
    path = tmp_path / "self_forcing_dmd.pt"
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator": wrapped, "generator_ema": wrapped, "critic": weights, "step": 3}, path)
    found = inspect(path)
    assert (found.key, found.family, found.rollout) == ("generator_ema", "self-forcing", RolloutConfig())
    assert (found.tensors, found.parameters) == (len(weights), parameters(weights))
    assert inspect(path, family="longlive").key == "generator"
    assert inspect(path, family="longlive").family_by == "as asked for"


def test_nothing_tells_the_family(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    found = inspect(tmp_path / "w.safetensors")
    assert (found.family, found.rollout) == (None, RolloutConfig()) and "give family=" in found.note
    with pytest.raises(ValueError, match="family='sf': must be one of self-forcing"):
        inspect(tmp_path / "w.safetensors", family="sf")


def causal_config(**more) -> dict:
    return {
        "_class_name": "CausalWanTransformer3DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "ffn_dim": 64,
        "num_layers": 1,
        "text_dim": 16,
        "freq_dim": 32,
        **more,
    }


def test_a_fastvideo_folder_with_all_its_parts(tmp_path, weights, caplog):
    folder = tmp_path / "models--someone--SFWan"
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
    in_fastvideos = {key_maps.to_dialect(name, key_maps.FASTVIDEO): tensor for name, tensor in weights.items()}
    save_file(in_fastvideos, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = causal_config(local_attn_size=-1, sink_size=0, num_frame_per_block=3)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanDMDPipeline"}))
    found = inspect(folder)
    assert (found.dialect, found.family, found.config, found.config_by) == (
        "fastvideo",
        "self-forcing",
        SMALL,
        "config.json",
    )
    assert found.rollout == RolloutConfig() and "CausalWanTransformer3DModel" in found.family_by
    assert found.parts == {"vae": folder / "vae", "text": folder / "text_encoder", "tokenizer": folder / "tokenizer"}
    assert not caplog.records  # every key of the config was understood


def test_a_configs_own_window_and_sink_are_taken(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(causal_config(local_attn_size=12, sink_size=3)))
    rollout = inspect(tmp_path / "w.safetensors").rollout
    assert (rollout.window, rollout.sink, rollout.shift) == (12, 3, 5.0)
    asked = inspect(tmp_path / "w.safetensors", family="krea").rollout
    assert asked == key_maps.FAMILIES["krea"].rollout
    (tmp_path / "config.json").write_text(json.dumps(causal_config(local_attn_size=2, sink_size=0)))
    with pytest.raises(ValueError, match="config.json: window=2: must hold the sink"):
        inspect(tmp_path / "w.safetensors")


def test_wans_own_folder(tmp_path, weights):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (folder / name).write_bytes(b"")
    found = inspect(folder)
    assert (found.family, found.weights.name) == ("wan", "diffusion_pytorch_model.safetensors")
    assert "base model" in found.note
    assert {part: path.name for part, path in found.parts.items()} == {
        "vae": "Wan2.1_VAE.pth",
        "text": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "umt5-xxl",
    }


def test_sizes_that_cannot_be_told_are_no_error_here(tmp_path, tiny_dit):
    save_file(tiny_dit.state_dict(), tmp_path / "w.safetensors")
    found = inspect(tmp_path / "w.safetensors")
    assert found.config is None and "no multiple of 128" in found.config_by


def test_fp8_with_scales(tmp_path, weights):
    low = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    scales = {f"{name}_scale": torch.ones(len(low[name]), 1) for name in low if low[name].ndim == 2}
    save_file({**low, **scales, "scaled_fp8": torch.zeros(2)}, tmp_path / "w.safetensors")
    found = inspect(tmp_path / "w.safetensors")
    assert (found.quantised, found.parameters) == (len(scales), parameters(weights))
    held = sum(tensor.numel() for tensor in low.values() if tensor.ndim == 2)
    assert next(iter(found.dtypes.items())) == ("float8_e4m3fn", held) and found.config == SMALL


def test_an_adapter(tmp_path):
    pairs = {}
    for linear in ("self_attn.q", "ffn.0"):
        name = f"base_model.model.blocks.0.{linear}"
        pairs |= {f"{name}.lora_A.weight": torch.zeros(8, 16), f"{name}.lora_B.weight": torch.zeros(16, 8)}
    torch.save({"generator_lora": pairs}, tmp_path / "lora.pt")
    found = inspect(tmp_path / "lora.pt")
    assert (found.kind, found.key, found.dialect) == (key_maps.LORA, "generator_lora", "wan")
    assert found.lora == {"ranks": [8], "modules": 2, "alpha": None} and found.rollout is None


def test_a_model_of_this_project_and_its_parts(untrained, tmp_path):
    found = inspect(untrained)
    assert found.kind == key_maps.ENGINE and (found.rollout.window, found.config.dim) == (9, 64)
    assert found.config_by == "config.json" and found.family is None
    torch.save(WanVAE(dim=8).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    found = inspect(tmp_path / "Wan2.1_VAE.pth")
    assert (found.kind, found.config, found.rollout, found.tensors) == (key_maps.vae_names.WAN, None, None, 194)


def test_what_was_found_is_plain_values_for_json(tmp_path, weights):
    save_file(weights, tmp_path / "longlive_base.safetensors")
    values = json.loads(json.dumps(inspect(tmp_path / "longlive_base.safetensors").to_dict()))
    assert values["family"] == "longlive" and values["rollout"]["window"] == 12 and values["config"]["dim"] == 256
    assert values["path"] == values["weights"] == str(tmp_path / "longlive_base.safetensors")


# ---- a VAE that is asked for by its name


@pytest.fixture
def near(tmp_path, weights):
    """models/mine/w.safetensors, for VAEs to be put near it."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    save_file(weights, tmp_path / "models" / "mine" / "w.safetensors")
    return tmp_path / "models" / "mine"


WAN_FILES = WanVAE(dim=2).state_dict()
NAMED = {"wan": (WAN_FILES, to_diffusers(WAN_FILES)), "taehv": (TAEHV(widths=(4, 4, 4, 4)).state_dict(),)}


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


def test_the_nearest_vae_is_taken_and_told_by_its_tensors(near):
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
