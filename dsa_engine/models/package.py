"""A model as the engine runs it: from the package's assets, from a folder in this project's format, or from a file.

The folder holds `config.json` (sizes, rollout, video) and `model.safetensors`, whose names begin with the part they
belong to: `generator.` (Wan's names), `confidence.`, `codec.`, `text.`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.checkpoint import SUFFIXES, load_dit, load_strict, read_json, read_tensors
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.pixel_codec import PixelCodec
from dsa_engine.models.text import SlotTextEncoder

ASSETS = Path(__file__).parent.parent / "assets"
FORMAT = "dsa_engine/1"


@dataclass(frozen=True)
class Parts:
    """Everything a pipeline needs. `head`, `decoder` and `text` may be None; sizes are pixels, frames pixel frames."""

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
):
    """Write a folder that `load` reads. Floating-point weights are stored as `dtype`; each file is renamed into place.

    modules: by part: `generator`, and any of `confidence`, `codec`, `text`. video: height, width, frames, fps.
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
    }
    weights, config = folder / "model.safetensors", folder / "config.json"
    Path(f"{weights}.part").write_bytes(serialize(tensors))  # save_file would make it readable to its owner only
    Path(f"{config}.part").write_text(json.dumps(values, indent=2) + "\n")
    os.replace(f"{weights}.part", weights)
    os.replace(f"{config}.part", config)
