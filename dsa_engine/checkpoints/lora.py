"""Low-rank adapters, merged into the weights while they are read: W' = W + strength * scale * B A, in float32, once.

PEFT's files: `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r]; kohya's and ComfyUI's
`lora_down`, `lora_up` and `alpha` of each module, under dotted names or `lora_unet_blocks_0_self_attn_q`; `diff`,
`diff_b` and `diff_m`, which are added to a weight, a bias and a modulation. The modules may be named in any naming of
`key_maps.py`. The scale is alpha / r, with alpha from where `Lora.alpha_of` says.
Source: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732); PEFT `tuners/lora`; LongLive `utils/lora_utils.py`
(r = alpha = 256, told nowhere); ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_engine.checkpoints.key_maps import LORA, check_kind, kind_of, strip_wrappers, to_wan, undotted_to_wan
from dsa_engine.checkpoints.lora_scale import CONFIG, Scaling, config_scaling, header_scaling
from dsa_engine.checkpoints.tensor_io import LazyTensor, TensorFile, beside, find_weights, open_checkpoint

logger = logging.getLogger(__name__)

KEYS = ("generator_lora", "lora", "model", "state_dict")
STEMS = ("adapter_model", "pytorch_lora_weights")  # what PEFT and diffusers call an adapter's file in its folder
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<pair>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<other>alpha|diff|diff_b|diff_m))"
)
_SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_ADDED = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}


@dataclass(frozen=True)
class Pair:
    """One adapted weight: down A [r, in], up B [out, r]; alpha of this weight, None where the file has none."""

    down: LazyTensor
    up: LazyTensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """An adapter that still lies in its file: pairs by the weight they change, in Wan's names.

    added: differences by the weight they are added to. alpha: as the caller gives it, for all modules. said: what its
    header or an adapter_config.json says. root: whether the scale is alpha / sqrt(r) (rsLoRA). strength: how much of
    it is merged. notes: where sources disagree, and which was taken.
    """

    path: Path
    pairs: dict[str, Pair]
    added: dict[str, LazyTensor] = field(default_factory=dict)
    alpha: float | None = None
    said: Scaling = Scaling("")
    root: bool = False
    strength: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})

    def alpha_of(self, name: str) -> tuple[float, str]:
        """(alpha, its source) of a weight: the caller's, the module's own, the header's or config's, else r."""
        pair = self.pairs[name]
        if self.alpha is not None:
            return self.alpha, "the argument"
        if pair.alpha is not None:
            return pair.alpha, "its modules' own alpha"
        if self.said.alpha is not None:
            return self.said.alpha, self.said.source
        return float(pair.rank), "nothing gives an alpha, so it is r"

    def scale(self, name: str) -> float:
        """strength * alpha / r of a weight, or strength * alpha / sqrt(r)."""
        rank = self.pairs[name].rank
        return self.strength * self.alpha_of(name)[0] / (sqrt(rank) if self.root else rank)

    def with_strength(self, strength: float) -> Lora:
        """The same adapter, of which so much is merged. Raises ValueError unless it is finite."""
        if not isfinite(strength):
            raise ValueError(f"lora_strength={strength}: must be finite; 1 merges an adapter as it was trained")
        return replace(self, strength=float(strength))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `info`: how much of what is merged, and where the scale is from."""
        sources = list(dict.fromkeys(self.alpha_of(name)[1] for name in self.pairs))
        return {
            "ranks": self.ranks,
            "modules": len(self.pairs),
            "added": len(self.added),
            "alpha": self.said.alpha if self.alpha is None else self.alpha,
            "scales": sorted({self.scale(name) for name in self.pairs}),
            "scale_source": "; ".join(sources) + ("; over sqrt(r) (rsLoRA)" if self.root else ""),
        }


def open_lora(path: str | Path, alpha: float | None = None, strength: float = 1.0) -> Lora:
    """What is in an adapter's file, or in PEFT's or diffusers' folder of one; nothing of its matrices is read yet.

    alpha: None takes each module's own, else the header's, else that of an `adapter_config.json` beside the file, else
    r (a scale of 1). Sources that disagree are logged, with the one taken. strength: 1 merges it as it was trained.
    Raises FileNotFoundError, or ValueError for a file that is none, holds half a pair, or a kind of adapter that is
    more than B A (DoRA, LoKr, LoHa, a bias, a convolution).
    """
    if alpha is not None and not isfinite(alpha):
        raise ValueError(f"alpha={alpha}: must be finite; None takes what the files say")
    lora = lora_of(open_checkpoint(_find(Path(path)), KEYS))
    for note in lora.notes:
        logger.warning("%s: %s", lora.path, note)
    return replace(lora, alpha=None if alpha is None else float(alpha)).with_strength(strength)


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = (path / f"{stem}.safetensors" for stem in STEMS)
    return next(filter(Path.is_file, names), None) or find_weights(path)


def lora_of(file: TensorFile) -> Lora:
    """`open_lora` of a file that is open."""
    check_kind(kind_of(file.tensors), file.tensors, file.path, LORA)
    parts: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    added: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        match = _PART.fullmatch(strip_wrappers(name))
        module = undotted_to_wan(match["module"]) if match else ""
        part = match["other"] or _SIDES[match["pair"]] if match else ""
        if part in _ADDED:
            ending = "" if module.endswith("modulation") else _ADDED[part]
            target, sides = to_wan(module + ending), added
        else:
            target, sides = part, parts[to_wan(f"{module}.weight")] if part else {}
        if not part or target in sides or (part in ("down", "up") and len(tensor.shape) != 2):
            unknown.append(name)
        else:
            sides[target] = tensor
    halves = [name for name, sides in parts.items() if not {"down", "up"} <= sides.keys()]
    if unknown or halves:
        what = "tensors that are no pair of matrices B A" if unknown else "only half of a pair for"
        names = unknown or halves
        raise ValueError(f"{file.path}: {len(names)} {what}: {', '.join(sorted(names)[:4])}; only plain LoRA is merged")
    pairs = {
        name: Pair(sides["down"], sides["up"], _alpha(sides.get("alpha"), name, file.path))
        for name, sides in parts.items()
    }
    for name, pair in pairs.items():
        if pair.up.shape[1] != pair.rank:
            raise ValueError(
                f"{file.path}: {name}: A {list(pair.down.shape)} and B {list(pair.up.shape)} are not of one rank"
            )
    return _scaled(Lora(file.path, pairs, added), header_scaling(file.header, file.path))


def _alpha(tensor: LazyTensor | None, name: str, path: Path) -> float | None:
    if tensor is None:
        return None
    value = tensor.read().float().flatten().tolist()
    if len(value) != 1 or not isfinite(value[0]):
        raise ValueError(f"{path}: {name}: an alpha of {value[:4]}; must be one finite number")
    return value[0]


def _scaled(lora: Lora, header: Scaling) -> Lora:
    """The adapter with what the header and an adapter_config.json say.

    A config belongs to PEFT's own `adapter_model.*`; beside another name it may be of another adapter, so it counts
    only where nothing else tells.
    """
    own = {pair.alpha for pair in lora.pairs.values()}
    is_pefts = lora.path.name.startswith(f"{STEMS[0]}.")
    wanted = is_pefts or (None in own and header.alpha is None)
    config = config_scaling(beside(lora.path, CONFIG)) if wanted else Scaling("")
    said = config if header.alpha is None else header
    roots = [root for root in (header.root, config.root) if root is not None]
    notes = []
    if header.alpha is not None and config.alpha is not None and header.alpha != config.alpha:
        notes.append(f"{header.source}={header.alpha:g} and {config.source}={config.alpha:g}: the header's is taken")
    alphas = sorted(own - {None, said.alpha})
    if said.alpha is not None and alphas:
        notes.append(
            f"modules with an alpha of their own, such as {alphas[0]:g}, and {said.source}={said.alpha:g}: "
            "their own is taken"
        )
    if len(set(roots)) > 1:
        notes.append(f"its header says use_rslora={roots[0]} and {CONFIG} {roots[1]}: the header's is taken")
    if said.rank is not None and lora.pairs and said.rank not in lora.ranks:
        notes.append(f"r={said.rank:g} is said of matrices of r={', '.join(map(str, lora.ranks))}: theirs is taken")
    return replace(lora, said=said, root=bool(roots and roots[0]), notes=tuple(notes))


def merge(tensors: Mapping[str, LazyTensor], lora: Lora) -> dict[str, LazyTensor]:
    """The weights of a base model (Wan's names) with an adapter's in them; a weight is computed when it is read.

    Raises ValueError for a weight that the base lacks or has in another shape: the adapter was made for another model.
    """
    merged = dict(tensors)
    for name, pair in lora.pairs.items():
        shape = (pair.up.shape[0], pair.down.shape[1])
        _check_fits(tensors, name, shape, lora.path)
        read = partial(_merged, tensors[name], pair, lora.scale(name))
        merged[name] = LazyTensor(torch.float32, shape, read)
    for name, difference in lora.added.items():
        _check_fits(tensors, name, difference.shape, lora.path)
        read = partial(_sum, merged[name], difference, lora.strength)
        merged[name] = LazyTensor(torch.float32, difference.shape, read)
    return merged


def _check_fits(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...], path: Path) -> None:
    if name not in tensors or tensors[name].shape != shape:
        has = f"is {list(tensors[name].shape)}" if name in tensors else "is not there"
        raise ValueError(
            f"{path}: changes {name} of shape {list(shape)}, which in the base model {has}; it was made for "
            "another model"
        )


def _merged(weight: LazyTensor, pair: Pair, scale: float, device: Any = "cpu") -> Tensor:
    base, down, up = (tensor.read(device).float() for tensor in (weight, pair.down, pair.up))
    return torch.addmm(base, up, down, alpha=scale)


def _sum(weight: LazyTensor, difference: LazyTensor, strength: float, device: Any = "cpu") -> Tensor:
    return torch.add(weight.read(device).float(), difference.read(device).float(), alpha=strength)
