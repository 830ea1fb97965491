"""How public checkpoints of the Wan family name their weights: data, and the one function that renames.

Sources: Wan 2.1 `wan/modules/{model,t5,vae}.py`; diffusers `scripts/convert_wan_to_diffusers.py`; FastVideo
`fastvideo/configs/models/dits/wanvideo.py`; transformers `models/umt5`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Words that training wrappers insert anywhere into a name, and words that may precede it, several in a row.
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
PREFIXES = frozenset(
    {"model", "diffusion_model", "generator", "net", "transformer", "base_model", "text_encoders", "umt5xxl"}
)


@dataclass(frozen=True)
class KeyMap:
    """One way to name the weights: Wan's module or parameter -> the other's, within a block and outside of one.

    blocks: prefix of a block's names, before its index.
    """

    name: str
    outside: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)
    blocks: str = "blocks."


_ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
WAN_KEYS = KeyMap("wan")
DIFFUSERS_KEYS = KeyMap(
    "diffusers",
    {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    },
    {
        "modulation": "scale_shift_table",
        **{f"{ours}.{x}": f"{theirs}.to_{x}" for ours, theirs in _ATTENTIONS for x in "qkv"},
        "self_attn.o": "attn1.to_out.0",
        "cross_attn.o": "attn2.to_out.0",
        **{f"{ours}.norm_{x}": f"{theirs}.norm_{x}" for ours, theirs in _ATTENTIONS for x in "qk"},
        "norm3": "norm2",  # diffusers counts the norms in the order of their use
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    },
)
FASTVIDEO_KEYS = KeyMap(
    "fastvideo",
    {
        "patch_embedding": "patch_embedding.proj",
        "time_embedding.0": "condition_embedder.time_embedder.mlp.fc_in",
        "time_embedding.2": "condition_embedder.time_embedder.mlp.fc_out",
        "text_embedding.0": "condition_embedder.text_embedder.fc_in",
        "text_embedding.2": "condition_embedder.text_embedder.fc_out",
        "time_projection.1": "condition_embedder.time_modulation.linear",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    },
    {
        "modulation": "scale_shift_table",
        **{f"self_attn.{x}": f"to_{x}" for x in "qkv"},
        **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
        "self_attn.o": "to_out",
        "cross_attn.o": "attn2.to_out",
        **{f"self_attn.norm_{x}": f"norm_{x}" for x in "qk"},
        **{f"cross_attn.norm_{x}": f"attn2.norm_{x}" for x in "qk"},
        "norm3": "self_attn_residual_norm.norm",
        "ffn.0": "ffn.fc_in",
        "ffn.2": "ffn.fc_out",
    },
)
DIT_KEY_MAPS = (WAN_KEYS, DIFFUSERS_KEYS, FASTVIDEO_KEYS)

# Wan's umT5 -> transformers' UMT5EncoderModel, which is the one that is run here.
UMT5_KEYS = KeyMap(
    "transformers",
    {"token_embedding": "shared", "norm": "encoder.final_layer_norm"},
    {
        "norm1": "layer.0.layer_norm",
        **{f"attn.{x}": f"layer.0.SelfAttention.{x}" for x in "qkvo"},
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    },
    blocks="encoder.block.",
)

# Where a layer of the Wan VAE is, and what its parts are called; diffusers counts the decoder's layers by level.
_VAE_LAYERS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{wan}": f"{half}.{diffusers}"
        for half in ("encoder", "decoder")
        for wan, diffusers in (
            ("conv1", "conv_in"),
            ("middle.0", "mid_block.resnets.0"),
            ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
            ("head.0", "norm_out"),
            ("head.2", "conv_out"),
        )
    },
    **{f"encoder.downsamples.{i}": f"encoder.down_blocks.{i}" for i in range(11)},
    **{f"decoder.upsamples.{4 * i + j}": f"decoder.up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)},
    **{f"decoder.upsamples.{4 * i + 3}": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(3)},
}
_VAE_PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
VAE_KEYS = KeyMap(
    "diffusers",
    _VAE_LAYERS | {f"{a}.{part}": f"{b}.{other}" for a, b in _VAE_LAYERS.items() for part, other in _VAE_PARTS.items()},
)

# Quantized weights: endings of the name of a weight's scale, and names of tensors that are ignored.
SCALES = ("weight_scale", "scale_weight")
IGNORED = re.compile(r"(^|\.)(scaled_fp8|spiece_model|scale_input|input_scale|comfy_quant)$")

DIT, IMAGE_DIT, TEXT, LORA = "a DiT", "a DiT with image or control inputs", "a umT5 text encoder", "a LoRA"
WAN22_PAIR = "a Wan 2.2 model of two DiTs, one for the steps of high noise and one for those of low"
WAN22_DIT = "a DiT for the 48 latent channels of Wan 2.2's VAE"
WAN22_VAE = "the Wan 2.2 VAE of 48 latent channels"
LOKR, LOHA, OFT = "a LoKr adapter", "a LoHa adapter", "an OFT adapter"
HEAD, ENGINE, PROMPTS = "a confidence head", "a whole model in this project's format", "encoded prompts"
WAN_VAE, DIFFUSERS_VAE = "the Wan 2.1 VAE", "the Wan 2.1 VAE under diffusers' names"
TAEHV = "a tiny VAE (TAEHV)"
VAES = (WAN_VAE, DIFFUSERS_VAE, TAEHV)
# (pattern of a stripped name that no kind below it has, what the file holds), tried in this order
FILE_KINDS = (
    (r"\.lora_(A|B|down|up)(\.|$)", LORA),
    (r"\.lokr_(w1|w2|t2)", LOKR),
    (r"\.hada_(w1|w2|t1|t2)", LOHA),
    (r"\.(oft_blocks|oft_diag|oft_R)(\.|$)", OFT),
    (r"\.diff(_b|_m)?$", LORA),
    (r"^(confidence|codec|text)\.", ENGINE),
    (r"^(img_emb|vace_blocks|condition_embedder\.image_embedder)\.|\.(k_img|add_k_proj)\.", IMAGE_DIT),
    (r"^blocks\.\d+\.(self_attn|attn1|to_q|modulation|scale_shift_table)\b", DIT),
    (r"^(token_embedding|shared|encoder\.embed_tokens)\.weight$", TEXT),
    (r"^decoder\.upsamples\.0\.upsamples\.|^encoder\.down_blocks\.0\.resnets\.", WAN22_VAE),
    (r"^decoder\.upsamples\.0\.residual\.0\.gamma$", WAN_VAE),
    (r"^decoder\.up_blocks\.0\.resnets\.0\.norm1\.gamma$", DIFFUSERS_VAE),
    (r"^decoder\.\d+\.conv\.0\.weight$", TAEHV),
    (r"^(mlp\.2\.weight|token)$", HEAD),
    (r"^prompt_embeds$", PROMPTS),
)
RUNNABLE = "run are text-to-video models of one DiT with 16 latent channels in and out, such as Wan 2.1's"
# How a file of each kind is put to use.
USAGE_HINTS = {
    LORA: "give it as lora=, with its base model",
    HEAD: "give it as head=, with its model",
    ENGINE: "Pipeline.from_pretrained takes its folder",
    TEXT: "give it as text=",
    PROMPTS: "give it as text=",
    **dict.fromkeys(VAES, "give it as vae="),
    IMAGE_DIT: "only text-to-video models can be run",
    WAN22_PAIR: RUNNABLE,
    WAN22_DIT: RUNNABLE,
    WAN22_VAE: "only Wan 2.1's, of 16 latent channels, and its tiny ones can be run",
    **dict.fromkeys((LOKR, LOHA, OFT), "only plain LoRA is merged; the tool that trained it can merge it"),
}

# Prefixes of the parts of ComfyUI's all-in-one files.
PARTS = {
    DIT: ("model.diffusion_model.",),
    WAN_VAE: ("first_stage_model.", "vae."),
    TEXT: ("text_encoders.", "cond_stage_model."),
}

# Where a folder of Wan's or diffusers' layout has its other components.
COMPONENT_PATHS = {
    "vae": ("vae", "Wan2.1_VAE.pth"),
    "text": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": ("tokenizer", "google/umt5-xxl"),
}

# diffusers' config.json -> `ModelConfig`; dim is num_attention_heads * attention_head_dim.
CONFIG_KEYS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    **{key: key for key in ("num_layers", "ffn_dim", "text_dim", "text_len", "freq_dim", "eps", "patch_size")},
}
# Its other keys: those that must have this value, and those without effect.
CONFIG_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
}
CONFIG_IGNORED = frozenset({"rope_max_seq_len", "pos_embed_seq_len"})


def strip_wrappers(name: str) -> str:
    """A name without training wrappers and prefixes: `model._fsdp_wrapped_module.head.head.bias` -> head.head.bias."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] in PREFIXES:
        del words[0]
    return ".".join(words)


def _inverse(*key_maps: KeyMap) -> KeyMap:
    """From any of these namings back to Wan's."""
    return KeyMap(
        "wan",
        {theirs: ours for key_map in key_maps for ours, theirs in key_map.outside.items()},
        {theirs: ours for key_map in key_maps for ours, theirs in key_map.block.items()},
    )


_DIT_TO_WAN, _VAE_TO_WAN = _inverse(*DIT_KEY_MAPS), _inverse(VAE_KEYS)


def to_wan(name: str, inverse: KeyMap = _DIT_TO_WAN) -> str:
    """Wan's name of a DiT's weight in any of `DIT_KEY_MAPS`; an unknown name stays, without its prefixes."""
    return rename(strip_wrappers(name), inverse)


# Modules by their dotted names with underscores instead, as kohya's trainers write them.
_UNDOTTED = {
    (inside, name.replace(".", "_")): name
    for key_map in DIT_KEY_MAPS
    for inside, table in ((True, key_map.block), (False, key_map.outside))
    for names in (table.items(), [("", "patch_embedding")])
    for pair in names
    for name in pair
    if name
}


def undotted_to_wan(module: str) -> str:
    """Wan's name of kohya's `lora_unet_blocks_0_self_attn_q`: blocks.0.self_attn.q; any other name stays."""
    match = re.fullmatch(r"(?:lora_unet|lora_transformer|lycoris)_+(blocks_(\d+)_)?(.+)", module)
    name = match and _UNDOTTED.get((bool(match[1]), match[3]))
    if not match or not name:
        return module
    return to_wan(f"blocks.{match[2]}.{name}" if match[1] else name)


def rename(name: str, key_map: KeyMap) -> str:
    """A weight's name through a map: the longest beginning that it knows is replaced, the rest is kept."""
    match = re.fullmatch(r"blocks\.(\d+\.)(.+)", name)
    start, rest, table = (key_map.blocks + match[1], match[2], key_map.block) if match else ("", name, key_map.outside)
    words = rest.split(".")
    for end in range(len(words), 0, -1):
        module = ".".join(words[:end])
        if module in table:
            return start + ".".join((table[module], *words[end:]))
    return start + rest


def wan_names(tensors: Mapping[str, T], inverse: KeyMap = _DIT_TO_WAN) -> dict[str, T]:
    """The same tensors under Wan's own names: wrappers and prefixes stripped, other namings translated."""
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        name = to_wan(name, inverse)
        if name in named:
            raise ValueError(f"two tensors of the file are both called {name!r} in Wan's names, without prefixes")
        named[name] = tensor
    return named


def wan_vae_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """`wan_names` of a Wan VAE's tensors, in Wan's or diffusers' names."""
    return wan_names(tensors, _VAE_TO_WAN)


def dialect_of(names: Iterable[str]) -> str | None:
    """Which of `DIT_KEY_MAPS` a DiT's names are in, by its self-attention; None where there is none."""
    names = [strip_wrappers(name) for name in names]
    for key_map in DIT_KEY_MAPS:
        query = re.compile(rf"blocks\.\d+\.{re.escape(key_map.block.get('self_attn.q', 'self_attn.q'))}\.")
        if any(query.match(name) for name in names):
            return key_map.name
    return None


def kind_of(names: Iterable[str]) -> str | None:
    """What the file with these names holds, as `FILE_KINDS` says it; None for something unknown."""
    names = [strip_wrappers(name) for name in names]
    return next((kind for pattern, kind in FILE_KINDS if any(re.search(pattern, name) for name in names)), None)


def part_prefixes(names: Iterable[str], part: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For `TensorFile.part`: (prefixes of a part's names, prefixes of the others') where a file holds several of PARTS.

    Of any other file all is the part's.
    """
    names = list(names)
    held = {kind: prefixes for kind, prefixes in PARTS.items() if any(name.startswith(prefixes) for name in names)}
    if len(held) < 2 or part not in held:
        return ("",), ()
    return held.pop(part), tuple(prefix for prefixes in held.values() for prefix in prefixes)


def check_kind(kind: str | None, names: Iterable[str], source: str | Path, *expected: str, detail: str = "") -> None:
    """Raises ValueError that says what a file holds and how it is put to use, unless it is one of `expected`.

    detail: what else is known of it.
    """
    if kind in expected:
        return
    if kind is None:
        held = f"no model that is known here (its first names: {', '.join(list(names)[:3])})"
    else:
        held = kind + (f" ({detail})" if detail else "") + (f": {USAGE_HINTS[kind]}" if kind in USAGE_HINTS else "")
    raise ValueError(f"{source}: holds {held}; expected {' or '.join(expected)}")


def from_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' `config.json` in Wan's terms, as `ModelConfig.from_dict` reads it.

    Raises ValueError for a missing size, and for a value that makes it a model which is not Wan's text-to-video.
    """
    sizes = ("num_attention_heads", "attention_head_dim")
    if lacking := [key for key in sizes if not isinstance(values.get(key), int)]:
        raise ValueError(f"the transformer's config lacks {', '.join(lacking)}")
    for key, required in CONFIG_FIXED.items():
        if values.get(key, required) != required:
            raise ValueError(f"{key}={values[key]!r}: only text-to-video models with {key}={required!r} can be run")
    known = {CONFIG_KEYS[key]: value for key, value in values.items() if key in CONFIG_KEYS and value is not None}
    handled = {*CONFIG_KEYS, *CONFIG_FIXED, *CONFIG_IGNORED, *sizes}
    rest = {key: value for key, value in values.items() if key not in handled}
    return {**rest, **known, "dim": values["num_attention_heads"] * values["attention_head_dim"]}
