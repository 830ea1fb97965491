"""What is converted computes the same: in diffusers' own class, and loaded again from this project's format."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsa_engine import Pipeline
from dsa_engine.checkpoints.convert import convert, save_diffusers
from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.checkpoints.load import load_components
from dsa_engine.checkpoints.lora import open_lora
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from tests.support.checkpoints import velocity

CONFIG = ModelConfig(dim=256, ffn_dim=96, num_heads=2, num_layers=2, text_dim=24, freq_dim=32)


@pytest.fixture
def weights():
    model = CausalDiT(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return model.state_dict()


@pytest.fixture
def source(tmp_path, weights):
    torch.save({"generator": {f"model.{k}": v for k, v in weights.items()}}, tmp_path / "longlive_base.pt")
    return tmp_path / "longlive_base.pt"


def test_diffusers_reads_what_is_written_and_computes_the_same(source, tmp_path, close):
    found = convert(source, tmp_path / "out", to="diffusers")
    assert (found.family, found.dialect, found.path) == ("longlive", "wan", source)
    written = tmp_path / "out" / "transformer"  # its from_pretrained needs accelerate; this is what it does
    config, ignored = WanTransformer3DModel.load_config(written), {"_class_name"}
    assert config.keys() - ignored <= dict(WanTransformer3DModel.from_config(config).config).keys()
    theirs = WanTransformer3DModel.from_config(config)
    theirs.load_state_dict(load_file(written / "diffusion_pytorch_model.safetensors"))
    x, t, text = torch.randn(1, 3, 16, 4, 6), torch.tensor([625.0]), torch.randn(1, 512, 24)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    close(velocity(load_dit(source), x, t, text), expected, 1e-4)
    assert load_dit(tmp_path / "out").config == CONFIG


def test_this_projects_folder_keeps_the_familys_rollout(source, tmp_path, weights):
    convert(source, tmp_path / "out")
    parts = load_components(tmp_path / "out")
    assert parts.rollout == FAMILIES["longlive"].rollout and parts.name == "longlive_base"
    assert (parts.height, parts.width, parts.frames, parts.fps) == (480, 832, 81, 16.0)
    assert all(tensor.equal(weights[name]) for name, tensor in parts.dit.state_dict().items())
    pipe = Pipeline.from_pretrained(tmp_path / "out", device="cpu")
    noise, embeds = torch.randn(1, 6, 16, 4, 4), torch.randn(1, 9, 24)
    own = Pipeline.from_pretrained(source, device="cpu")
    assert pipe.generate_latents(noise, embeds).equal(own.generate_latents(noise, embeds))


@pytest.mark.parametrize("to", ["engine", "diffusers"])
def test_an_adapter_is_merged_once(source, tmp_path, weights, to, close):
    name = "blocks.1.ffn.0"
    a, b = torch.randn(4, 256), torch.randn(96, 4)
    lora = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, lora)
    convert(source, tmp_path / "out", to, lora=open_lora(lora, alpha=2))
    dit = load_components(tmp_path / "out").dit if to == "engine" else load_dit(tmp_path / "out")
    close(dit.blocks[1].ffn[0].weight, weights[f"{name}.weight"] + 0.5 * b @ a, 1e-6)
    assert dit.blocks[0].ffn[0].weight.equal(weights["blocks.0.ffn.0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_sources_or_the_one_asked_for(tmp_path, weights, dtype):
    save_file({k: v.to(dtype) for k, v in weights.items()}, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "own")
    assert {v.dtype for v in load_file(tmp_path / "own" / "model.safetensors").values()} == {dtype}
    convert(tmp_path / "w.safetensors", tmp_path / "low", to="diffusers", dtype=torch.bfloat16)
    written = tmp_path / "low" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {v.dtype for v in load_file(written).values()} == {torch.bfloat16}
    with safe_open(written, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers and diffusers look for it


def test_fp8_becomes_bfloat16(tmp_path, weights):
    low = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in weights.items()}
    save_file(low, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {v.dtype for v in held.values()} == {torch.bfloat16}
    assert held["generator.head.head.weight"].float().equal(low["head.head.weight"].float())


def test_a_text_length_of_its_own_is_kept(tmp_path):
    config = ModelConfig(**{**CONFIG.__dict__, "text_len": 77})
    save_diffusers(tmp_path, CausalDiT(config))
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["text_len"] == 77
    assert load_dit(tmp_path).config == config
    other = ModelConfig(**{**CONFIG.__dict__, "rope_theta": 5000.0})
    with pytest.raises(ValueError, match="rope_theta=5000.0: diffusers' Wan has 10000.0"):
        save_diffusers(tmp_path, CausalDiT(other))


def test_nothing_is_overwritten_and_a_bad_source_leaves_nothing(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for target in ("full", "full/a"):
        with pytest.raises(ValueError, match=f"{target}: is there already"):
            convert(source, tmp_path / target)
    with pytest.raises(ValueError, match="to='comfy': must be one of engine, diffusers"):
        convert(source, tmp_path / "out", to="comfy")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "absent.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
