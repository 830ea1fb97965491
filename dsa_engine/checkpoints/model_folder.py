"""This project's own files: a folder that is a whole model, and a confidence head alone.

The folder holds `config.json` (sizes, rollout, video) and `model.safetensors`, whose names begin with the component
they belong to: `generator.` (Wan's names), `confidence.`, `codec.`, `text.`. A head alone, for a model that comes
without one, is a `.safetensors` file whose header holds what the head was calibrated to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsa_engine.checkpoints.components import Calibration, ModelComponents
from dsa_engine.checkpoints.inspect import ENGINE_FORMAT
from dsa_engine.checkpoints.tensor_io import open_checkpoint, read_json, write_tensors
from dsa_engine.checkpoints.weights import load_weights_streaming
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.files import atomic_write, check_output_path
from dsa_engine.models.confidence import ConfidenceHead, PooledHead, new_head
from dsa_engine.models.dit import CausalDiT
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder

FORMAT, HEAD_FORMAT = f"{ENGINE_FORMAT}1", "dsa_engine.head/1"
POOLED = {"kind": PooledHead.kind}  # what a file that names no head has: `ConfidenceHead.settings`


def is_model_folder(path: Path) -> bool:
    """Whether a folder has a config.json of this project's format, of any version."""
    config = path / "config.json"
    return config.is_file() and str(read_json(config).get("format")).startswith(ENGINE_FORMAT)


def load_model_folder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> ModelComponents:
    """Read what `save_model_folder` wrote. Raises ValueError for another format, or one that lacks a part."""
    values = read_json(folder / "config.json")
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'}: format={values.get('format')!r}, expected {FORMAT!r}")
    missing = [key for key in ("name", "model", "rollout", "video") if key not in values]
    if missing:
        raise ValueError(f"{folder / 'config.json'}: lacks {', '.join(missing)}")
    config = ModelConfig.from_dict(values["model"])
    source = folder / "model.safetensors"
    tensors = open_checkpoint(source).tensors
    with torch.device("meta"):  # the others are small, and some hold more than their parameters
        modules: dict[str, Any] = {"generator": CausalDiT(config)}
    optional = {
        "confidence": lambda: _head(config, values.get("head", POOLED), folder / "config.json"),
        "codec": PixelCodec,
        "text": lambda: SlotTextEncoder(config.text_dim),
    }
    for name, make in optional.items():
        if any(key.startswith(name + ".") for key in tensors):
            modules[name] = make()
    load_weights_streaming(nn.ModuleDict(modules), tensors, source, device, dtype)
    for module in modules.values():
        module.to(device=device).eval()
    return ModelComponents(
        name=values["name"],
        dit=modules["generator"],
        rollout=RolloutConfig.from_dict(values["rollout"]),
        head=modules.get("confidence"),
        decoder=modules.get("codec"),
        text=modules.get("text"),
        **values["video"],
        calibration=check_calibration(values.get("calibration", ()), folder / "config.json"),
    )


def save_model_folder(
    folder: Path,
    name: str,
    modules: Mapping[str, Any],
    rollout: RolloutConfig,
    video: Mapping,
    dtype=torch.float16,
    calibration: Iterable[tuple[float, float]] = (),
):
    """Write a folder for `load_model_folder`; each file is renamed into place. dtype: of floating-point weights.

    modules: by component: `generator`, and any of `confidence`, `codec`, `text`. video: height, width, frames, fps.
    calibration: as in `ModelComponents`.
    """
    values = {
        "format": FORMAT,
        "name": name,
        "model": modules["generator"].config.to_dict(),
        "rollout": rollout.to_dict(),
        "video": dict(video),
        "calibration": check_calibration(calibration, folder),
    }
    if "confidence" in modules and modules["confidence"].settings() != POOLED:
        values["head"] = modules["confidence"].settings()
    states = {component: module.state_dict() for component, module in modules.items()}
    tensors = {f"{component}.{key}": value for component, state in states.items() for key, value in state.items()}
    write_tensors(folder / "model.safetensors", tensors, dtype=dtype)
    write_json(folder / "config.json", values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """An indented JSON object, renamed into place; its folder is created."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


@dataclass(frozen=True)
class HeadFile:
    """A confidence head, and what it was calibrated to on the model that it was trained for.

    threshold, presets: as in `RolloutConfig`; calibration: as in `ModelComponents`.
    """

    head: ConfidenceHead
    threshold: float | None
    presets: dict[str, float]
    calibration: Calibration


def save_head(
    path: str | Path,
    head: ConfidenceHead,
    config: ModelConfig,
    rollout: RolloutConfig,
    calibration: Iterable[tuple[float, float]] = (),
) -> None:
    """Write a head as one `.safetensors` file for `load_head`: its weights as they are, the threshold and presets of
    `rollout` and the calibration in the header. Renamed into place. ValueError for another ending."""
    path = check_output_path(path, ".safetensors")
    about = {
        "dim": config.dim,
        "threshold": rollout.threshold,
        "presets": dict(rollout.presets),
        "calibration": check_calibration(calibration, path),
        "head": head.settings(),
    }
    header = {"format": HEAD_FORMAT} | {name: json.dumps(value) for name, value in about.items()}
    write_tensors(path, head.state_dict(), header)


def load_head(
    path: str | Path, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> HeadFile:
    """Read what `save_head` wrote, for a model of the sizes `config`.

    Raises FileNotFoundError, or ValueError for a file that is no head, not whole, or made for a model of another width.
    """
    path = check_output_path(path, ".safetensors")
    file = open_checkpoint(path)
    about = file.header
    if about.get("format") != HEAD_FORMAT:
        raise ValueError(
            f"{path}: format={about.get('format')!r}, expected {HEAD_FORMAT!r}: a file that "
            "`dsa-engine train --recipe head` has written"
        )
    try:
        dim, threshold, presets, points = (json.loads(about[k]) for k in ("dim", "threshold", "presets", "calibration"))
        RolloutConfig(threshold=threshold, presets=presets)  # raises for values outside [0, 1]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header does not say what a head's must ({error})") from error
    if dim != config.dim:
        raise ValueError(f"{path}: a head for models of dim={dim}, this one has dim={config.dim}; train one for it")
    head = _head(config, json.loads(about["head"]) if "head" in about else POOLED, path)
    load_weights_streaming(head, file.tensors, path, device, dtype)
    return HeadFile(head.to(device=device).eval(), threshold, presets, check_calibration(points, path))


def _head(config: ModelConfig, settings: Any, source: Path) -> ConfidenceHead:
    """An untrained head of the form that a file names. ValueError where there is no such form."""
    try:
        return new_head(config, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: head={settings!r}: {error}") from error


def check_calibration(points: Any, source: str | Path) -> Calibration:
    """Pairs (confidence, error) as floats: confidences rise within [0, 1], errors never rise and are at least 0."""
    try:
        pairs = tuple((float(confidence), float(error)) for confidence, error in points)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: calibration={points!r}: must be pairs (confidence, error)") from error
    rising = all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(pairs))
    if not rising or any(not (0 <= confidence <= 1 and 0 <= error < float("inf")) for confidence, error in pairs):
        raise ValueError(
            f"{source}: calibration={list(pairs)}: confidences must rise within [0, 1], and errors must not rise with "
            "them nor be below 0"
        )
    return pairs
