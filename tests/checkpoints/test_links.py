"""Where files are looked for and what they are called: links, Hugging Face's cache, hidden files, other tools'."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.checkpoints.load import load_components, model_name
from dsa_engine.checkpoints.tensor_io import find_weights, read_json
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT

SMALL = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, freq_dim=32)
REVISION, BLOB = (
    "0123456789abcdef0123456789abcdef01234567",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
)


@pytest.fixture
def weights():
    return CausalDiT(SMALL).state_dict()


@pytest.fixture
def cached(tmp_path, weights):
    """The file of a repository in Hugging Face's cache: a link to a blob that is called by its hash."""

    def make(repository, name="model.safetensors", config=None):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        (folder / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        save_file(weights, folder / "blobs" / BLOB)
        (snapshot / name).symlink_to(f"../../blobs/{BLOB}")
        if config is not None:
            (folder / "blobs" / "c0ffee").write_text(json.dumps(config))
            (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
        return snapshot / name

    return make


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("repository, family", [("NVlabs/LongLive-1.3B", "longlive"), ("krea/krea-realtime", "krea")])
def test_a_repository_in_the_cache_names_family_and_model(cached, repository, family, as_folder):
    file = cached(repository)
    path = file.parent if as_folder else file
    info = inspect(path)
    assert (info.family, info.rollout) == (family, FAMILIES[family].rollout)
    name = repository.split("/")[1]
    assert model_name(path) == (name if as_folder else "model")
    assert REVISION not in load_components(path).name and BLOB not in load_components(path).name
    blob = path.resolve() if not as_folder else file.resolve()
    assert model_name(blob) == name


def test_the_name_of_the_file_in_the_cache_is_its_own(cached):
    assert inspect(cached("someone/weights", "self_forcing_dmd.safetensors")).family == "self-forcing"


def test_window_and_sink_of_a_config_in_the_cache(cached):
    path = cached("someone/model", config=SMALL.to_dict() | {"local_attn_size": 9, "sink_size": 3})
    rollout = inspect(path).rollout
    assert (rollout.window, rollout.sink) == (9, 3)


def test_a_users_own_link(tmp_path, weights):
    """Its own name counts first, then those of what it points at, where the config lies."""
    folder = tmp_path / "LongLive"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL.to_dict() | {"local_attn_size": 9, "sink_size": 3}))
    for name in ("mine.safetensors", "latest"):
        (tmp_path / name).symlink_to(folder / "model.safetensors")
        info = inspect(tmp_path / name)
        assert (info.family, info.rollout.window, info.config_source) == ("longlive", 9, "config.json")
        assert model_name(tmp_path / name) == name.split(".")[0]
    (tmp_path / "krea").symlink_to(folder)
    assert inspect(tmp_path / "krea").family == "krea" and model_name(tmp_path / "krea") == "krea"


def test_a_link_to_an_index_finds_the_shards(tmp_path, weights):
    folder = tmp_path / "real"
    folder.mkdir()
    save_file(weights, folder / "w-00001-of-00001.safetensors")
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "w-00001-of-00001.safetensors")}))
    (tmp_path / "linked.safetensors.index.json").symlink_to(index)
    assert inspect(tmp_path / "linked.safetensors.index.json").tensors == len(weights)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("shard", ["m.{}-00001-of-00001.safetensors", "m-00001-of-00001.{}.safetensors"])
def test_the_index_of_a_variant_is_found(tmp_path, weights, variant, shard):
    name = shard.format(variant)
    save_file(weights, tmp_path / name)
    index = tmp_path / f"diffusion_pytorch_model.safetensors.index.{variant}.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    assert find_weights(tmp_path) == index
    for path in (tmp_path, index):
        loaded = load_dit(path).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


def test_hidden_files_are_not_looked_at(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("._w.safetensors", ".w.safetensors.123.part.safetensors", "._x.safetensors.index.json", ".old.pt"):
        (tmp_path / name).write_bytes(b"\0" * 64)
    assert find_weights(tmp_path) == tmp_path / "w.safetensors"


@pytest.mark.parametrize(
    "config",
    [
        {"editor": "theme", "version": 3},
        {"format": "onnx", "opset": 17},
        {"architectures": ["UMT5EncoderModel"], "d_model": 4096, "num_heads": 64, "num_layers": 24},
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24, "attention_head_dim": 128},
        {},
    ],
)
def test_another_tools_config_is_passed_over_with_a_warning(tmp_path, weights, config, caplog):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert load_dit(tmp_path / "w.safetensors").config == SMALL
        assert load_components(tmp_path).dit.config == SMALL
    assert f"{tmp_path / 'config.json'}: no config of a Wan model, passed over" in caplog.text


@pytest.mark.parametrize("config", [{"dim": 64}, {"_class_name": "WanTransformer3DModel"}])
def test_a_models_own_config_that_lacks_a_size_is_still_refused(tmp_path, weights, config):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: .*lacks"):
        load_dit(tmp_path / "w.safetensors")


def test_a_byte_order_mark_is_read(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    config = SMALL.to_dict() | {"eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == config
    assert load_dit(tmp_path / "w.safetensors").config.eps == 1e-5
