"""Where an adapter's scale is from, adapters in kohya's names, and differences: against the formula written out."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.checkpoints.convert import convert
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.checkpoints.lora import open_lora
from dsa_engine.checkpoints.tensor_io import read_tensors
from dsa_engine.checkpoints.wan import load_dit

RANK = 4
Q = "blocks.0.self_attn.q"
FFN = "blocks.1.ffn.0"
DIFFUSERS = {"transformer.r": RANK, "transformer.lora_alpha": 16}


@pytest.fixture
def weights(tiny_dit):
    return {name: tensor.clone() for name, tensor in tiny_dit.state_dict().items()}


@pytest.fixture
def base(tmp_path, weights, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    save_file(weights, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def pairs(weights):
    return {
        name: (torch.randn(RANK, weights[f"{name}.weight"].shape[1]), torch.randn(len(weights[f"{name}.weight"]), RANK))
        for name in (Q, FFN)
    }


def tensors(pairs, start="transformer.", **alphas) -> dict:
    named = {f"{start}{name}.lora_A.weight": a for name, (a, _) in pairs.items()}
    named |= {f"{start}{name}.lora_B.weight": b for name, (_, b) in pairs.items()}
    return named | {f"{start}{name}.alpha": torch.tensor(value) for name, value in alphas.items()}


def assert_scales(base, lora, weights, pairs, scales, close, **options):
    """scales: of Q and FFN, or one for both."""
    loaded = load_dit(base, lora=lora, **options).state_dict()
    for i, (name, (a, b)) in enumerate(pairs.items()):
        scale = scales[i] if isinstance(scales, tuple) else scales
        wanted = weights[f"{name}.weight"].double() + scale * (b.double() @ a.double())
        close(loaded[f"{name}.weight"], wanted.float(), 1e-6)


HEADERS = [
    ({"lora_adapter_metadata": json.dumps(DIFFUSERS)}, 4.0, "its header's lora_alpha"),
    ({"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 16})}, 4.0, "its header's lora_alpha"),
    ({"transformer.lora_alpha": "16", "transformer.r": "4"}, 4.0, "its header's lora_alpha"),
    ({"lora_alpha": "16"}, 4.0, "its header's lora_alpha"),
    ({"alpha": "16", "rank": "4"}, 4.0, "its header's alpha"),
    ({"ss_network_alpha": "16.0", "ss_network_dim": "4"}, 4.0, "its header's ss_network_alpha"),
    ({"ss_network_alpha": "2", "ss_network_dim": "4"}, 0.5, "its header's ss_network_alpha"),
    ({"ss_network_alpha": "0.0", "ss_network_dim": "4"}, 1.0, "nothing gives an alpha, so it is r"),  # kohya: 0 is r
    ({"ss_network_alpha": "None", "ss_network_dim": "4"}, 1.0, "nothing gives an alpha, so it is r"),
    ({"lora_adapter_metadata": json.dumps(DIFFUSERS | {"transformer.use_rslora": True})}, 8.0, "rsLoRA"),
    ({"lora_alpha": "16", "use_rslora": "True"}, 8.0, "rsLoRA"),
    ({"lora_alpha": "16", "use_rslora": "False"}, 4.0, "its header's lora_alpha"),
    ({"ss_network_alpha": "16", "ss_network_args": json.dumps({"rs_lora": "True"})}, 8.0, "rsLoRA"),
    ({"format": "pt"}, 1.0, "nothing gives an alpha, so it is r"),
]


@pytest.mark.parametrize("header, scale, source", HEADERS)
def test_the_headers_alpha_is_taken_and_told(base, weights, pairs, close, header, scale, source):
    lora = base.with_name("style.safetensors")
    save_file(tensors(pairs), lora, header)
    assert_scales(base, lora, weights, pairs, scale, close)
    found = inspect(lora).lora
    assert found["scales"] == [scale] and source in found["scale_source"]


def test_what_convert_writes_has_the_scale_of_the_header(base, weights, pairs, close):
    lora, target = base.with_name("style.safetensors"), base.parent / "merged"
    save_file(tensors(pairs), lora, {"lora_adapter_metadata": json.dumps(DIFFUSERS)})
    convert(base, target, dtype=torch.float32, lora=lora, lora_strength=0.5)
    a, b = pairs[Q]
    close(read_tensors(target / "model.safetensors")[f"generator.{Q}.weight"], weights[f"{Q}.weight"] + 2 * b @ a, 1e-5)


@pytest.mark.parametrize(
    "argument, own, header, config, name, scales",
    [
        (2, {Q: 8.0}, 16, 32, "adapter_model", 0.5),
        (None, {Q: 8.0}, 16, 32, "adapter_model", (2.0, 4.0)),
        (None, {Q: 8.0, FFN: 12.0}, 16, 32, "style", (2.0, 3.0)),
        (None, {}, 16, 32, "adapter_model", 4.0),
        (None, {}, None, 32, "adapter_model", 8.0),
        (None, {Q: 8.0}, None, 32, "adapter_model", (2.0, 8.0)),
        (None, {}, 16, 32, "style", 4.0),  # the config beside it may be of another adapter
        (None, {}, None, 32, "style", 8.0),
        (None, {}, None, None, "style", 1.0),
    ],
)
def test_the_order_of_the_sources(base, weights, pairs, close, argument, own, header, config, name, scales):
    lora = base.with_name(f"{name}.safetensors")
    save_file(tensors(pairs, **own), lora, None if header is None else {"lora_alpha": str(header)})
    if config is not None:
        lora.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": config}))
    assert_scales(base, open_lora(lora, alpha=argument), weights, pairs, scales, close)


@pytest.mark.parametrize(
    "own, header, config, words",
    [
        (
            {},
            {"lora_alpha": "16"},
            {"lora_alpha": 32},
            "its header's lora_alpha=16 and adapter_config.json's lora_alpha=32",
        ),
        ({Q: 8.0}, {"lora_alpha": "16"}, {}, "such as 8, and its header's lora_alpha=16: their own is taken"),
        ({}, {"lora_alpha": "16", "r": "8"}, {}, "r=8 is said of matrices of r=4: theirs is taken"),
        ({}, {"lora_alpha": "16", "use_rslora": "True"}, {"use_rslora": False}, "use_rslora=True"),
    ],
)
def test_sources_that_disagree_are_told(base, pairs, caplog, own, header, config, words):
    lora = base.with_name("adapter_model.safetensors")
    save_file(tensors(pairs, **own), lora, header)
    lora.with_name("adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        open_lora(lora)
    assert words in caplog.text and str(lora) in caplog.text and words in inspect(lora).note


def test_sources_that_agree_say_nothing(base, pairs, caplog):
    lora = base.with_name("adapter_model.safetensors")
    save_file(tensors(pairs, **{Q: 16.0, FFN: 16.0}), lora, {"ss_network_alpha": "16", "ss_network_dim": "4"})
    lora.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 16}))
    open_lora(lora)
    assert not caplog.records


@pytest.mark.parametrize(
    "header, words",
    [
        ({"use_dora": "true"}, "use_dora='true'"),
        ({"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}, "use_dora=True"),
        ({"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"q": 8}})}, "alpha_pattern="),
        (
            {"lora_adapter_metadata": json.dumps({"transformer.init_lora_weights": "pissa"})},
            "init_lora_weights='pissa'",
        ),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata: not valid JSON"),
        ({"lora_alpha": "nan"}, "lora_alpha='nan': must be finite"),
        ({"lora_alpha": "much"}, "lora_alpha='much': must be a number"),
    ],
)
def test_what_a_header_says_and_cannot_be_honoured_is_refused(base, pairs, header, words):
    lora = base.with_name("style.safetensors")
    save_file(tensors(pairs), lora, header)
    with pytest.raises(ValueError, match="style.safetensors") as error:
        load_dit(base, lora=lora)
    assert words in str(error.value)


def test_settings_that_are_off_are_no_reason_to_refuse(base, weights, pairs, close):
    said = {"transformer.use_dora": False, "transformer.alpha_pattern": {}, "transformer.init_lora_weights": True}
    lora = base.with_name("style.safetensors")
    save_file(tensors(pairs), lora, {"lora_adapter_metadata": json.dumps(DIFFUSERS | said), "use_dora": "False"})
    assert_scales(base, lora, weights, pairs, 4.0, close)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_alpha_or_strength_that_is_not_finite_is_refused(base, pairs, value):
    lora = base.with_name("style.safetensors")
    save_file(tensors(pairs, **{Q: value}), lora)
    with pytest.raises(ValueError, match="an alpha of"):
        open_lora(lora)
    save_file(tensors(pairs), lora)
    with pytest.raises(ValueError, match="lora_strength=.*must be finite"):
        load_dit(base, lora=lora, lora_strength=value)
    with pytest.raises(ValueError, match="alpha=.*must be finite"):
        open_lora(lora, alpha=value)


def test_strength_times_the_scale(base, weights, pairs, close):
    lora = base.with_name("style.safetensors")
    save_file(tensors(pairs), lora, {"alpha": "16"})
    assert_scales(base, lora, weights, pairs, 2.0, close, lora_strength=0.5)
    assert_scales(base, open_lora(lora, strength=3), weights, pairs, 2.0, close, lora_strength=0.5)
    with pytest.raises(ValueError, match="lora_strength=0.5: there is no adapter"):
        load_dit(base, lora_strength=0.5)


KOHYA = {
    "wan": ("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_ffn_0"),
    "double underscore": ("lora_unet__blocks_0_self_attn_q", "lora_unet__blocks_1_ffn_0"),
    "lycoris": ("lycoris_blocks_0_self_attn_q", "lycoris_blocks_1_ffn_0"),
    "diffusers": ("lora_unet_blocks_0_attn1_to_q", "lora_unet_blocks_1_ffn_net_0_proj"),
}


@pytest.mark.parametrize("names", KOHYA.values(), ids=KOHYA)
def test_kohyas_names_are_translated(base, weights, pairs, close, names):
    stored = {}
    for name, (a, b) in zip(names, pairs.values()):
        stored |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(2.0)}
    save_file(stored, base.with_name("kohya.safetensors"))
    assert_scales(base, base.with_name("kohya.safetensors"), weights, pairs, 0.5, close)


def test_every_linear_layer_has_kohyas_name(weights):
    from dsa_engine.checkpoints.key_maps import undotted_to_wan

    for name in weights:
        module = name.removesuffix(".weight").removesuffix(".bias")
        assert undotted_to_wan("lora_unet_" + module.replace(".", "_")) == module


def test_differences_are_added_beside_pairs(base, weights, pairs, close):
    start = "diffusion_model."
    added = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        f"{Q}.diff_b": f"{Q}.bias",
        "blocks.2.diff_m": "blocks.2.modulation",
        "head.modulation.diff": "head.modulation",
        f"{FFN}.diff": f"{FFN}.weight",
    }
    stored = tensors(pairs, start) | {
        start + name: torch.randn(weights[target].shape) for name, target in added.items()
    }
    save_file(stored, base.with_name("lora.safetensors"), {"alpha": "8"})
    loaded = load_dit(base, lora=base.with_name("lora.safetensors"), lora_strength=0.5).state_dict()
    wanted = dict(weights)
    for name, (a, b) in pairs.items():
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + 0.5 * 2 * (b @ a)
    for name, target in added.items():
        wanted[target] = wanted[target] + 0.5 * stored[start + name]
    for name, tensor in wanted.items():
        close(loaded[name], tensor, 1e-5)
    assert inspect(base.with_name("lora.safetensors")).lora["added"] == len(added)


def test_a_file_of_differences_alone_is_merged(base, weights, close):
    change = torch.randn(weights[f"{Q}.weight"].shape)
    save_file({f"diffusion_model.{Q}.diff": change}, base.with_name("diff.safetensors"))
    loaded = load_dit(base, lora=base.with_name("diff.safetensors")).state_dict()
    close(loaded[f"{Q}.weight"], weights[f"{Q}.weight"] + change, 1e-6)
    save_file({f"diffusion_model.{Q}.diff": change[:3].clone()}, base.with_name("diff.safetensors"))
    with pytest.raises(ValueError, match="made for another model"):
        load_dit(base, lora=base.with_name("diff.safetensors"))


@pytest.mark.parametrize(
    "parts, kind",
    [
        (("lokr_w1", "lokr_w2"), "a LoKr adapter"),
        (("hada_w1_a", "hada_w1_b"), "a LoHa adapter"),
        (("oft_blocks",), "OFT"),
    ],
)
@pytest.mark.parametrize("start", ["diffusion_model.blocks.0.self_attn.q.", "lycoris_blocks_0_self_attn_q."])
def test_other_adapters_are_told_as_what_they_are(base, parts, kind, start):
    path = base.with_name("other.safetensors")
    save_file({start + part: torch.zeros(4, 4) for part in parts}, path)
    assert kind in inspect(path).kind
    for call in (lambda: load_dit(base, lora=path), lambda: load_dit(path)):
        with pytest.raises(ValueError, match=f"{kind}.*only plain LoRA is merged"):
            call()


def test_a_folder_of_pefts(base, weights, pairs, close):
    folder = base.parent / "adapter"
    folder.mkdir()
    save_file(tensors(pairs, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK, "peft_type": "LORA"}))
    (folder / "._adapter_model.safetensors").write_bytes(b"\0" * 8)
    assert_scales(base, folder, weights, pairs, 4.0, close)
