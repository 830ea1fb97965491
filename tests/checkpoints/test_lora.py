"""Merged adapters against the formula W + alpha / r * B A written out, for every way to name and to scale them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.lora import open_lora
from dsa_engine.checkpoints.wan import load_dit

RANK = 4
# The ten linear layers of a block that LongLive adapts
LINEARS = [*(f"{part}.{x}" for part in ("self_attn", "cross_attn") for x in "qkvo"), "ffn.0", "ffn.2"]


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture
def base(tmp_path, weights, tiny_config):
    """A base model as LongLive publishes it."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "base.pt")
    return tmp_path / "base.pt"


@pytest.fixture
def matrices(weights):
    """(A, B) of every linear layer of every block, by the layer's name."""
    pairs = {}
    for name in (f"blocks.{n}.{linear}" for n in range(3) for linear in LINEARS):
        outputs, inputs = weights[f"{name}.weight"].shape
        pairs[name] = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
    return pairs


def peft(matrices, start="base_model.model.", end=".weight") -> dict:
    down = {f"{start}{name}.lora_A{end}": a for name, (a, _) in matrices.items()}
    return down | {f"{start}{name}.lora_B{end}": b for name, (_, b) in matrices.items()}


def expected(weights, matrices, scale):
    """scale: of all layers, or by name."""
    merged = dict(weights)
    for name, (a, b) in matrices.items():
        by = scale[name] if isinstance(scale, dict) else scale
        merged[f"{name}.weight"] = (weights[f"{name}.weight"].double() + by * (b.double() @ a.double())).float()
    return merged


def assert_merges(base, lora, wanted, close, **options):
    loaded = load_dit(base, lora=open_lora(lora, **options) if options else lora).state_dict()
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(loaded[name], tensor, 1e-6)


DIFFUSERS = (
    (".self_attn.o", ".attn1.to_out.0"),
    (".cross_attn.o", ".attn2.to_out.0"),
    (".self_attn.", ".attn1.to_"),
    (".cross_attn.", ".attn2.to_"),
    (".ffn.0", ".ffn.net.0.proj"),
    (".ffn.2", ".ffn.net.2"),
)


def in_diffusers_names(matrices):
    renamed = {}
    for name, pair in matrices.items():
        for ours, theirs in DIFFUSERS:
            name = name.replace(ours, theirs)
        renamed[name] = pair
    return renamed


def test_longlives_adapter_is_merged_with_a_scale_of_one(base, weights, matrices, close):
    lora = base.with_name("lora.pt")
    torch.save({"generator_lora": peft(matrices), "critic_lora": peft(matrices)}, lora)
    assert len(matrices) == 30
    assert_merges(base, lora, expected(weights, matrices, 1.0), close)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "tensors",
    [
        lambda m: peft(m),
        lambda m: peft(m, start="", end=".default.weight"),
        lambda m: peft(in_diffusers_names(m), start="transformer."),
        lambda m: peft(m, start="diffusion_model."),
    ],
)
def test_every_naming_is_merged(base, weights, matrices, close, tensors, suffix):
    lora = base.with_name(f"lora{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(tensors(matrices), lora)
    assert_merges(base, lora, expected(weights, matrices, 1.0), close)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("alpha", [None, 2.0, 8])
def test_alpha_and_strength(base, weights, matrices, close, alpha, strength):
    lora = base.with_name("lora.safetensors")
    save_file(peft(matrices), lora)
    scale = strength * (1 if alpha is None else alpha / RANK)
    assert_merges(base, lora, expected(weights, matrices, scale), close, alpha=alpha, strength=strength)


@pytest.mark.parametrize("root", [False, True])
def test_alpha_of_the_adapters_own_config(base, weights, matrices, close, root):
    (base.parent / "lora").mkdir()
    lora = base.parent / "lora" / "adapter_model.safetensors"
    save_file(peft(matrices), lora)
    lora.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 16, "use_rslora": root}))
    assert_merges(base, lora, expected(weights, matrices, 16 / RANK ** (0.5 if root else 1)), close)
    assert_merges(base, lora, expected(weights, matrices, 2 / RANK ** (0.5 if root else 1)), close, alpha=2)


def test_alpha_of_each_layer(base, weights, matrices, close):
    alphas = {name: 1.0 + i for i, name in enumerate(matrices)}
    tensors = {
        name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in peft(matrices, start="diffusion_model.").items()
    }
    tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    save_file(tensors, base.with_name("lora.safetensors"))
    scales = {name: alpha / RANK for name, alpha in alphas.items()}
    assert_merges(base, base.with_name("lora.safetensors"), expected(weights, matrices, scales), close)


def test_it_is_merged_in_float32_and_rounded_once(base, weights, matrices):
    """In bfloat16 W + B A would be rounded three times."""
    lora = base.with_name("lora.safetensors")
    low = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in matrices.items()}
    save_file(peft(low), lora)
    loaded = load_dit(base, dtype=torch.bfloat16, lora=lora).state_dict()
    for name, (a, b) in low.items():
        exact = (weights[f"{name}.weight"].double() + b.double() @ a.double()).float()
        off = (loaded[f"{name}.weight"].float() - exact).abs() / exact.abs().clamp(min=1e-3)
        assert off.max() <= 2**-8


def test_a_part_of_the_layers_is_enough(base, weights, matrices, close):
    some = {name: pair for name, pair in matrices.items() if "ffn" in name and "blocks.1" in name}
    save_file(peft(some), base.with_name("lora.safetensors"))
    assert_merges(base, base.with_name("lora.safetensors"), expected(weights, some, 1.0), close)


def test_it_is_not_merged_twice(base, weights, matrices, close):
    """Loading again starts from the base's file, which stays as it was."""
    lora = base.with_name("lora.safetensors")
    save_file(peft(matrices), lora)
    for _ in range(2):
        assert_merges(base, lora, expected(weights, matrices, 1.0), close)
    assert all(tensor.equal(weights[name]) for name, tensor in load_dit(base).state_dict().items())


Q = "base_model.model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({f"{Q}.lora_A.weight": torch.zeros(4, 96)}, "only half of a pair for: blocks.0.self_attn.q.weight"),
        ({f"{Q}.lora_B.weight": torch.zeros(96, 4)}, "only half of a pair"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 96), f"{Q}.lora_B.weight": torch.zeros(96, 5)}, "not of one rank"),
        (
            {f"{Q}.lora_A.weight": torch.zeros(4, 8), f"{Q}.lora_B.weight": torch.zeros(96, 4)},
            "changes blocks.0.self_attn.q.weight of shape [96, 8], which in the base model is [96, 96]",
        ),
        (
            {
                f"{Q.replace('0', '7')}.lora_A.weight": torch.zeros(4, 96),
                f"{Q.replace('0', '7')}.lora_B.weight": torch.zeros(96, 4),
            },
            "which in the base model is not there",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(4, 96),
                f"{Q}.lora_B.weight": torch.zeros(96, 4),
                f"{Q}.lora_magnitude_vector": torch.zeros(96),
            },
            "no pair of matrices B A: base_model.model.blocks.0",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(4, 96),
                f"{Q}.lora_B.weight": torch.zeros(96, 4),
                f"{Q}.lora_B.bias": torch.zeros(96),
            },
            "no pair of matrices",
        ),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 96, 1, 1), f"{Q}.lora_B.weight": torch.zeros(96, 4)}, "no pair of"),
        ({f"{Q}.weight": torch.zeros(96, 96)}, "holds a DiT; expected a LoRA"),
        ({"x": torch.zeros(1)}, "holds no model that is known here (its first names: x); expected a LoRA"),
    ],
)
def test_what_cannot_be_merged_is_named(base, tensors, words):
    lora = base.with_name("lora.safetensors")
    save_file(tensors, lora)
    with pytest.raises(ValueError, match=f"{re.escape(str(lora))}: .*{re.escape(words)}"):
        load_dit(base, lora=lora)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"alpha_pattern": {"q": 8}}])
def test_another_kind_of_adapter_is_named(base, matrices, setting):
    save_file(peft(matrices), base.with_name("lora.safetensors"))
    config = base.with_name("adapter_config.json")
    config.write_text(json.dumps({"lora_alpha": 4, **setting}))
    with pytest.raises(ValueError, match=f"{re.escape(str(config))}: {next(iter(setting))}="):
        load_dit(base, lora=base.with_name("lora.safetensors"))


def test_a_base_that_is_wrong_is_named_before_the_adapter(base, matrices):
    save_file(peft(matrices), base.with_name("lora.safetensors"))
    with pytest.raises(ValueError, match="a LoRA: give it as lora=, with its base model"):
        load_dit(base.with_name("lora.safetensors"), lora=base.with_name("lora.safetensors"))
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_dit(base, lora=base.with_name("absent.pt"))
