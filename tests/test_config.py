"""Model and rollout configurations: Wan's published sizes, names and shapes, and what is said about bad values."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig
from dsa_engine.models.dit import CausalDiT

WAN_1_3B = json.loads("""{
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
    "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
    "text_len": 512
}""")
SMALL = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1}
COUNTS = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "text_len")


def published_shapes(dim: int, ffn: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Wan 2.1 text-to-video checkpoint, as its files list them."""
    linears = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (64, dim),
    }
    shapes = {"patch_embedding.weight": (dim, 16, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes["head.modulation"] = (1, 2, dim)
    for block in (f"blocks.{i}" for i in range(layers)):
        shapes[f"{block}.modulation"] = (1, 6, dim)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (dim,)
        linears |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
        for attn in (f"{block}.self_attn", f"{block}.cross_attn"):
            shapes[f"{attn}.norm_q.weight"] = shapes[f"{attn}.norm_k.weight"] = (dim,)
            linears |= {f"{attn}.{letter}": (dim, dim) for letter in "qkvo"}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def meta_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CausalDiT(config).state_dict().items()}


def count(shapes) -> int:
    return sum(torch.Size(s).numel() for s in shapes.values())


def test_the_1_3b_preset_has_the_published_names_shapes_and_size():
    shapes = meta_shapes(ModelConfig.preset("wan2.1-t2v-1.3b"))
    assert shapes == published_shapes(1536, 8960, 30)
    assert (len(shapes), count(shapes)) == (825, 1_418_996_800)


def test_the_14b_preset_has_the_published_names_and_shapes():
    shapes = meta_shapes(ModelConfig.preset("wan2.1-t2v-14b"))
    assert shapes == published_shapes(5120, 13824, 40)
    assert 14.0e9 < count(shapes) < 14.5e9


def test_the_published_config_reads_as_the_preset():
    assert ModelConfig.from_dict(WAN_1_3B) == PRESETS["wan2.1-t2v-1.3b"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_config_survives_json(name):
    values = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert ModelConfig.from_dict(values) == PRESETS[name]


def test_a_rollout_config_survives_json():
    config = RolloutConfig(
        chunk_frames=2,
        window=12,
        sink=3,
        steps=(1000.0, 500.0),
        shift=8.0,
        commit="exit_step",
        threshold=0.5,
        presets={"fast": 0.3},
    )
    assert RolloutConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RolloutConfig.from_dict({}) == RolloutConfig()


@pytest.mark.parametrize("config", [PRESETS["shapes"], RolloutConfig()])
def test_configs_are_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)


def test_tokens_of_a_480p_latent_frame():
    assert PRESETS["wan2.1-t2v-1.3b"].tokens_per_frame(60, 104) == 1560
    assert PRESETS["shapes"].tokens_per_frame(8, 8) == 16


# Each: bad values, then what the message must hold: the value, the rule, the nearest legal value.
@pytest.mark.parametrize(
    "changes, words",
    [
        *[({name: bad}, (f"{name}={bad}", "at least 1")) for name in COUNTS for bad in (0, -3)],
        ({"dim": 49}, ("dim=49", "even", "nearest is dim=48")),
        ({"dim": 14}, ("dim=14", "even", "nearest is dim=16")),
        ({"dim": 8}, ("dim=8", "at least 6", "nearest is dim=12")),
        ({"dim": 48.0}, ("dim=48.0", "whole number", "nearest is 48")),
        ({"eps": -1.0}, ("eps=-1.0", "above 0", "1e-06")),
        ({"rope_theta": 0}, ("rope_theta=0", "above 0", "10000")),
        ({"freq_dim": 63}, ("freq_dim=63", "even", "nearest is 64")),
        ({"patch_size": (1, 2, 3)}, ("patch_size=(1, 2, 3)", "(1, p, p)", "(1, 2, 2)")),
        ({"patch_size": (2, 2, 2)}, ("patch_size=(2, 2, 2)", "(1, p, p)", "(1, 2, 2)")),
        ({"patch_size": (2, 2)}, ("patch_size=(2, 2)", "(1, p, p)", "(1, 2, 2)")),
    ],
)
def test_bad_model_values_are_named(changes, words):
    raises_naming(words, lambda: ModelConfig(**SMALL | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chunk_frames": 0}, ("chunk_frames=0", "at least 1")),
        ({"sink": -1}, ("sink=-1", "at least 0", "nearest is 0")),
        ({"window": 2}, ("window=2", "sink (0)", "chunk (3)", "nearest legal value is 3")),
        ({"window": 6, "sink": 4}, ("window=6", "sink (4)", "chunk (3)", "nearest legal value is 7")),
        ({"chunk_frames": 1.5}, ("chunk_frames=1.5", "whole number", "nearest is 2")),
        ({"presets": {"fast": 2}}, ("fast=2", "within [0, 1]", "nearest is 1.0")),
        ({"commit": "later"}, ("commit='later'", "clean, exit_step")),
        ({"threshold": 1.5}, ("threshold=1.5", "within [0, 1]", "nearest is 1.0")),
        ({"threshold": -0.1}, ("threshold=-0.1", "within [0, 1]", "nearest is 0.0")),
    ],
)
def test_bad_rollout_values_are_named(changes, words):
    raises_naming(words, lambda: RolloutConfig(**changes))


def test_the_smallest_legal_values_are_accepted():
    assert ModelConfig(dim=6, ffn_dim=1, num_heads=1, num_layers=1).head_dim == 6
    assert RolloutConfig(chunk_frames=1, window=1, threshold=0.0).window == 1
    assert RolloutConfig(chunk_frames=3, window=7, sink=4, threshold=1.0).window == 7


@pytest.mark.parametrize(
    "height, width, nearest", [(61, 104, "60x104"), (60, 103, "60x104"), (0, 8, "2x8"), (1, 1, "2x2")]
)
def test_a_latent_size_off_the_patch_grid_is_named(height, width, nearest):
    words = (f"{height}x{width}", "multiples of the patch 2", f"nearest is {nearest}")
    raises_naming(words, lambda: PRESETS["shapes"].tokens_per_frame(height, width))


def test_an_unknown_preset_names_the_known_ones():
    raises_naming(("'wan3'", *PRESETS), lambda: ModelConfig.preset("wan3"))


@pytest.mark.parametrize(
    "values, words",
    [
        (WAN_1_3B | {"model_type": "i2v"}, ("model_type='i2v'", "'t2v'")),
        (WAN_1_3B | {"qk_norm": False}, ("qk_norm=False", "qk_norm=true")),
        (WAN_1_3B | {"cross_attn_norm": False}, ("cross_attn_norm=False", "cross_attn_norm=true")),
        ({"dim": 1536, "num_heads": 12}, ("ffn_dim, num_layers", "config.json")),
        ({}, ("dim, ffn_dim, num_heads, num_layers",)),
    ],
)
def test_a_config_json_of_another_model_is_refused(values, words):
    raises_naming(words, lambda: ModelConfig.from_dict(values))


def test_config_keys_without_a_meaning_are_logged_not_swallowed(caplog):
    assert ModelConfig.from_dict(WAN_1_3B | {"window_size": [-1, -1], "guidance": 5}) == PRESETS["wan2.1-t2v-1.3b"]
    assert "guidance" in caplog.text and "window_size" not in caplog.text


def test_an_unknown_rollout_key_names_the_known_ones():
    raises_naming(("windwo", "window", "chunk_frames"), lambda: RolloutConfig.from_dict({"windwo": 12}))


def raises_naming(words, call) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        call()
    assert [w for w in words if w not in str(error.value)] == []
