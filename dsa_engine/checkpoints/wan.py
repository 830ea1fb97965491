"""Checkpoints of the Wan family: load them strictly, whatever dialect they are in, and one tensor after the other.

Read are `.safetensors` (whole or in shards) and `.pt`/`.pth` (tensors only, `weights_only=True`), Self-Forcing's
training dictionaries, names inside FSDP and compile wrappers, those of Wan, diffusers, FastVideo and ComfyUI, FP8
weights with their scales, and low-rank adapters. `names.py` holds all names as data, `found.py` tells what a file is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import Found, check_sizes, config_of, look, sizes_of
from dsa_engine.checkpoints.key_maps import wan_names
from dsa_engine.checkpoints.lora import Lora, merge, open_lora
from dsa_engine.checkpoints.tensor_io import Entry, open_tensors
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, by the names that stand in it.

    Raises FileNotFoundError for a missing file and ValueError for one that is truncated, foreign, or holds anything
    but tensors; no code from the file is ever run.
    """
    return {name: entry.read() for name, entry in open_tensors(path).entries.items()}


def dequantised(entries: Mapping[str, Entry], source: str | Path) -> dict[str, Entry]:
    """W = stored * scale for every weight that has a scale beside it, of one value or one for each row, in float32.

    Raises ValueError for a scale without its weight or of another size, and for packed formats (NVFP4, MXFP4).
    """
    scales = {}
    kept = {}
    for name, entry in entries.items():
        stem, _, last = name.rpartition(".")
        if last in key_maps.SCALES:
            scales[f"{stem}.weight"] = entry
        elif not key_maps.IGNORED.search(name):
            kept[name] = entry
    for name, scale in scales.items():
        rows = kept[name].shape[0] if name in kept else None
        if rows is None or prod(scale.shape) not in (1, rows):
            has = "not there" if rows is None else f"of shape {list(kept[name].shape)}"
            raise ValueError(
                f"{source}: a scale of shape {list(scale.shape)} for {name}, which is {has}; expected is one value, or "
                "one for each row"
            )
        kept[name] = Entry(torch.float32, kept[name].shape, partial(_scaled, kept[name], scale))
    packed = [name for name, entry in kept.items() if not entry.dtype.is_floating_point]
    if packed:
        raise ValueError(
            f"{source}: {len(packed)} weights of dtype {kept[packed[0]].dtype} ({', '.join(packed[:4])}); read are "
            "floating-point weights, and FP8 or INT8 with a scale"
        )
    return kept


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a module whose names and shapes must all agree; ValueError says which do not."""
    check_fit(module.state_dict(), tensors, source)
    module.load_state_dict(tensors, assign=any(p.is_meta for p in module.parameters()))


def fill(
    module: nn.Module,
    entries: Mapping[str, Entry],
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """`load_strict` of tensors that are still in their file, each one read, converted and put in place before the next.

    The module may be on the meta device; its parameters become frozen ones of the given device and dtype.
    """
    check_fit(module.state_dict(), entries, source)
    for name, entry in entries.items():
        value = entry.read(device)
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            setattr(place, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
        else:
            setattr(place, leaf, value.to(dtype) if value.is_floating_point() else value)


def check_fit(own: Mapping[str, Any], given: Mapping[str, Any], source: str | Path) -> None:
    """Raises ValueError where the names or shapes of two sets of tensors differ, with the nearest names."""
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if tuple(given[name].shape) != tuple(own[name].shape)
    ]
    if not (missing or unexpected or misshapen):
        return
    shown = [*unexpected]
    for i, name in enumerate(unexpected[:4]):
        if near := difflib.get_close_matches(name, missing, 1, 0.8):
            shown[i] = f"{name} (nearest: {near[0]})"
    parts = (("missing", missing), ("unexpected", shown), ("of another shape", misshapen))
    report = "; ".join(f"{len(n)} {what}: {', '.join(n[:4])}{', ...' if len(n) > 4 else ''}" for what, n in parts if n)
    raise ValueError(f"{source}: does not fit the model's config: {report}")


def open_dit(
    path: str | Path, config: ModelConfig | None = None, family: str | None = None
) -> tuple[Found, ModelConfig, dict[str, Entry]]:
    """(what it is, the sizes, the weights in Wan's names, not yet read) of a checkpoint that must hold a DiT.

    Raises FileNotFoundError, or ValueError that names what the file holds instead, or how its sizes differ.
    """
    found, file = look(Path(path), family)
    if found.kind != key_maps.DIT:
        if found.kind is None:
            held = f"no model that is known here (its first names: {', '.join(list(file.entries)[:3])})"
        else:
            held = f"{found.kind}: {key_maps.USES[found.kind]}"
        raise ValueError(f"{found.weights}: holds {held}; expected {key_maps.DIT}")
    entries = dequantised(wan_names(file.entries), found.weights)
    if config is not None:
        check_sizes(config, sizes_of(entries), found.weights, "the given config")
    return found, config or found.config or config_of(entries, found.weights), entries


def load_dit(
    path: str | Path,
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    family: str | None = None,
    lora: str | Path | Lora | None = None,
) -> CausalDiT:
    """A causal DiT from a checkpoint file, an index of shards, or a folder of Wan's or diffusers' layout.

    config: its sizes; else those of a config.json beside the weights, else those that the tensors show.
    family: as in `inspect`; lora: an adapter to merge, its file or what `open_lora` makes of it.
    """
    found, config, entries = open_dit(path, config, family)
    return build_dit(config, entries, found.weights, device, dtype, lora)


def build_dit(
    config: ModelConfig,
    entries: Mapping[str, Entry],
    source: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    lora: str | Path | Lora | None = None,
) -> CausalDiT:
    """The model of `open_dit`'s sizes and weights, with an adapter merged, on its device."""
    with torch.device("meta"):
        model = CausalDiT(config)
    check_fit(model.state_dict(), entries, source)  # a bad base is named before a bad adapter
    if lora is not None:
        entries = merge(entries, lora if isinstance(lora, Lora) else open_lora(lora))
    fill(model, entries, source, device, dtype)
    return model.eval()


def _scaled(weight: Entry, scale: Entry, device: Any = "cpu") -> Tensor:
    rows = scale.read(device).float().reshape(-1, *[1] * (len(weight.shape) - 1))  # [1 or out, 1, ...]
    return weight.read(device).float() * rows
