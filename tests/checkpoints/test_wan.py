"""Checkpoint files: every dialect loads the same weights, every bad file is refused by name, no file's code is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from math import prod

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file

from dsa_engine.checkpoints import tensor_io
from dsa_engine.checkpoints.tensor_io import read_json, read_tensors
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.sampling.kv_cache import KVCache

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


# Wan's name -> FastVideo's, in the same way
TO_FASTVIDEO = (
    ("patch_embedding.", "patch_embedding.proj."),
    ("time_embedding.0.", "condition_embedder.time_embedder.mlp.fc_in."),
    ("time_embedding.2.", "condition_embedder.time_embedder.mlp.fc_out."),
    ("text_embedding.0.", "condition_embedder.text_embedder.fc_in."),
    ("text_embedding.2.", "condition_embedder.text_embedder.fc_out."),
    ("time_projection.1.", "condition_embedder.time_modulation.linear."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    (".modulation", ".scale_shift_table"),
    (".norm3.", ".self_attn_residual_norm.norm."),
    (".self_attn.o.", ".to_out."),
    (".cross_attn.o.", ".attn2.to_out."),
    (".self_attn.norm", ".norm"),
    (".cross_attn.norm", ".attn2.norm"),
    (".self_attn.", ".to_"),
    (".cross_attn.", ".attn2.to_"),
    (".ffn.0.", ".ffn.fc_in."),
    (".ffn.2.", ".ffn.fc_out."),
)


def fastvideo_name(name: str) -> str:
    for ours, theirs in TO_FASTVIDEO:
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
    "fastvideo": fastvideo_name,
    "fastvideo, wrapped": lambda name: f"_orig_mod.transformer.{fastvideo_name(name)}",
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
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
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
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        ffn_dim=c.ffn_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        num_layers=c.num_layers,
        cross_attn_norm=True,
    )
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


# ---- what only some checkpoints have: other models' files, shards, scales, no config, wrong sizes


def forward(model: CausalDiT, x, t, text):
    """One chunk with no past, [B, F, C, H, W]."""
    config, frames = model.config, x.shape[1]
    tokens = config.tokens_per_frame(*x.shape[-2:])
    cache = KVCache(config.num_layers, config.num_heads, config.head_dim, tokens, frames, slots=len(x))
    rows = cache.rows(cache.acquire(len(x)), frames)
    return model(x, t[:, None].expand(len(x), frames), rows.frames, model.text_kv(text), rows).velocity


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
    close(forward(ours, x, t, text), theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2), 1e-4)


def test_sizes_are_read_from_the_tensors_where_no_config_is(published, theirs):
    (published / "transformer" / "config.json").unlink()
    config = load_dit(published).config
    assert config == ModelConfig(dim=256, ffn_dim=192, num_heads=2, num_layers=2, text_dim=40, freq_dim=64)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind", ["one value", "a value in a list", "rows", "a column", "none", "int8"])
def test_quantised_weights_are_their_values_times_their_scales(folder, weights, kind):
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


def sparse(path, config: ModelConfig) -> None:
    """A bfloat16 checkpoint of any size, whose data is a hole in the file: a header, and the right length."""
    with torch.device("meta"):
        tensors = CausalDiT(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_a_14b_file_for_a_1_3b_config_is_named_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_io, "_read", lambda *_: pytest.fail("a tensor was read"))
    path, small = tmp_path / "big.safetensors", ModelConfig.preset("wan2.1-t2v-1.3b")
    sparse(path, ModelConfig.preset("wan2.1-t2v-14b"))
    words = ("dim=5120 and not 1536", "num_layers=40 and not 30", "sizes of wan2.1-t2v-14b")
    raises_naming(ValueError, path, lambda: load_dit(path, small), *words, "the given config")
    (tmp_path / "config.json").write_text(json.dumps(small.to_dict()))
    raises_naming(ValueError, path, lambda: load_dit(path), *words, "config.json")


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
        "head": (ConfidenceHead(ModelConfig.preset("shapes")).state_dict(), "a confidence head: give it as head="),
        "engine": (engine, "a whole model in this project's format"),
        "image to video": ({**weights, "img_emb.proj.0.weight": torch.zeros(2)}, "only text-to-video"),
        "anything": ({"visual.weight": torch.zeros(2)}, "no model that is known here (its first names: visual.weight)"),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", list(foreign({})))
def test_another_kind_of_file_is_told(tmp_path, weights, name, suffix):
    tensors, words = foreign(weights)[name]
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({k: v.contiguous() for k, v in tensors.items()}, path)
    raises_naming(ValueError, path, lambda: load_dit(path), words, "expected a DiT")


def test_a_lora_of_training_is_told_under_its_key(tmp_path):
    torch.save({"generator_lora": foreign({})["lora"][0]}, tmp_path / "lora.pt")
    raises_naming(ValueError, tmp_path / "lora.pt", lambda: load_dit(tmp_path / "lora.pt"), "a LoRA: give it as lora=")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 2837993600\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize(
    "content, words",
    [(LFS, "git lfs pull"), (WEB_PAGE, "a web page"), ("\n" + WEB_PAGE, "'<!DOCTYPE html>"), ("", "empty, 0 bytes")],
)
def test_what_is_no_checkpoint_at_all_is_told(tmp_path, suffix, content, words):
    path = tmp_path / f"w{suffix}"
    path.write_text(content)
    raises_naming(ValueError, path, lambda: load_dit(path), words)


def test_a_wrong_ending_is_told(tmp_path, weights):
    torch.save(weights, tmp_path / "w.safetensors")
    raises_naming(ValueError, tmp_path / "w.safetensors", lambda: load_dit(tmp_path / "w.safetensors"), "end in .pt")
    save_file(weights, tmp_path / "w.pt")
    raises_naming(ValueError, tmp_path / "w.pt", lambda: load_dit(tmp_path / "w.pt"), "rename it to .safetensors")


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


def test_an_index_that_does_not_name_a_tensor_is_told(published):
    index = rewrite_index(published, lambda places: places.pop("proj_out.bias"))
    raises_naming(ValueError, index, lambda: load_dit(published), "does not name 1 tensors", "proj_out.bias")


def test_an_index_that_names_what_is_not_there_is_told(published):
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


# ---- memory

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
    sparse(path, ModelConfig.preset("wan2.1-t2v-1.3b"))
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


def raises_naming(kind, path, call, *words) -> None:
    """The call fails with the path in its message."""
    with pytest.raises(kind, match=re.escape(str(path))) as error:
        call()
    assert [w for w in words if w not in str(error.value)] == [], error.value
