"""From any dialect to this project's format or to diffusers': load, then save. Only the generator is converted."""

from __future__ import annotations

from pathlib import Path

import torch

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.families import ROLLOUT_KEYS
from dsa_engine.checkpoints.inspect import CheckpointInfo, inspect
from dsa_engine.checkpoints.load import WAN_VIDEO, load_components, model_name
from dsa_engine.checkpoints.lora import Lora
from dsa_engine.checkpoints.model_folder import save_model_folder, write_json
from dsa_engine.checkpoints.tensor_io import NESTED_KEYS, open_checkpoint, write_tensors
from dsa_engine.checkpoints.wan import build_dit, open_dit
from dsa_engine.checks import check_choice
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.dit import CausalDiT

FORMATS = ("engine", "diffusers")


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "engine",
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    lora: str | Path | Lora | None = None,
    lora_strength: float | None = None,
) -> CheckpointInfo:
    """A checkpoint of any dialect as a folder of this project's ("engine") or diffusers' format, an adapter merged in.
    A folder of this project goes to diffusers' format alone.

    lora, lora_strength: an adapter, and how much of it is merged (None: 1, as it was trained).
    dtype: None keeps the floating-point dtype that most of its weights have, bfloat16 for FP8. family: whose rollout is
    written into this project's config.json, as in `load_components`. Returns what the source was.
    Raises ValueError for an unknown format, or a target that has files in it.
    """
    check_choice("to", to, FORMATS)
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already; give a folder that is empty or new")
    info = inspect(source, family)
    dtype = dtype or usual_dtype(info)
    if info.kind == key_maps.ENGINE:
        if to == "engine" or family or lora or lora_strength is not None:
            raise ValueError(f"{source}: is a model of this project already: only to='diffusers' is left, without more")
        save_diffusers(target, load_components(source, dtype=dtype).dit)
        return info
    info, config, weights = open_dit(source, family=family)
    dit = build_dit(config, weights, info.weights, "cpu", dtype, lora, lora_strength)
    if to == "diffusers":
        save_diffusers(target, dit)
    else:
        save_model_folder(target, model_name(source), {"generator": dit}, info.rollout, WAN_VIDEO, dtype)
    return info


def save_like(
    source: str | Path,
    folder: str | Path,
    dit: CausalDiT,
    rollout: RolloutConfig,
    family: str | None = None,
) -> None:
    """Write a DiT of the source's sizes as a folder in the source's own naming and dtype, for
    `Pipeline.from_pretrained(folder)`.

    A checkpoint's tensors keep their names, wrappers and prefixes included, in `model.safetensors`; diffusers' names
    lie in `transformer/`; a model of this project keeps its codec and text encoder. rollout: its chunk, window and sink
    are written down, and for a model of this project all of it; a public format has no place for shift and steps.
    family: as in `inspect`.
    """
    folder = Path(folder)
    info = inspect(source, family)
    dtype = usual_dtype(info)
    if info.kind == key_maps.ENGINE:
        old = load_components(source)
        modules = {"generator": dit, "codec": old.decoder, "text": old.text}
        video = {name: getattr(old, name) for name in ("height", "width", "frames", "fps")}
        given = {name: module for name, module in modules.items() if module is not None}
        save_model_folder(folder, folder.name, given, rollout, video, dtype)
    elif info.dialect == key_maps.DIFFUSERS_KEYS.name:
        save_diffusers(folder, dit, dtype)
    else:
        stored = {key_maps.to_wan(name): name for name in open_checkpoint(info.weights, _keys(info)).tensors}
        tensors = {stored[name]: value for name, value in dit.state_dict().items()}
        write_tensors(folder / "model.safetensors", tensors, dtype=dtype)
        own = {theirs: getattr(rollout, ours) for theirs, ours in ROLLOUT_KEYS.items()}
        own = {name: -1 if value is None else value for name, value in own.items()}  # global attention
        write_json(folder / "config.json", {**dit.config.to_dict(), **own})


def _keys(info: CheckpointInfo) -> tuple[str, ...]:
    """The entry of a pickle's dictionary that was read."""
    return NESTED_KEYS if info.key is None else (info.key,)


def save_diffusers(folder: str | Path, dit: CausalDiT, dtype: torch.dtype | None = None) -> None:
    """Write `transformer/` as diffusers' `WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")` reads
    it. dtype: None leaves the weights' own. Raises ValueError for a RoPE base that this class does not have."""
    config = dit.config
    if config.rope_theta != ModelConfig.rope_theta:
        raise ValueError(f"rope_theta={config.rope_theta}: diffusers' Wan has {ModelConfig.rope_theta} and no other")
    values = {theirs: getattr(config, ours) for theirs, ours in key_maps.CONFIG_KEYS.items()}
    if config.text_len == ModelConfig.text_len:
        del values["text_len"]  # a setting of the pipeline there; kept where it is not the usual one
    values |= {"attention_head_dim": config.head_dim, **key_maps.CONFIG_FIXED, "patch_size": list(config.patch_size)}
    tensors = {key_maps.rename(name, key_maps.DIFFUSERS_KEYS): value for name, value in dit.state_dict().items()}
    target = Path(folder) / "transformer"
    write_tensors(target / "diffusion_pytorch_model.safetensors", tensors, dtype=dtype)
    write_json(target / "config.json", {"_class_name": "WanTransformer3DModel", **values})


def usual_dtype(info: CheckpointInfo) -> torch.dtype:
    """The dtype of most elements, or bfloat16 where that is too narrow to hold what they stand for."""
    dtype = getattr(torch, next(iter(info.dtypes)))
    return dtype if not info.quantized and dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16
