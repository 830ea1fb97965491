"""The folder that diffusers writes, with its shards and their index: the same model, or refused by name."""

from __future__ import annotations

import json
import os

import pytest
import torch
from diffusers import WanTransformer3DModel

from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig
from tests.support.checkpoints import raises_naming, velocity


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture(scope="module")
def theirs():
    """diffusers' Wan with two heads of 128, as every published model has them, and random weights."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        ffn_dim=192,
        text_dim=40,
        freq_dim=64,
        num_layers=2,
        cross_attn_norm=True,
    ).requires_grad_(False)
    for parameter in model.eval().parameters():
        parameter.normal_(std=0.1)
    return model


@pytest.fixture
def published(theirs, tmp_path):
    """The folder that diffusers itself writes: five shards or more, and their index."""
    theirs.save_pretrained(tmp_path / "any" / "transformer", max_shard_size="1MB")
    (tmp_path / "any" / "vae").mkdir()
    assert len(list((tmp_path / "any" / "transformer").glob("*-of-*.safetensors"))) >= 5
    return tmp_path / "any"


@pytest.mark.parametrize("place", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors.index.json"])
def test_a_diffusers_folder_computes_what_diffusers_computes(published, theirs, place, close):
    ours = load_dit(published / place)
    x, text = torch.randn(2, 3, 16, 4, 6), torch.randn(2, 512, 40)
    t = torch.tensor([937.5, 36.25])
    close(velocity(ours, x, t, text), theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2), 1e-4)


def test_sizes_are_read_from_the_tensors_where_no_config_is(published, theirs):
    (published / "transformer" / "config.json").unlink()
    config = load_dit(published).config
    assert config == ModelConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, text_dim=40, freq_dim=64)


def shards(published) -> list:
    return sorted((published / "transformer").glob("*-of-*.safetensors"))


def test_a_shard_that_is_cut_off_is_named(published):
    shard = shards(published)[2]
    os.truncate(shard, shard.stat().st_size - 4)
    raises_naming(ValueError, shard, lambda: load_dit(published), "not a whole safetensors file", "cut off")


def test_a_shard_that_is_missing_is_named(published):
    shard = shards(published)[2]
    shard.unlink()
    raises_naming(FileNotFoundError, shard, lambda: load_dit(published), "no such file", ".index.json puts")


def rewrite_index(published, change):
    index = published / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))
    return index


def test_an_index_that_does_not_name_a_tensor_is_refused(published):
    index = rewrite_index(published, lambda places: places.pop("proj_out.bias"))
    raises_naming(ValueError, index, lambda: load_dit(published), "does not name 1 tensors", "proj_out.bias")


def test_an_index_that_names_an_absent_tensor_is_refused(published):
    index = rewrite_index(published, lambda places: places.update({"extra.bias": places["proj_out.bias"]}))
    raises_naming(ValueError, index, lambda: load_dit(published), "which are not there: extra.bias")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", ""])
def test_an_index_points_at_files_beside_it_only(published, place):
    rewrite_index(published, lambda places: places.update({"proj_out.bias": place}))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dit(published)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(published, text):
    index = rewrite_index(published, lambda places: None)
    index.write_text(text)
    raises_naming(ValueError, index, lambda: load_dit(published))


def test_one_shard_is_not_taken_for_the_model(published):
    shard = shards(published)[0]
    raises_naming(ValueError, shard, lambda: load_dit(shard), "give the folder", ".index.json")
    (published / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    raises_naming(FileNotFoundError, shard.parent, lambda: load_dit(published), "without the index")


def test_a_folder_without_a_model_or_with_several_is_named(tmp_path, weights):
    raises_naming(FileNotFoundError, tmp_path, lambda: load_dit(tmp_path), "a folder without a model", "transformer")
    for name in ("a.pt", "b.pt"):
        torch.save(weights, tmp_path / name)
    raises_naming(ValueError, tmp_path, lambda: load_dit(tmp_path), "holds 2 checkpoints (a.pt, b.pt)")
