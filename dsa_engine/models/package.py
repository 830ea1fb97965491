"""A model as the engine runs it: from the package's assets, from a folder in this project's format, or from a file.

The folder holds `config.json` (sizes, rollout, video) and `model.safetensors`, whose names begin with the part they
belong to: `generator.` (Wan's names), `confidence.`, `codec.`, `text.`. A confidence head alone, for a model that comes
without one, is a `.safetensors` file whose header holds what the head was calibrated to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.checkpoint import SUFFIXES, load_dit, load_strict, read_json, read_tensors
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.pixel_codec import PixelCodec
from dsa_engine.models.text import SlotTextEncoder
from dsa_engine.video import check_target, replacing

ASSETS = Path(__file__).parent.parent / "assets"
FORMAT, HEAD_FORMAT = "dsa_engine/1", "dsa_engine.head/1"

# Pairs (confidence of a frame, mean squared latent distance to its full-step estimate that it stands for).
Calibration = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Parts:
    """Everything a pipeline needs. `head`, `decoder` and `text` may be None; sizes are pixels, frames pixel frames.

    calibration: by rising confidence; empty where it was never measured.
    """

    name: str
    dit: CausalDiT
    rollout: RolloutConfig
    head: ConfidenceHead | None = None
    decoder: nn.Module | None = None
    text: nn.Module | None = None
    height: int | None = None
    width: int | None = None
    frames: int = 81
    fps: float = 16.0
    calibration: Calibration = ()


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def load(model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Load by shipped name, folder or checkpoint file. Errors name the path and what was expected there."""
    path = ASSETS / model if model in shipped() else Path(model)
    if path.is_dir():
        return _load_folder(path, device, dtype)
    if path.is_file() or path.suffix in SUFFIXES:
        dit = load_dit(path, device=device, dtype=dtype)
        return Parts(name=path.stem, dit=dit, rollout=RolloutConfig(), height=480, width=832)
    raise FileNotFoundError(
        f"{model}: neither a shipped model ({', '.join(shipped())}), nor a folder with config.json and "
        f"model.safetensors, nor a checkpoint file ({', '.join(SUFFIXES)})"
    )


def _load_folder(folder: Path, device, dtype) -> Parts:
    values = read_json(folder / "config.json")
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'}: format={values.get('format')!r}, expected {FORMAT!r}")
    lacking = [key for key in ("name", "model", "rollout", "video") if key not in values]
    if lacking:
        raise ValueError(f"{folder / 'config.json'}: lacks {', '.join(lacking)}")
    config = ModelConfig.from_dict(values["model"])
    source = folder / "model.safetensors"
    tensors = read_tensors(source)
    modules: dict[str, nn.Module] = {"generator": CausalDiT(config)}
    for name, make in _OPTIONAL.items():
        if any(key.startswith(name + ".") for key in tensors):
            modules[name] = make(config)
    load_strict(
        nn.ModuleDict(modules), {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, source
    )
    for module in modules.values():
        module.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return Parts(
        name=values["name"], dit=modules["generator"], rollout=RolloutConfig.from_dict(values["rollout"]),
        head=modules.get("confidence"), decoder=modules.get("codec"), text=modules.get("text"), **values["video"],
        calibration=check_calibration(values.get("calibration", ()), folder / "config.json"),
    )  # fmt: skip


_OPTIONAL = {
    "confidence": ConfidenceHead,
    "codec": lambda config: PixelCodec(),
    "text": lambda config: SlotTextEncoder(config.text_dim),
}


def save(
    folder: Path,
    name: str,
    modules: Mapping[str, nn.Module],
    rollout: RolloutConfig,
    video: Mapping,
    dtype=torch.float16,
    calibration: Iterable[tuple[float, float]] = (),
):
    """Write a folder that `load` reads. Floating-point weights are stored as `dtype`; each file is renamed into place.

    modules: by part: `generator`, and any of `confidence`, `codec`, `text`. video: height, width, frames, fps.
    calibration: as in `Parts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{part}.{key}"] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
    values = {
        "format": FORMAT,
        "name": name,
        "model": modules["generator"].config.to_dict(),
        "rollout": rollout.to_dict(),
        "video": dict(video),
        "calibration": check_calibration(calibration, folder),
    }
    weights, config = folder / "model.safetensors", folder / "config.json"
    Path(f"{weights}.part").write_bytes(serialize(tensors))  # save_file would make it readable to its owner only
    Path(f"{config}.part").write_text(json.dumps(values, indent=2) + "\n")
    os.replace(f"{weights}.part", weights)
    os.replace(f"{config}.part", config)


@dataclass(frozen=True)
class HeadFile:
    """A confidence head, and what it was calibrated to on the model that it was trained for.

    threshold, presets: as in `RolloutConfig`; calibration: as in `Parts`.
    """

    head: ConfidenceHead
    threshold: float | None
    presets: dict[str, float]
    calibration: Calibration


def save_head(
    path: str | Path, head: ConfidenceHead, config: ModelConfig, rollout: RolloutConfig,
    calibration: Iterable[tuple[float, float]] = (),
) -> None:  # fmt: skip
    """Write a head as one `.safetensors` file for `load_head`: its weights as they are, the threshold and presets of
    `rollout` and the calibration in the header. Renamed into place. ValueError for another ending."""
    path = check_target(path, ".safetensors")
    about = {
        "dim": config.dim,
        "threshold": rollout.threshold,
        "presets": dict(rollout.presets),
        "calibration": check_calibration(calibration, path),
    }
    header = {"format": HEAD_FORMAT} | {name: json.dumps(value) for name, value in about.items()}
    write_tensors(path, head.state_dict(), header)


def load_head(
    path: str | Path, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> HeadFile:
    """Read what `save_head` wrote, for a model of the sizes `config`.

    Raises FileNotFoundError, or ValueError for a file that is no head, not whole, or made for a model of another width.
    """
    path = check_target(path, ".safetensors")
    tensors, about = read_tensors(path), read_metadata(path)
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
    head = ConfidenceHead(config)
    load_strict(head, {name: value.float() for name, value in tensors.items()}, path)
    head.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return HeadFile(head, threshold, presets, check_calibration(points, path))


def with_head(parts: Parts, path: str | Path) -> Parts:
    """A model with the head of a file in place of its own, and with that head's threshold, presets and calibration."""
    new = load_head(path, parts.dit.config, parts.dit.device, parts.dit.dtype)
    rollout = replace(parts.rollout, threshold=new.threshold, presets=new.presets)
    return replace(parts, head=new.head, rollout=rollout, calibration=new.calibration)


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file with a header of texts, renamed into place. Its folder is created."""
    content = serialize({name: value.contiguous() for name, value in tensors.items()}, dict(header))
    with replacing(path) as part:
        part.write_bytes(content)  # save_file would make it readable to its owner only


def read_metadata(path: Path) -> dict[str, str]:
    """The header's texts of a safetensors file that is whole (`read_tensors` says so)."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
