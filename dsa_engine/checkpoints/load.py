"""A model as the engine runs it: from the package's assets, from a folder in this project's format, or from a public
checkpoint of the Wan family, file or folder, in any dialect."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsa_engine.checkpoints.components import ModelComponents
from dsa_engine.checkpoints.families import repository_name
from dsa_engine.checkpoints.inspect import CheckpointInfo, sibling_components
from dsa_engine.checkpoints.lora import Lora
from dsa_engine.checkpoints.model_folder import is_model_folder, load_head, load_model_folder
from dsa_engine.checkpoints.tensor_io import SUFFIXES, is_index
from dsa_engine.checkpoints.text import load_text
from dsa_engine.checkpoints.vae import VAE_FILES, find_vae, load_vae
from dsa_engine.checkpoints.wan import build_dit, open_dit

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
WAN_VIDEO: dict[str, Any] = {
    "height": 480,
    "width": 832,
    "frames": 81,
    "fps": 16.0,
}  # the format of every model of the family


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def load_components(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    family: str | None = None,
    lora: str | Path | Lora | None = None,
    lora_strength: float | None = None,
    vae: str | Path | nn.Module | bool | None = None,
    text: str | Path | nn.Module | bool | None = None,
) -> ModelComponents:
    """Load a model. Errors name the path and what was expected there.

    Args:
        model: a shipped model's name, a folder, or a checkpoint file.
        family: of a public checkpoint: one of `families.FAMILIES`, whose rollout it gets, instead of the one that its
            config or name implies.
        lora: of a public checkpoint: an adapter to merge, its file or folder.
        lora_strength: how much of it; None: 1, as it was trained.
        vae: of a public checkpoint: a video VAE's file, a folder of Wan's or diffusers' layout that holds one, or the
            module itself. "wan" and "taehv" mean that kind of VAE, under its usual name in the model's folder or near
            it (`find_vae`). None takes what lies in the model's own folder, False nothing.
        text: as `vae`, for a text encoder or prompts that are encoded already (`load_text`).
    """
    path = ASSETS / model if model in shipped_models() else Path(model)
    if is_model_folder(path):
        options = {"family": family, "lora": lora, "lora_strength": lora_strength, "vae": vae, "text": text}
        if used := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"{', '.join(used)}: {path} is a whole model of this project; these are for checkpoints")
        return load_model_folder(path, device, dtype)
    if path.is_dir() or path.is_file() or path.suffix in SUFFIXES or is_index(path):
        return _load_checkpoint(path, device, dtype, family, lora, lora_strength, vae, text)
    raise FileNotFoundError(
        f"{model}: neither a shipped model ({', '.join(shipped_models())}), nor a folder with config.json and "
        f"model.safetensors, nor a checkpoint file ({', '.join(SUFFIXES)}) or folder of the Wan family"
    )


def _load_checkpoint(path: Path, device, dtype, family, lora, lora_strength, vae, text) -> ModelComponents:
    info, config, weights = open_dit(path, family=family)
    unintended = info.family in (None, "wan") or (info.family == "longlive" and lora is None)
    logger.log(
        logging.WARNING if unintended else logging.INFO,
        "%s: rollout of %s (%s)%s",
        path,
        info.family or "no known family",
        info.family_source,
        f"; {info.note}" if info.note else "",
    )
    encoder, decoder = resolve_component("text", text, info), resolve_component("vae", vae, info)
    if isinstance(encoder, Path):
        encoder = load_text(encoder, device=device, length=config.text_len)
    if isinstance(decoder, Path):
        decoder = load_vae(decoder, device, dtype)
    sizes = (
        ("text", text, encoder, "text_dim", config.text_dim),
        ("vae", vae, decoder, "latent_channels", config.in_dim),
    )
    for name, given, module, size, needed in sizes:
        if module is not None and getattr(module, size) != needed:
            source = info.components[name] if given is None else given
            raise ValueError(f"{name}={source}: {size}={getattr(module, size)}, but {path} needs {needed}")
    dit = build_dit(config, weights, info.weights, device, dtype, lora, lora_strength)
    return ModelComponents(model_name(path), dit, info.rollout, decoder=decoder, text=encoder, **WAN_VIDEO, info=info)


def model_name(path: str | Path) -> str:
    """What a model is called: its folder as given, or its file without the ending.

    In Hugging Face's cache, where these are hashes, it is the repository's name.
    """
    path = Path(os.path.abspath(path))
    if path.parent.name in ("snapshots", "blobs") and (name := repository_name(path)):
        return name  # its own is a hash
    return path.name if path.is_dir() else path.stem


def resolve_component(name: str, given: Any, info: CheckpointInfo) -> Any:
    """A component as given, or its path: the one given, one inside the given folder, or one in the model's own folder.

    name: "vae" or "text". None: there is none.
    """
    if given is None:
        return info.components.get(name)
    if name == "vae" and given in VAE_FILES:
        return find_vae(info.path, given)
    if not isinstance(given, (str, Path)):
        return given or None
    given = Path(given)
    return sibling_components(given).get(name, given) if given.is_dir() else given


def find_head(model: str | Path, head: str | Path) -> Path:
    """A head's file: as given, or by the name of one that lies in the model's folder as `head-<name>.safetensors`.

    Raises ValueError for a name that is not there.
    """
    if Path(head).suffix or Path(head).parent != Path("."):
        return Path(head)
    folder = ASSETS / model if model in shipped_models() else Path(model)
    known = {path.stem.removeprefix("head-"): path for path in sorted(folder.glob("head-*.safetensors"))}
    if str(head) not in known:
        names = ", ".join(known) or "there are none"
        raise ValueError(f"head={str(head)!r}: must be a .safetensors file or one that {model} comes with: {names}")
    return known[str(head)]


def replace_head(model: ModelComponents, path: str | Path) -> ModelComponents:
    """A model with the head of a file in place of its own, and with that head's threshold, presets and calibration."""
    new = load_head(path, model.dit.config, model.dit.device, model.dit.dtype)
    rollout = replace(model.rollout, threshold=new.threshold, presets=new.presets)
    return replace(model, head=new.head, rollout=rollout, calibration=new.calibration)
