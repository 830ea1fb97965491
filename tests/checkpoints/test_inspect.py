"""`inspect` infers what a file is: kind, dialect, family, sizes and amounts, without reading the weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints import key_maps, tensor_io
from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.wan_vae import WanVAE
from tests.support.checkpoints import write_sparse

SMALL = ModelConfig(dim=256, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, freq_dim=32)  # heads of 128


@pytest.fixture
def weights():
    return CausalDiT(SMALL).state_dict()


def parameters(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("preset, total", [("wan2.1-t2v-1.3b", 1_418_996_800), ("wan2.1-t2v-14b", 14_288_491_584)])
def test_a_published_size_is_read_from_the_header(tmp_path, monkeypatch, preset, total):
    monkeypatch.setattr(tensor_io, "_read", lambda *_: pytest.fail("a tensor was read"))
    config = ModelConfig.preset(preset)
    path = tmp_path / "krea-realtime-video.safetensors"
    tensors = write_sparse(path, config, prefix="model.")
    info = inspect(path)
    assert (info.kind, info.dialect, info.config, info.config_source) == (
        key_maps.DIT,
        "wan",
        config,
        "the tensors",
    )
    assert (info.tensors, info.parameters) == (len(tensors), total)
    assert info.dtypes == {"bfloat16": total} and info.bytes == path.stat().st_size > 2 * total
    assert (info.family, info.rollout) == ("krea", FAMILIES["krea"].rollout)
    assert "krea-realtime-video" in info.family_source and info.note


def test_a_training_save(tmp_path, weights):
    path = tmp_path / "self_forcing_dmd.pt"
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator": wrapped, "generator_ema": wrapped, "critic": weights, "step": 3}, path)
    info = inspect(path)
    assert (info.key, info.family, info.rollout) == ("generator_ema", "self-forcing", RolloutConfig())
    assert (info.tensors, info.parameters) == (len(weights), parameters(weights))
    assert inspect(path, family="longlive").key == "generator"
    assert inspect(path, family="longlive").family_source == "as asked for"


def test_an_unknown_family(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    info = inspect(tmp_path / "w.safetensors")
    assert (info.family, info.rollout) == (None, RolloutConfig()) and "give family=" in info.note
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
    in_fastvideos = {key_maps.rename(name, key_maps.FASTVIDEO_KEYS): tensor for name, tensor in weights.items()}
    save_file(in_fastvideos, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = causal_config(local_attn_size=-1, sink_size=0, num_frame_per_block=3)
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanDMDPipeline"}))
    info = inspect(folder)
    assert (info.dialect, info.family, info.config, info.config_source) == (
        "fastvideo",
        "self-forcing",
        SMALL,
        "config.json",
    )
    assert info.rollout == RolloutConfig() and "CausalWanTransformer3DModel" in info.family_source
    assert info.components == {
        "vae": folder / "vae",
        "text": folder / "text_encoder",
        "tokenizer": folder / "tokenizer",
    }
    assert not caplog.records  # every key of the config was understood


def test_a_configs_own_window_and_sink_are_taken(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(causal_config(local_attn_size=12, sink_size=3)))
    rollout = inspect(tmp_path / "w.safetensors").rollout
    assert (rollout.window, rollout.sink, rollout.shift) == (12, 3, 5.0)
    asked = inspect(tmp_path / "w.safetensors", family="krea").rollout
    assert asked == FAMILIES["krea"].rollout
    (tmp_path / "config.json").write_text(json.dumps(causal_config(local_attn_size=2, sink_size=0)))
    with pytest.raises(ValueError, match="config.json: window=2: must hold the sink"):
        inspect(tmp_path / "w.safetensors")


def test_wans_own_folder(tmp_path, weights):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (folder / name).write_bytes(b"")
    info = inspect(folder)
    assert (info.family, info.weights.name) == ("wan", "diffusion_pytorch_model.safetensors")
    assert "base model" in info.note
    assert {part: path.name for part, path in info.components.items()} == {
        "vae": "Wan2.1_VAE.pth",
        "text": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "umt5-xxl",
    }


def test_sizes_that_cannot_be_inferred_are_no_error_here(tmp_path, tiny_dit):
    save_file(tiny_dit.state_dict(), tmp_path / "w.safetensors")
    info = inspect(tmp_path / "w.safetensors")
    assert info.config is None and "no multiple of 128" in info.config_source


def test_fp8_with_scales(tmp_path, weights):
    low = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    scales = {f"{name}_scale": torch.ones(len(low[name]), 1) for name in low if low[name].ndim == 2}
    save_file({**low, **scales, "scaled_fp8": torch.zeros(2)}, tmp_path / "w.safetensors")
    info = inspect(tmp_path / "w.safetensors")
    assert (info.quantized, info.parameters) == (len(scales), parameters(weights))
    held = sum(tensor.numel() for tensor in low.values() if tensor.ndim == 2)
    assert next(iter(info.dtypes.items())) == ("float8_e4m3fn", held) and info.config == SMALL


def test_an_adapter(tmp_path):
    pairs = {}
    for linear in ("self_attn.q", "ffn.0"):
        name = f"base_model.model.blocks.0.{linear}"
        pairs |= {f"{name}.lora_A.weight": torch.zeros(8, 16), f"{name}.lora_B.weight": torch.zeros(16, 8)}
    torch.save({"generator_lora": pairs}, tmp_path / "lora.pt")
    info = inspect(tmp_path / "lora.pt")
    assert (info.kind, info.key, info.dialect) == (key_maps.LORA, "generator_lora", "wan")
    assert info.lora == {
        "ranks": [8],
        "modules": 2,
        "added": 0,
        "alpha": None,
        "scales": [1.0],
        "scale_source": "nothing gives an alpha, so it is r",
    }
    assert info.rollout is None


def test_a_model_of_this_project_and_its_parts(untrained, tmp_path):
    info = inspect(untrained)
    assert info.kind == key_maps.ENGINE and (info.rollout.window, info.config.dim) == (9, 64)
    assert info.config_source == "config.json" and info.family is None
    torch.save(WanVAE(dim=8).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    info = inspect(tmp_path / "Wan2.1_VAE.pth")
    assert (info.kind, info.config, info.rollout, info.tensors) == (key_maps.WAN_VAE, None, None, 194)


def test_what_was_found_is_plain_values_for_json(tmp_path, weights):
    save_file(weights, tmp_path / "longlive_base.safetensors")
    values = json.loads(json.dumps(inspect(tmp_path / "longlive_base.safetensors").to_dict()))
    assert values["family"] == "longlive" and values["rollout"]["window"] == 12 and values["config"]["dim"] == 256
    assert values["path"] == values["weights"] == str(tmp_path / "longlive_base.safetensors")
