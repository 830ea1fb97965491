"""What public checkpoints of the Wan family call things, and how each family is rolled out: data, hardly any code.

Sources of the names: Wan 2.1 `wan/modules/{model,t5}.py`; diffusers `scripts/convert_wan_to_diffusers.py`; FastVideo
`fastvideo/configs/models/dits/wanvideo.py`; transformers `models/umt5`. Of the rollouts: each project's own inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsa_engine.checkpoints import vae_names
from dsa_engine.config import RolloutConfig

T = TypeVar("T")

# Words that training wrappers put anywhere into a name, and words that may stand before it, several in a row.
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})
PREFIXES = frozenset(
    {"model", "diffusion_model", "generator", "net", "transformer", "base_model", "text_encoders", "umt5xxl"}
)


@dataclass(frozen=True)
class Dialect:
    """One way to name the weights: Wan's module or parameter -> the dialect's, within a block and outside of one.

    blocks: what a block's names begin with, before its number.
    """

    name: str
    outside: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)
    blocks: str = "blocks."


_ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
WAN = Dialect("wan")
DIFFUSERS = Dialect(
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
FASTVIDEO = Dialect(
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
DIALECTS = (WAN, DIFFUSERS, FASTVIDEO)

# Wan's umT5 -> transformers' UMT5EncoderModel, which is the one that is run here.
UMT5 = Dialect(
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

# Quantised weights: endings of the name of a weight's scale, and names beside the weights that are of no use here.
SCALES = ("weight_scale", "scale_weight")
IGNORED = re.compile(r"(^|\.)(scaled_fp8|spiece_model|scale_input|input_scale|comfy_quant)$")

DIT, IMAGE_DIT, TEXT, LORA = "a DiT", "a DiT with image or control inputs", "a umT5 text encoder", "a LoRA"
HEAD, ENGINE, PROMPTS = "a confidence head", "a whole model in this project's format", "encoded prompts"
VAES = (vae_names.WAN, vae_names.DIFFUSERS, vae_names.TINY)
# (pattern of a bare name that no kind below it has, what the file holds), asked in this order
KINDS = (
    (r"\.lora_(A|B|down|up)(\.|$)", LORA),
    (r"^(confidence|codec|text)\.", ENGINE),
    (r"^(img_emb|vace_blocks|condition_embedder\.image_embedder)\.|\.(k_img|add_k_proj)\.", IMAGE_DIT),
    (r"^blocks\.\d+\.(self_attn|attn1|to_q|modulation|scale_shift_table)\b", DIT),
    (r"^(token_embedding|shared|encoder\.embed_tokens)\.weight$", TEXT),
    *((pattern, kind) for pattern, kind in vae_names.KINDS if kind in VAES),
    (r"^mlp\.2\.weight$", HEAD),
    (r"^prompt_embeds$", PROMPTS),
)
# How a file of each kind is put to use.
USES = {
    LORA: "give it as lora=, with its base model",
    HEAD: "give it as head=, with its model",
    ENGINE: "Pipeline.from_pretrained takes its folder",
    TEXT: "give it as text=",
    PROMPTS: "give it as text=",
    **dict.fromkeys(VAES, "give it as vae="),
    IMAGE_DIT: "only text-to-video models can be run",
}

# Where a folder of Wan's or diffusers' layout has its other parts.
PLACES = {
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
# What else stands there and changes nothing, or must have this value.
CONFIG_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
}
CONFIG_IGNORED = frozenset({"rope_max_seq_len", "pos_embed_seq_len"})
# Causal Wan's config.json -> `RolloutConfig`; -1 is global attention there.
ROLLOUT_KEYS = {"local_attn_size": "window", "sink_size": "sink", "num_frame_per_block": "chunk_frames"}


@dataclass(frozen=True)
class Family:
    """How the models of one project are rolled out, as its own inference does it.

    keys: the entries of its training dictionaries that it runs, best first. words: in the names of its public files
    and folders, in small letters and digits only. classes: `_class_name` in its configs. note: what to know of it.
    """

    rollout: RolloutConfig
    keys: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    note: str = ""


WARPED = (1000.0, 750.0, 500.0, 250.0)
FAMILIES = {
    "self-forcing": Family(
        RolloutConfig(chunk_frames=3, window=None, sink=0, steps=WARPED, shift=5.0),
        ("generator_ema",),
        ("selfforcing", "sfwan"),
        ("CausalWanTransformer3DModel",),
        "its demo.py warps with shift=8.0 instead",
    ),
    "longlive": Family(
        RolloutConfig(chunk_frames=3, window=12, sink=3, steps=WARPED, shift=5.0),
        ("generator",),
        ("longlive",),
        note="the base needs its LoRA merged: give it as lora=",
    ),
    "causvid": Family(
        RolloutConfig(chunk_frames=3, window=None, sink=0, steps=(1000.0, 757.0, 522.0), shift=1.0),
        ("generator",),
        ("causvid", "autoregressivecheckpoint"),
        note="its steps are the model's timesteps as they are: not warped",
    ),
    "streamdiffusionv2": Family(
        RolloutConfig(chunk_frames=3, window=21, sink=0, steps=WARPED, shift=1.0),
        ("generator",),
        ("streamdiffusion", "wancausaldmdv2v"),
        note="its text-to-video rollout; video to video goes frame by frame (chunk_frames=1, window=6, sink=3)",
    ),
    "krea": Family(
        RolloutConfig(chunk_frames=3, window=6, sink=0, steps=WARPED, shift=5.0),
        words=("krea",),
        note="its server computes the cached frames anew for every chunk; here they stay as they were",
    ),
    "wan": Family(
        RolloutConfig(chunk_frames=21, window=None, sink=0, steps=tuple(float(t) for t in range(1000, 0, -20))),
        words=("wan21t2v",),
        classes=("WanPipeline",),
        note="a base model: made for both directions of time, many steps and guidance, which no rollout here gives it",
    ),
}


def bare(name: str) -> str:
    """A name without training wrappers and prefixes: `model._fsdp_wrapped_module.head.head.bias` -> head.head.bias."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] in PREFIXES:
        del words[0]
    return ".".join(words)


def to_wan(name: str) -> str:
    """Wan's name of a weight that is written in any of `DIALECTS`; one that nobody uses stays, without its prefixes."""
    return _renamed(bare(name), _TO_WAN_OUTSIDE, _TO_WAN_BLOCK, WAN.blocks, WAN.blocks)


def to_dialect(name: str, dialect: Dialect) -> str:
    """The name of a weight in a dialect, from Wan's. What is after the module's name, as in `.weight`, is kept."""
    return _renamed(name, dialect.outside, dialect.block, WAN.blocks, dialect.blocks)


def wan_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under Wan's own names: wrappers and prefixes stripped, the other dialects translated."""
    named: dict[str, T] = {}
    for name, tensor in tensors.items():
        name = to_wan(name)
        if name in named:
            raise ValueError(f"two tensors of the file are both called {name!r} once prefixes are stripped")
        named[name] = tensor
    return named


def dialect_of(names: Iterable[str]) -> str | None:
    """Which of `DIALECTS` a DiT's names are in, by its self-attention; None where there is none."""
    names = [bare(name) for name in names]
    for dialect in DIALECTS:
        query = re.compile(rf"blocks\.\d+\.{re.escape(dialect.block.get('self_attn.q', 'self_attn.q'))}\.")
        if any(query.match(name) for name in names):
            return dialect.name
    return None


def kind_of(names: Iterable[str]) -> str | None:
    """What the file with these names holds, as `KINDS` says it; None when nothing there is known."""
    names = [bare(name) for name in names]
    return next((kind for pattern, kind in KINDS if any(re.search(pattern, name) for name in names)), None)


def family_of(words: Iterable[str], classes: Iterable[str | None]) -> tuple[str | None, str]:
    """(the family, how it was told) from the configs' `_class_name`, else from the names of the file and its folder."""
    for class_name in classes:
        for name, family in FAMILIES.items():
            if class_name in family.classes:
                return name, f"its config says {class_name}"
    for text in words:
        plain = re.sub(r"[^a-z0-9]", "", text.lower())
        for name, family in FAMILIES.items():
            if any(word in plain for word in family.words):
                return name, f"it is called {text}"
    return None, "neither its config nor its name tells"


def from_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' `config.json` in Wan's terms, as `ModelConfig.from_dict` reads it.

    Raises ValueError for a missing size, and for a value that makes it a model which is not Wan's text-to-video.
    """
    sizes = ("num_attention_heads", "attention_head_dim")
    if lacking := [key for key in sizes if not isinstance(values.get(key), int)]:
        raise ValueError(f"the transformer's config lacks {', '.join(lacking)}")
    for key, wanted in CONFIG_FIXED.items():
        if values.get(key, wanted) != wanted:
            raise ValueError(f"{key}={values[key]!r}: only text-to-video models with {key}={wanted!r} can be run")
    known = {CONFIG_KEYS[key]: value for key, value in values.items() if key in CONFIG_KEYS and value is not None}
    passed = {*CONFIG_KEYS, *CONFIG_FIXED, *CONFIG_IGNORED, *sizes}
    rest = {key: value for key, value in values.items() if key not in passed}
    return {**rest, **known, "dim": values["num_attention_heads"] * values["attention_head_dim"]}


def _renamed(name: str, outside: Mapping[str, str], block: Mapping[str, str], old: str, new: str) -> str:
    """The longest beginning of a name that a table knows, replaced."""
    match = re.fullmatch(rf"{re.escape(old)}(\d+\.)(.+)", name)
    start, rest, table = (new + match[1], match[2], block) if match else ("", name, outside)
    words = rest.split(".")
    for end in range(len(words), 0, -1):
        place = ".".join(words[:end])
        if place in table:
            return start + ".".join((table[place], *words[end:]))
    return start + rest


_TO_WAN_OUTSIDE = {theirs: ours for dialect in DIALECTS for ours, theirs in dialect.outside.items()}
_TO_WAN_BLOCK = {theirs: ours for dialect in DIALECTS for ours, theirs in dialect.block.items()}
