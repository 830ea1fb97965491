"""Files that are no DiT, or not one that fits: each is refused by name, unread, and no file's code is run."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from dsa_engine.checkpoints import tensor_io
from dsa_engine.checkpoints.tensor_io import read_json, read_tensors
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import PooledHead
from tests.support.checkpoints import WEB_PAGE, RunsCode, raises_naming, write, write_sparse


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture
def folder(tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    return tmp_path


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
    write(path, weights)
    os.truncate(path, int(kept * path.stat().st_size))
    raises_naming(ValueError, path, lambda: read_tensors(path))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 2837993600\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize(
    "content, words",
    [(LFS, "git lfs pull"), (WEB_PAGE, "a web page"), ("\n" + WEB_PAGE, "'<!DOCTYPE html>"), ("", "empty, 0 bytes")],
)
def test_what_is_no_checkpoint_at_all_is_refused(tmp_path, suffix, content, words):
    path = tmp_path / f"w{suffix}"
    path.write_text(content)
    raises_naming(ValueError, path, lambda: load_dit(path), words)


def test_a_wrong_suffix_is_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "w.safetensors")
    raises_naming(ValueError, tmp_path / "w.safetensors", lambda: load_dit(tmp_path / "w.safetensors"), "end in .pt")
    save_file(weights, tmp_path / "w.pt")
    raises_naming(ValueError, tmp_path / "w.pt", lambda: load_dit(tmp_path / "w.pt"), "rename it to .safetensors")


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


def foreign(weights):
    """What may be given by mistake -> (tensors, what the error must say it is)."""
    umt5 = {"token_embedding.weight": torch.zeros(2, 2), "blocks.0.attn.q.weight": torch.zeros(2, 2)}
    lora = {
        "base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 96),
        "base_model.model.blocks.0.ffn.0.lora_B.weight": torch.zeros(160, 2),
    }
    engine = {**{f"generator.{name}": tensor for name, tensor in weights.items()}, "codec.a": torch.zeros(1)}
    return {
        "vae": ({"decoder.upsamples.0.residual.0.gamma": torch.zeros(2)}, "the Wan 2.1 VAE: give it as vae="),
        "diffusers' vae": (AutoencoderKLWan(base_dim=4).state_dict(), "diffusers' names: give it as vae="),
        "text encoder": (umt5, "a umT5 text encoder: give it as text="),
        "lora": (lora, "a LoRA: give it as lora=, with its base model"),
        "head": (PooledHead(ModelConfig.preset("shapes")).state_dict(), "a confidence head: give it as head="),
        "engine": (engine, "a whole model in this project's format"),
        "image to video": ({**weights, "img_emb.proj.0.weight": torch.zeros(2)}, "only text-to-video"),
        "anything": ({"visual.weight": torch.zeros(2)}, "no model that is known here (its first names: visual.weight)"),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", list(foreign({})))
def test_another_kind_of_file_is_named(tmp_path, weights, name, suffix):
    tensors, words = foreign(weights)[name]
    path = tmp_path / f"w{suffix}"
    write(path, {k: v.contiguous() for k, v in tensors.items()})
    raises_naming(ValueError, path, lambda: load_dit(path), words, "expected a DiT")


def test_a_lora_of_training_is_found_under_its_key(tmp_path):
    torch.save({"generator_lora": foreign({})["lora"][0]}, tmp_path / "lora.pt")
    raises_naming(ValueError, tmp_path / "lora.pt", lambda: load_dit(tmp_path / "lora.pt"), "a LoRA: give it as lora=")


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


def test_a_14b_file_for_a_1_3b_config_is_named_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_io, "_read", lambda *_: pytest.fail("a tensor was read"))
    path, small = tmp_path / "big.safetensors", ModelConfig.preset("wan2.1-t2v-1.3b")
    write_sparse(path, ModelConfig.preset("wan2.1-t2v-14b"))
    words = ("dim=5120 and not 1536", "num_layers=40 and not 30", "sizes of wan2.1-t2v-14b")
    raises_naming(ValueError, path, lambda: load_dit(path, small), *words, "the given config")
    (tmp_path / "config.json").write_text(json.dumps(small.to_dict()))
    raises_naming(ValueError, path, lambda: load_dit(path), *words, "config.json")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head.head.bias": None, "blocks.0.modulation": None}, ("2 missing: blocks.0.modulation, head.head.bias",)),
        ({"clip.weight": torch.zeros(2)}, ("1 unexpected: clip.weight",)),
        (
            {"blocks.1.self_attn.q.bias": None, "blocks.1.self_atn.q.bias": torch.zeros(96)},
            ("1 unexpected: blocks.1.self_atn.q.bias (nearest: blocks.1.self_attn.q.bias)",),
        ),
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
