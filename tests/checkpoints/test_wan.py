"""A DiT from a checkpoint: every dialect loads the same weights, quantized ones too, and in one copy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import prod

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.key_maps import DIFFUSERS_KEYS, FASTVIDEO_KEYS, rename
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from tests.support.checkpoints import raises_naming, write, write_sparse


def fsdp_name(name: str) -> str:
    """FSDP and activation checkpointing wrap blocks, so their names come in the middle."""
    return "model._fsdp_wrapped_module." + re.sub(
        r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
    )


# The maps themselves are held against lists and the models of diffusers in `test_key_maps.py`.
RENAMES = {
    "bare": lambda name: name,
    "model.": lambda name: f"model.{name}",
    "net.": lambda name: f"net.{name}",
    "generator.": lambda name: f"generator.{name}",
    "diffusion_model.": lambda name: f"diffusion_model.{name}",
    "model.diffusion_model.": lambda name: f"model.diffusion_model.{name}",
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.model.{name}",
    "fsdp": fsdp_name,
    "diffusers": lambda name: rename(name, DIFFUSERS_KEYS),
    "fastvideo": lambda name: rename(name, FASTVIDEO_KEYS),
    "fastvideo, wrapped": lambda name: f"_orig_mod.transformer.{rename(name, FASTVIDEO_KEYS)}",
}


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture
def folder(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    return tmp_path


def renamed(weights, naming):
    return {RENAMES[naming](name): tensor for name, tensor in weights.items()}


def assert_loads(path, weights):
    loaded = load_dit(path).state_dict()
    assert loaded.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(loaded[name], weights[name])] == []


@pytest.mark.parametrize("naming", RENAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_naming_loads_the_same_weights(folder, weights, naming, suffix):
    path = folder / f"weights{suffix}"
    write(path, renamed(weights, naming))
    assert_loads(path, weights)


@pytest.mark.parametrize("key", ["generator_ema", "generator", "model", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_top_level_key_of_training_saves_is_found(folder, weights, key, legacy):
    path = folder / "self_forcing_dmd.pt"
    torch.save({key: renamed(weights, "model.")}, path, _use_new_zipfile_serialization=not legacy)
    assert_loads(path, weights)


def test_the_ema_generator_is_preferred_and_the_critic_is_left(folder, weights):
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    content = {"critic": other, "generator": renamed(other, "model."), "generator_ema": renamed(weights, "fsdp")}
    torch.save(content, folder / "both.pt")
    assert_loads(folder / "both.pt", weights)


def test_a_loaded_model_is_frozen_and_in_the_dtype_asked_for(folder, weights):
    save_file(weights, folder / "w.safetensors")
    model = load_dit(folder / "w.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_given_config_needs_no_config_json(tmp_path, weights, tiny_config):
    save_file(weights, tmp_path / "w.safetensors")
    assert load_dit(tmp_path / "w.safetensors", tiny_config).config == tiny_config


def test_a_real_module_keeps_its_own_memory(tiny_config, weights):
    model = CausalDiT(tiny_config)
    load_strict(model, weights, "source")
    weights["head.head.bias"].zero_()
    assert model.head.head.bias.abs().max() > 0


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind", ["one value", "a value in a list", "rows", "a column", "none", "int8"])
def test_quantized_weights_are_their_values_times_their_scales(folder, weights, kind):
    stored, expected = {}, {}
    for name, tensor in weights.items():
        if not re.search(r"(attn\.[qkvo]|ffn\.\d)\.weight", name):
            stored[f"model.{name}"] = expected[name] = tensor
            continue
        largest, dtype = (127, torch.int8) if kind == "int8" else (448, FP8)
        per_row = tensor.abs().amax(1, keepdim=True) / largest
        scale = per_row if kind in ("rows", "a column", "int8") else per_row.max()
        scale = torch.ones(()) if kind == "none" else scale
        low = (tensor / scale).round().to(dtype) if kind == "int8" else (tensor / scale).to(dtype)
        expected[name] = low.float() * scale
        stored[f"model.{name}"] = low
        stem = f"model.{name}".removesuffix(".weight")
        if kind in ("rows", "a column", "int8"):
            stored[f"{stem}.weight_scale"] = scale.flatten() if kind == "rows" else scale
        elif kind != "none":
            stored[f"{stem}.scale_weight"] = scale if kind == "one value" else scale[None]
            stored[f"{stem}.scale_input"] = torch.ones(())
    stored |= {"scaled_fp8": torch.zeros(2, dtype=FP8)} if kind == "one value" else {}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "w.safetensors")
    assert_loads(folder / "w.safetensors", expected)


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"blocks.0.ffn.0.weight_scale": torch.ones(7)}, ("[7] for blocks.0.ffn.0.weight", "of shape [160, 96]")),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(0)}, ("[0] for blocks.0.ffn.0.weight", "one value")),
        ({"blocks.9.ffn.0.scale_weight": torch.ones(1)}, ("blocks.9.ffn.0.weight", "not there")),
        ({"blocks.0.ffn.0.weight": torch.zeros(160, 48, dtype=torch.uint8)}, ("uint8", "FP8 or INT8 with a scale")),
    ],
)
def test_scales_that_do_not_fit_are_named(folder, weights, extra, words):
    save_file({**weights, **extra}, folder / "w.safetensors")
    raises_naming(ValueError, folder / "w.safetensors", lambda: load_dit(folder / "w.safetensors"), *words)


def test_the_only_checkpoint_of_a_folder_is_taken(folder, weights):
    torch.save({"generator": renamed(weights, "model.")}, folder / "longlive_base.pt")
    assert_loads(folder, weights)


def test_a_family_says_which_weights_of_a_training_save_it_runs(folder, weights):
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch.save({"generator_ema": other, "generator": weights}, folder / "w.pt")
    loaded = load_dit(folder / "w.pt", family="longlive").state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match="family='longlife': must be one of self-forcing, longlive"):
        load_dit(folder / "w.pt", family="longlife")


def test_a_loaded_model_does_not_depend_on_its_file(folder, weights):
    for name in ("w.safetensors", "w.pt"):
        (save_file if name.endswith("s") else torch.save)(weights, folder / name)
        model = load_dit(folder / name)
        (folder / name).write_bytes(b"0" * (folder / name).stat().st_size)
        assert all(tensor.equal(weights[key]) for key, tensor in model.state_dict().items())


LOAD = """
import json, re, sys, torch
from dsa_engine import Pipeline
def peak():  # not getrusage, whose maximum counts the parent too
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
facts = {"before": peak()}
pipe = Pipeline.from_pretrained(sys.argv[1], device="cpu", dtype=torch.bfloat16)
dit = pipe.engine.dit
facts |= {"load": peak(), "parameters": sum(p.numel() for p in dit.parameters())}
facts["last"] = dit.blocks[29].ffn[2].weight[1535, 8959].item()
latents = pipe.generate_latents(torch.randn(1, 3, 16, 4, 6), torch.zeros(1, 1, 4096), step_policy="fixed:1")
facts["step"] = peak()
facts["latents"] = [list(latents.shape), str(latents.dtype), latents.isfinite().all().item(), latents.std().item()]
print(json.dumps(facts))
"""


@pytest.mark.slow
def test_a_1_3b_checkpoint_loads_and_denoises_a_chunk_with_one_copy_of_its_weights(tmp_path):
    """The true names and shapes, 2.84 GB in bfloat16, laid out here as any tool writes safetensors; then one step of a
    chunk of 18 tokens, through every weight. Peak memory as the system counts it, in a process of its own.

    The 4,680 tokens of 480x832 are 16 TF, minutes on a CPU without bfloat16. Nor do 28 of the 30 blocks need a value:
    they stay a hole in the file, which takes as much memory as any other weights once it is read.
    """
    path = tmp_path / "model.safetensors"
    write_sparse(path, ModelConfig.preset("wan2.1-t2v-1.3b"))
    header = 8 + int.from_bytes(path.open("rb").read(8), "little")
    draw, last = torch.Generator().manual_seed(0), None
    with path.open("r+b") as file:
        for name, offset, count in read_header(path):
            if not name.startswith("blocks.") or name.startswith(("blocks.0.", "blocks.29.")):
                values = (0.02 * torch.randn(count, generator=draw)).bfloat16()
                file.seek(header + offset)
                file.write(values.view(torch.uint8).numpy())
            if name == "blocks.29.ffn.2.weight":
                last = values[-1].item()
    result = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True)
    path.unlink()
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["parameters"], facts["last"]) == (1_418_996_800, last)
    shape, dtype, finite, deviation = facts["latents"]
    assert (shape, dtype, finite) == ([1, 3, 16, 4, 6], "torch.bfloat16", True) and deviation > 0.1
    loaded, stepped = facts["load"] - facts["before"], facts["step"] - facts["before"]
    assert 2.5e9 < loaded < 2.84e9 + 0.33e9, f"{loaded / 1e9:.2f} GB for weights of 2.84 GB: more than one copy"
    assert stepped < 2.84e9 + 1e9, f"{stepped / 1e9:.2f} GB after a step with weights of 2.84 GB"


def read_header(path):
    with path.open("rb") as file:
        about = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [(name, values["data_offsets"][0], prod(values["shape"])) for name, values in about.items()]
