"""Quantized files are read as they say they are: against the weights before they were quantized."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.checkpoints.quantized import hadamard
from dsa_engine.checkpoints.tensor_io import read_tensors
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT

CONFIG = ModelConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, freq_dim=32)
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}


@pytest.fixture
def weights():
    torch.manual_seed(3)
    return {name: torch.randn_like(tensor) for name, tensor in CausalDiT(CONFIG).state_dict().items()}


def layers(weights):
    """The linear layers of the blocks."""
    return [n.removesuffix(".weight") for n, t in weights.items() if n.startswith("blocks.") and t.ndim == 2]


def rotated(weight, group):
    """Column by column, from the definition: the regular Hadamard matrix of 4 by Kronecker products, over its norm."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = four
    while len(matrix) < group:
        matrix = torch.kron(matrix, four)
    parts = [part @ (matrix / group**0.5).T for part in weight.split(group, 1)]
    return torch.cat(parts, 1)


def quantized(weights, group=64, scale_shape=(-1, 1)):
    """INT8 of each row's own scale."""
    stored = dict(weights)
    for layer in layers(weights):
        weight = stored[f"{layer}.weight"]
        weight = rotated(weight, group) if group else weight
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored[f"{layer}.weight"] = (weight / scale).round().to(torch.int8)
        stored[f"{layer}.weight_scale"] = scale.reshape(scale_shape).clone()
    return stored


def marker(said):
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def error(path, weights):
    """The greatest relative error of a layer's weight, in the Frobenius norm."""
    loaded = load_dit(path).state_dict()
    pairs = [(loaded[f"{layer}.weight"], weights[f"{layer}.weight"]) for layer in layers(weights)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_the_regular_hadamard_matrix():
    for size in (4, 16, 64, 256):
        matrix = hadamard(size)
        assert torch.equal(matrix, matrix.T) and torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)
        assert torch.allclose(matrix.sum(1), torch.ones(size)), "rows of one sum are what makes it regular"


@pytest.mark.parametrize("start", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(
    "where", ["companion", "companion's params", "header", "header without prefix", "both", "shards"]
)
def test_convrot_is_rotated_back(tmp_path, weights, where, start):
    stored = {start + name: tensor for name, tensor in quantized(weights).items()}
    names, path = [start + layer for layer in layers(weights)], tmp_path / "w.safetensors"
    said = (
        {"format": ROTATED["format"], "params": {"convrot": True, "convrot_groupsize": 64}}
        if "params" in where
        else ROTATED
    )
    if where.startswith(("companion", "both")):
        stored |= {f"{name}.comfy_quant": marker(said) for name in names}
    shown = layers(weights) if "without" in where else names
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": dict.fromkeys(shown, said)})}
    save_file(stored, path, header if not where.startswith("companion") else None)
    if where == "shards":
        path = path.rename(tmp_path / "w-00001-of-00001.safetensors")
        index = tmp_path / "w.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, path.name)}))
        path = index
    assert 0.004 < error(path, weights) < 0.012
    assert inspect(path).formats == {"int8_tensorwise, rotated in groups of 64 (ConvRot)": len(names)}


@pytest.mark.parametrize(
    "said", [None, {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "convrot": False, "per_row": True}]
)
@pytest.mark.parametrize("scale_shape", [(-1,), (-1, 1)])
def test_plain_int8_is_not_rotated(tmp_path, weights, said, scale_shape):
    stored = quantized(weights, None, scale_shape)
    if said:
        stored |= {f"{layer}.comfy_quant": marker(said) for layer in layers(weights)}
    save_file(stored, tmp_path / "w.safetensors")
    assert error(tmp_path / "w.safetensors", weights) < 0.012


@pytest.mark.parametrize("name, dtype", [("float8_e4m3fn", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)])
def test_fp8_with_its_format_in_the_header(tmp_path, weights, name, dtype):
    stored = dict(weights)
    for layer in layers(weights):
        scale = weights[f"{layer}.weight"].abs().max() / torch.finfo(dtype).max
        stored[f"{layer}.weight"] = (weights[f"{layer}.weight"] / scale).to(dtype)
        stored[f"{layer}.weight_scale"] = scale
    header = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers(weights), name)})}
    save_file(stored, tmp_path / "w.safetensors", header)
    assert error(tmp_path / "w.safetensors", weights) < (0.04 if "e4m3" in name else 0.08)


@pytest.mark.parametrize("where", ["companion", "header"])
@pytest.mark.parametrize(
    "said, words",
    [
        *(
            ({"format": name}, f"quantized as {name}, which is not read")
            for name in ("nvfp4", "mxfp8", "int8_blockwise")
        ),
        ({"format": "asym_w4a8_int8", "group_size": 16}, "quantized as asym_w4a8_int8, which is not read"),
        ({"format": "float8_e4m3fn_blockwise"}, "quantized as float8_e4m3fn_blockwise, which is not read"),
        ({"format": "int8_tensorwise", "quarot": True}, "quarot=True, which is not known here"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}, "must be a power of 4"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "rotated in groups of 256"),
        ({"format": "float8_e4m3fn"}, "said to be quantized as float8_e4m3fn, but it is of torch.int8"),
        ({"convrot": True}, "names no format"),
    ],
)
def test_any_other_format_is_refused_by_its_name(tmp_path, weights, where, said, words):
    stored, path = quantized(weights), tmp_path / "w.safetensors"
    if where == "companion":
        stored |= {f"{layer}.comfy_quant": marker(said) for layer in layers(weights)}
    header = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers(weights), said)})}
    save_file(stored, path, header if where == "header" else None)
    with pytest.raises(ValueError, match="w.safetensors: .*blocks.0.") as error:
        load_dit(path)
    assert words in str(error.value)
    assert inspect(path).quantized == len(layers(weights))  # `info` tells what it is all the same


def test_companion_and_header_must_agree(tmp_path, weights):
    stored = quantized(weights) | {f"{layer}.comfy_quant": marker(ROTATED) for layer in layers(weights)}
    header = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers(weights), "int8_tensorwise")})}
    save_file(stored, tmp_path / "w.safetensors", header)
    with pytest.raises(ValueError, match="its header says int8_tensorwise, and .*comfy_quant int8_tensorwise, rotated"):
        load_dit(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "shape, fits",
    [((), True), ((1,), True), ((1, 1), True), ((128,), True), ((128, 1), True), ((1, 128), True)]
    + [((8, 16), False), ((128, 2), False), ((2,), False), ((1, 2), False), ((16, 8), False)],
)
def test_a_scale_goes_by_its_shape(tmp_path, weights, shape, fits):
    """q is 128 x 128, so that a count would not tell rows, columns and blocks of it apart."""
    name, scale = "blocks.0.self_attn.q.weight", torch.rand(shape) + 0.5
    stored = weights[name].to(torch.float8_e4m3fn)
    save_file({**weights, name: stored, f"{name}_scale": scale}, tmp_path / "w.safetensors")
    if not fits:
        with pytest.raises(ValueError, match="a scale of shape"):
            load_dit(tmp_path / "w.safetensors")
        return
    by = scale[:, None] if shape == (128,) else scale
    assert torch.equal(load_dit(tmp_path / "w.safetensors").state_dict()[name], stored.float() * by)


@pytest.mark.parametrize("companion", ["weight_scale_inv", "weight_scale_2", "qzeros", "weight.absmax", "SCB"])
def test_companions_of_other_formats_are_refused(tmp_path, weights, companion):
    save_file({**weights, f"blocks.0.self_attn.q.{companion}": torch.ones(1, 1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"blocks.0.self_attn.q.{companion} belongs to a quantized format"):
        load_dit(tmp_path / "w.safetensors")


def test_a_config_that_says_quantized_is_refused(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    config = CONFIG.to_dict() | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: quantization_config says bitsandbytes"):
        load_dit(tmp_path / "w.safetensors")


def test_the_file_itself_is_rotated(tmp_path, weights):
    """Read without its companion it would be noise, so the tests above can fail."""
    save_file(quantized(weights), tmp_path / "w.safetensors")
    assert error(tmp_path / "w.safetensors", weights) > 1
    assert read_tensors(tmp_path / "w.safetensors")["blocks.0.self_attn.q.weight"].dtype == torch.int8
