"""Names in VAE files: which model a file holds, and the two dialects of the Wan VAE. Names are data, not code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAN = "the Wan 2.1 VAE"
DIFFUSERS = "the Wan 2.1 VAE under diffusers' names"
TINY = "a tiny VAE (TAEHV)"

# (pattern of a name that no other kind has, what the file holds)
KINDS = (
    (r"^decoder\.upsamples\.0\.residual\.0\.gamma$", WAN),
    (r"^decoder\.up_blocks\.0\.resnets\.0\.norm1\.gamma$", DIFFUSERS),
    (r"^decoder\.\d+\.conv\.0\.weight$", TINY),
    (r"(^|\.)blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight$", "a DiT"),
    (r"(^|\.)(token_embedding|shared)\.weight$", "a text encoder"),
)
LOADERS = {WAN: "load_vae", DIFFUSERS: "load_vae", TINY: "load_taehv", "a DiT": "load_dit"}

# Wan's module -> diffusers' module: where a layer is ...
PLACES = {
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
    # Wan counts all layers through; diffusers does so in the encoder and counts by level in the decoder.
    **{f"encoder.downsamples.{i}": f"encoder.down_blocks.{i}" for i in range(11)},
    **{f"decoder.upsamples.{4 * i + j}": f"decoder.up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)},
    **{f"decoder.upsamples.{4 * i + 3}": f"decoder.up_blocks.{i}.upsamplers.0" for i in range(3)},
}
# ... and which part of it; parts that are not named here are called the same.
PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def kind_of(names: Iterable[str]) -> str | None:
    """What the file with these names holds, as `KINDS` says it; None when nothing there is known."""
    names = list(names)
    return next((kind for pattern, kind in KINDS if any(re.search(pattern, name) for name in names)), None)


def expect(names: Iterable[str], kinds: tuple[str, ...], path: str | Path) -> str:
    """The kind of a file's names, which must be one of `kinds`; ValueError says what the file holds instead."""
    names = list(names)
    kind = kind_of(names)
    if kind in kinds:
        return kind
    if kind is None:
        held = f"no model that is known here (its first names: {', '.join(names[:3])})"
    else:
        held = kind + (f", which {LOADERS[kind]} reads" if kind in LOADERS else "")
    raise ValueError(f"{path}: holds {held}; expected {' or '.join(kinds)}")


def to_wan(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same entries, from diffusers' names to Wan's; unknown names stay."""
    return _rename(tensors, {v: k for k, v in PLACES.items()}, {v: k for k, v in PARTS.items()})


def to_diffusers(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same entries, from Wan's names to diffusers'; unknown names stay."""
    return _rename(tensors, PLACES, PARTS)


def _rename(tensors: Mapping[str, T], places: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, T]:
    renamed = {_translate(name, places, parts): value for name, value in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("the file holds the same tensors twice, under Wan's and under diffusers' names")
    return renamed


def _translate(name: str, places: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """`name` is place.part.parameter; the part is empty where the place is a single layer."""
    words = name.split(".")
    for end in range(1, len(words)):
        place = ".".join(words[:end])
        if place in places:
            part = ".".join(words[end:-1])
            return ".".join(filter(None, (places[place], parts.get(part, part), words[-1])))
    return name
