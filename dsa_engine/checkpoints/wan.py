"""A causal DiT from a checkpoint of the Wan family, strictly, in any dialect, one tensor after the other.

Read are `.safetensors` (whole or in shards) and `.pt`/`.pth` (tensors only, `weights_only=True`), Self-Forcing's
training dictionaries, names inside FSDP and compile wrappers, those of Wan, diffusers, FastVideo and ComfyUI, FP8
weights with their scales, and low-rank adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import CheckpointInfo, check_sizes, config_of, inspect_and_open, sizes_of
from dsa_engine.checkpoints.lora import Lora, merge, open_lora
from dsa_engine.checkpoints.quantized import dequantize, formats_of
from dsa_engine.checkpoints.tensor_io import LazyTensor
from dsa_engine.checkpoints.weights import check_state_dict, load_weights_streaming
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT


def open_dit(
    path: str | Path, config: ModelConfig | None = None, family: str | None = None
) -> tuple[CheckpointInfo, ModelConfig, dict[str, LazyTensor]]:
    """(what it is, the sizes, the weights in Wan's names, not yet read) of a checkpoint that must hold a DiT.

    Raises FileNotFoundError, or ValueError that names what the file holds instead, or how its sizes differ.
    """
    info, file = inspect_and_open(Path(path), family)
    key_maps.check_kind(info.kind, file.tensors, info.weights, key_maps.DIT, detail=info.note)
    formats = {key_maps.to_wan(f"{layer}.weight"): format for layer, format in formats_of(file).items()}
    weights = dequantize(key_maps.wan_names(file.tensors), info.weights, formats)
    if config is not None:
        check_sizes(config, sizes_of(weights), info.weights, "the given config")
    return info, config or info.config or config_of(weights, info.weights), weights


def load_dit(
    path: str | Path,
    config: ModelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    family: str | None = None,
    lora: str | Path | Lora | None = None,
    lora_strength: float | None = None,
) -> CausalDiT:
    """A causal DiT from a checkpoint file, an index of shards, or a folder of Wan's or diffusers' layout.

    config: its sizes; else those of a config.json beside the weights, else those that the tensors show.
    family: as in `inspect`; lora: an adapter to merge, its file or what `open_lora` makes of it;
    lora_strength: how much of it, None: as it was trained, or as `open_lora` was told.
    """
    info, config, weights = open_dit(path, config, family)
    return build_dit(config, weights, info.weights, device, dtype, lora, lora_strength)


def build_dit(
    config: ModelConfig,
    weights: Mapping[str, LazyTensor],
    source: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    lora: str | Path | Lora | None = None,
    lora_strength: float | None = None,
) -> CausalDiT:
    """The model of `open_dit`'s sizes and weights, with an adapter merged, on its device."""
    if lora is None and lora_strength is not None:
        raise ValueError(f"lora_strength={lora_strength}: there is no adapter to merge; give one as lora=")
    with torch.device("meta"):
        model = CausalDiT(config)
    check_state_dict(model.state_dict(), weights, source)  # a bad base is named before a bad adapter
    if lora is not None:
        lora = lora if isinstance(lora, Lora) else open_lora(lora)
        weights = merge(weights, lora if lora_strength is None else lora.with_strength(lora_strength))
    load_weights_streaming(model, weights, source, device, dtype)
    return model.eval()
