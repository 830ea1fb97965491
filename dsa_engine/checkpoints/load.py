"""A model as the engine runs it: from the package's assets, from a folder in this project's format, or from a public
checkpoint of the Wan family, file or folder, in any dialect.

This project's folder holds `config.json` (sizes, rollout, video) and `model.safetensors`, whose names begin with the
part they belong to: `generator.` (Wan's names), `confidence.`, `codec.`, `text.`. A confidence head alone, for a model
that comes without one, is a `.safetensors` file whose header holds what the head was calibrated to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import ENGINE_FORMAT, VAE_FILES, Found, companions, find_vae
from dsa_engine.checkpoints.lora import Lora
from dsa_engine.checkpoints.tensor_io import INDEX, SUFFIXES, find_weights, open_tensors, read_json, write_tensors
from dsa_engine.checkpoints.wan import build_dit, fill, load_strict, open_dit, read_tensors
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.files import atomic_write, check_output_path
from dsa_engine.models import memory_estimate
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.offload import Offloaded
from dsa_engine.models.taehv import load_taehv
from dsa_engine.models.umt5 import UMT5, load_text
from dsa_engine.models.wan_vae import load_vae
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
FORMAT, HEAD_FORMAT = f"{ENGINE_FORMAT}1", "dsa_engine.head/1"
WAN_VIDEO = {"height": 480, "width": 832, "frames": 81, "fps": 16.0}  # what every model of the Wan family is shown with

# Pairs (confidence of a frame, mean squared latent distance to its full-step estimate that it stands for).
Calibration = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Parts:
    """Everything a pipeline needs. `head`, `decoder` and `text` may be None; sizes are pixels, frames pixel frames.

    calibration: by rising confidence; empty where it was never measured. found: what a public checkpoint turned out
    to be.
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
    found: Found | None = None

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        """The parts that take memory, as `memory` calls them."""
        return {"generator": self.dit, "confidence": self.head, "vae": self.decoder, "text": self.text}


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def load(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    family: str | None = None,
    lora: str | Path | Lora | None = None,
    vae: str | Path | nn.Module | bool | None = None,
    text: str | Path | nn.Module | bool | None = None,
) -> Parts:
    """Load by shipped name, folder or checkpoint file. Errors name the path and what was expected there.

    Of a public checkpoint: family, one of `key_maps.FAMILIES`, says whose rollout it gets where its config and name do
    not, or instead of them; lora: an adapter to merge; vae, text: files of a video VAE and of a text encoder (or of
    prompts that are encoded already), folders of Wan's or diffusers' layout that hold them, or the modules themselves
    (`load_decoder`, `load_text`). None takes what lies in the model's own folder, False nothing. vae="wan" and "taehv"
    mean that kind of VAE, under its usual name in the model's folder or near it (`find_vae`).
    """
    path = ASSETS / model if model in shipped() else Path(model)
    if path.is_dir() and "format" in _config(path):
        given = {"family": family, "lora": lora, "vae": vae, "text": text}
        if used := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(used)}: {path} is a whole model of this project; these are for checkpoints")
        return _load_folder(path, device, dtype)
    if path.is_dir() or path.is_file() or path.suffix in SUFFIXES or path.name.endswith(INDEX):
        return _load_checkpoint(path, device, dtype, family, lora, vae, text)
    raise FileNotFoundError(
        f"{model}: neither a shipped model ({', '.join(shipped())}), nor a folder with config.json and "
        f"model.safetensors, nor a checkpoint file ({', '.join(SUFFIXES)}) or folder of the Wan family"
    )


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _load_checkpoint(path: Path, device, dtype, family, lora, vae, text) -> Parts:
    found, config, entries = open_dit(path, family=family)
    unlike = found.family in (None, "wan") or (found.family == "longlive" and lora is None)  # not as it is meant to run
    logger.log(
        logging.WARNING if unlike else logging.INFO,
        "%s: rollout of %s (%s)%s",
        path,
        found.family or "no known family",
        found.family_by,
        f"; {found.note}" if found.note else "",
    )
    encoder, decoder = _part("text", text, found), _part("vae", vae, found)
    if isinstance(encoder, Path):
        encoder = load_text(encoder, device=device, length=config.text_len)
    if isinstance(decoder, Path):
        decoder = load_decoder(decoder, device, dtype)
    sizes = (
        ("text", text, encoder, "text_dim", config.text_dim),
        ("vae", vae, decoder, "latent_channels", config.in_dim),
    )
    for name, given, part, size, needed in sizes:
        if part is not None and getattr(part, size) != needed:
            where = found.parts[name] if given is None else given
            raise ValueError(f"{name}={where}: {size}={getattr(part, size)}, but {path} needs {needed}")
    dit = build_dit(config, entries, found.weights, device, dtype, lora)
    return Parts(title(path), dit, found.rollout, decoder=decoder, text=encoder, **WAN_VIDEO, found=found)


def title(path: str | Path) -> str:
    """What a model is called: its folder, or its file without the ending."""
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.stem


def _part(part: str, given: Any, found: Found) -> Any:
    """A part as given, or where it lies: there, inside the folder that is given, or inside the model's own folder."""
    if given is None:
        return found.parts.get(part)
    if part == "vae" and given in VAE_FILES:
        return find_vae(found.path, given)
    if not isinstance(given, (str, Path)):
        return given or None
    given = Path(given)
    return companions(given).get(part, given) if given.is_dir() else given


def load_decoder(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Wan VAE or its tiny twin, whichever a file holds, or the only one in a folder.

    Raises FileNotFoundError, or ValueError that says what else the file holds, before any of it is read.
    """
    path = find_weights(path) if path.is_dir() else path
    kind = key_maps.kind_of(open_tensors(path).entries)
    if kind not in key_maps.VAES:
        use = f": {key_maps.USES[kind]}" if kind in key_maps.USES else ""
        raise ValueError(
            f"{path}: holds {kind or 'no model that is known here'}{use}; expected {' or '.join(key_maps.VAES)}"
        )
    if path.stem.startswith("lighttae"):  # nothing in the file tells, and its colours would be wrong
        raise ValueError(
            f"{path}: LightTAE, whose latents have Wan's mean and deviation in them, which is not done here; expected "
            f"is TAEHV's taew2_1.pth, or the Wan VAE"
        )
    return (load_taehv if kind == key_maps.vae_names.TINY else load_vae)(path, device, dtype)


def place(
    parts: Parts,
    offload: str | Sequence[str] | None,
    rollout: RolloutConfig | None = None,
    sessions: int = 1,
    cache: torch.dtype | None = None,
) -> Parts:
    """The same model with the parts that `offload` names on the CPU, on the device only while they are used.

    "text": umT5, a layer at a time for a new prompt (any other text encoder is small, or its maker's business);
    "vae": the decoder's weights and the states of its streams, a latent frame at a time. "auto": the first of
    `memory.PLACEMENTS` that fits what the device has free for `sessions` sessions of `rollout` at the model's own video
    size, whose keys and values are of dtype `cache` (None: the DiT's own), which is logged; nothing where the device is
    not CUDA. None: nothing. The DiT and its cache always stay.
    """
    device = parts.dit.device
    chosen = (
        _fitting(parts, rollout or parts.rollout, sessions, cache)
        if offload == "auto"
        else memory_estimate.placement_of(offload)
    )
    if "text" in chosen and isinstance(parts.text, UMT5):
        parts.text.send_home()
    if "vae" in chosen and parts.decoder is not None and not isinstance(parts.decoder, Offloaded):
        parts = replace(parts, decoder=Offloaded(parts.decoder, device))
    return parts


def _fitting(parts: Parts, rollout: RolloutConfig, sessions: int, cache: torch.dtype | None) -> tuple[str, ...]:
    device, stride = parts.dit.device, getattr(parts.decoder, "spatial_stride", 8)
    if device.type != "cuda":
        logger.info("offload nothing: %s is where it would go", device)
        return ()
    frames = parts.decoder.latent_frames_of(parts.frames) if parts.decoder else (parts.frames - 1) // 4 + 1
    load = memory_estimate.Workload(
        (parts.height or 480) // stride, (parts.width or 832) // stride, frames, sessions, parts.dit.dtype, cache
    )
    sizes = memory_estimate.sizes_of(parts.modules)
    needs = {
        name: memory_estimate.predict(parts.dit.config, rollout, load, offload=name, **sizes).peak
        - memory_estimate.CONTEXT
        for name in memory_estimate.PLACEMENTS
    }
    there = memory_estimate.measure(parts.modules)["weights"].values()
    return memory_estimate.choose(needs, memory_estimate.room(device) + sum(part.get(str(device), 0) for part in there))


def _load_folder(folder: Path, device, dtype) -> Parts:
    values = read_json(folder / "config.json")
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'}: format={values.get('format')!r}, expected {FORMAT!r}")
    lacking = [key for key in ("name", "model", "rollout", "video") if key not in values]
    if lacking:
        raise ValueError(f"{folder / 'config.json'}: lacks {', '.join(lacking)}")
    config = ModelConfig.from_dict(values["model"])
    source = folder / "model.safetensors"
    entries = open_tensors(source).entries
    with torch.device("meta"):  # the others are small, and some hold more than their parameters
        modules: dict[str, nn.Module] = {"generator": CausalDiT(config)}
    for name, make in _OPTIONAL.items():
        if any(key.startswith(name + ".") for key in entries):
            modules[name] = make(config)
    fill(nn.ModuleDict(modules), entries, source, device, dtype)
    for module in modules.values():
        module.to(device=device).eval()
    return Parts(
        name=values["name"],
        dit=modules["generator"],
        rollout=RolloutConfig.from_dict(values["rollout"]),
        head=modules.get("confidence"),
        decoder=modules.get("codec"),
        text=modules.get("text"),
        **values["video"],
        calibration=check_calibration(values.get("calibration", ()), folder / "config.json"),
    )


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
    values = {
        "format": FORMAT,
        "name": name,
        "model": modules["generator"].config.to_dict(),
        "rollout": rollout.to_dict(),
        "video": dict(video),
        "calibration": check_calibration(calibration, folder),
    }
    tensors = {f"{part}.{key}": value for part, module in modules.items() for key, value in module.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, dtype=dtype)
    write_json(folder / "config.json", values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON object for people to read, renamed into place; its folder is created."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


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


def read_metadata(path: Path) -> dict[str, str]:
    """The header's texts of a safetensors file."""
    return dict(open_tensors(path).header)
