"""Checkpoint files: every dialect loads the same weights, every bad file is refused by name, no file's code is run."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from dsa_engine.models.checkpoint import load_dit, load_strict, read_json, read_tensors
from dsa_engine.models.dit import CausalDiT

# Wan's name -> diffusers' name, by substitution of substrings: the way back of what the loader does
TO_DIFFUSERS = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    (".modulation", ".scale_shift_table"),
    (".norm3.", ".norm2."),
    (".self_attn.o.", ".attn1.to_out.0."),
    (".cross_attn.o.", ".attn2.to_out.0."),
    (".self_attn.norm", ".attn1.norm"),
    (".cross_attn.norm", ".attn2.norm"),
    (".self_attn.", ".attn1.to_"),
    (".cross_attn.", ".attn2.to_"),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
)


def diffusers_name(name: str) -> str:
    for ours, theirs in TO_DIFFUSERS:
        name = name.replace(ours, theirs)
    return name


def fsdp_name(name: str) -> str:
    """FSDP and activation checkpointing wrap blocks, so their names come in the middle."""
    return "model._fsdp_wrapped_module." + re.sub(
        r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
    )


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
    "diffusers": diffusers_name,
}


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture
def folder(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    return tmp_path


def renamed(weights, rename):
    return {RENAMES[rename](name): tensor for name, tensor in weights.items()}


def assert_loads(path, weights):
    loaded = load_dit(path).state_dict()
    assert loaded.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(loaded[name], weights[name])] == []


@pytest.mark.parametrize("rename", RENAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_every_naming_loads_the_same_weights(folder, weights, rename, suffix):
    path = folder / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(renamed(weights, rename), path)
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


def test_the_diffusers_names_of_this_test_are_those_of_diffusers(weights, tiny_config):
    c = tiny_config
    theirs = WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, ffn_dim=c.ffn_dim, text_dim=c.text_dim,
        freq_dim=c.freq_dim, num_layers=c.num_layers, cross_attn_norm=True,
    )  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {diffusers_name(name): tensor.shape for name, tensor in weights.items()} == shapes


def test_a_loaded_model_is_frozen_and_in_the_dtype_asked_for(folder, weights):
    save_file(weights, folder / "w.safetensors")
    model = load_dit(folder / "w.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_given_config_needs_no_config_json(tmp_path, weights, tiny_config):
    save_file(weights, tmp_path / "w.safetensors")
    assert load_dit(tmp_path / "w.safetensors", tiny_config).config == tiny_config


WEB_PAGE = "<!DOCTYPE html><html><body>404: Not Found</body></html>\n" * 20


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path, kind):
    path, proof = tmp_path / "evil.pt", tmp_path / "code_was_run"
    content = {"model": {"a": torch.zeros(1)}, "payload": RunsCode(proof)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    raises_naming(ValueError, path, lambda: read_tensors(path))
    assert not proof.exists()
    pickle.loads(path.read_bytes()) if kind == "plain pickle" else torch.load(path, weights_only=False)
    assert proof.exists(), "the file does not run code at all, so it proves nothing"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("kept", [0.5, 0.001, 0.0])
def test_a_file_that_is_not_whole_is_refused(tmp_path, weights, suffix, kept):
    path = tmp_path / f"part{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    os.truncate(path, int(kept * path.stat().st_size))
    raises_naming(ValueError, path, lambda: read_tensors(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_web_page_saved_as_a_checkpoint_is_refused(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text(WEB_PAGE)
    raises_naming(ValueError, path, lambda: read_tensors(path))


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pt", "absent.bin"])
def test_a_missing_file_is_named(tmp_path, name):
    raises_naming(FileNotFoundError, tmp_path / name, lambda: load_dit(tmp_path / name))


@pytest.mark.parametrize("name", ["w.bin", "w"])
def test_another_ending_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text(WEB_PAGE)
    raises_naming(ValueError, tmp_path / name, lambda: read_tensors(tmp_path / name), ".safetensors, .pt, .pth")


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, ()),
        ([torch.zeros(1)], ("list",)),
        (torch.zeros(1), ("Tensor",)),
        ({"a": torch.zeros(1), "epoch": 3, "note": "x"}, ("epoch, note",)),
        ({"model": {"a": torch.zeros(1), "lr": 0.1}}, ("lr",)),
        ({"optimizer": {"state": {}}, "step": 3}, ("optimizer, step", "generator_ema")),
    ],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path, content, words):
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    raises_naming(ValueError, path, lambda: read_tensors(path), *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head.head.bias": None, "blocks.0.modulation": None}, ("2 missing: blocks.0.modulation, head.head.bias",)),
        ({"img_emb.weight": torch.zeros(2)}, ("1 unexpected: img_emb.weight",)),
        ({"head.head.bias": torch.zeros(7)}, ("1 of another shape: head.head.bias [7] instead of [64]",)),
        ({"head.head.bias": None, "extra": torch.zeros(1)}, ("1 missing: head.head.bias", "1 unexpected: extra")),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, weights, changes, words):
    path = folder / "w.safetensors"
    save_file({name: tensor for name, tensor in (weights | changes).items() if tensor is not None}, path)
    raises_naming(ValueError, path, lambda: load_dit(path), *words)


def test_a_refused_state_leaves_the_module_as_it_was(tiny_dit, weights):
    with pytest.raises(ValueError, match="missing"):
        load_strict(tiny_dit, {k: v + 1 for k, v in weights.items() if k != "head.head.bias"}, "source")
    assert all(torch.equal(v, weights[k]) for k, v in tiny_dit.state_dict().items())


def test_a_real_module_keeps_its_own_memory(tiny_config, weights):
    model = CausalDiT(tiny_config)
    load_strict(model, weights, "source")
    weights["head.head.bias"].zero_()
    assert model.head.head.bias.abs().max() > 0


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', b"\xff\xfe\x00"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, weights, text):
    save_file(weights, tmp_path / "w.safetensors")
    config = tmp_path / "config.json"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    raises_naming(ValueError, config, lambda: load_dit(tmp_path / "w.safetensors"))
    raises_naming(ValueError, config, lambda: read_json(config))


def test_a_missing_config_is_named(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    raises_naming(FileNotFoundError, tmp_path / "config.json", lambda: load_dit(tmp_path / "w.safetensors"))


def raises_naming(kind, path, call, *words) -> None:
    with pytest.raises(kind, match=re.escape(str(path))) as error:
        call()
    assert [w for w in words if w not in str(error.value)] == []
