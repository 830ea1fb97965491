"""Low-rank adapters, merged into the weights while they are read: W' = W + strength * scale * B A, in float32, once.

PEFT's files: `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r], alpha in an
`adapter_config.json` beside them or, as LongLive does it, nowhere. Also read are `lora_down` and `lora_up` with an
`alpha` of each module. The modules may be named in any naming of `key_maps.py`.
Source: LoRA (arXiv 2106.09685); PEFT `tuners/lora`; LongLive `utils/lora_utils.py` (r = alpha = 256).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_engine.checkpoints.key_maps import LORA, check_kind, kind_of, strip_wrappers, to_wan
from dsa_engine.checkpoints.tensor_io import LazyTensor, TensorFile, open_checkpoint, read_json

KEYS = ("generator_lora", "lora", "model", "state_dict")
CONFIG = "adapter_config.json"
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
_SIDES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


@dataclass(frozen=True)
class Pair:
    """One adapted weight: down A [r, in], up B [out, r]; alpha of this weight, None where the file has none."""

    down: LazyTensor
    up: LazyTensor
    alpha: LazyTensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """An adapter that still lies in its file: pairs by the weight they change, in Wan's names.

    alpha: for all modules, None where neither the caller nor an adapter_config.json gives one; root: whether the scale
    is alpha / sqrt(r) (rsLoRA); strength: how much of it is merged.
    """

    path: Path
    pairs: dict[str, Pair]
    alpha: float | None = None
    root: bool = False
    strength: float = 1.0

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})

    def scale(self, name: str) -> float:
        """strength * alpha / r of a weight; alpha is the one for all, else the module's own, else r."""
        pair = self.pairs[name]
        alpha = self.alpha
        if alpha is None:
            alpha = float(pair.rank) if pair.alpha is None else pair.alpha.read().item()
        return self.strength * alpha / (sqrt(pair.rank) if self.root else pair.rank)


def open_lora(path: str | Path, alpha: float | None = None, strength: float = 1.0) -> Lora:
    """What is in an adapter's file, nothing of it read yet.

    alpha: None takes that of an `adapter_config.json` beside the file, else each module's own, else r (a scale of 1).
    strength: 1 merges the adapter as it was trained.
    Raises FileNotFoundError, or ValueError for a file that is none, holds half a pair, or a kind of adapter that is
    more than B A (DoRA, a bias, a convolution).
    """
    lora = lora_of(open_checkpoint(path, KEYS))
    return replace(lora, alpha=lora.alpha if alpha is None else float(alpha), strength=strength)


def lora_of(file: TensorFile) -> Lora:
    """`open_lora` of a file that is open."""
    check_kind(kind_of(file.tensors), file.tensors, file.path, LORA)
    parts: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in file.tensors.items():
        match = _PART.fullmatch(strip_wrappers(name))
        side = "alpha" if match and match["alpha"] else _SIDES[match["part"]] if match else ""
        target = to_wan(f"{match['module']}.weight") if match else ""
        if not match or side in parts[target] or (side != "alpha" and len(tensor.shape) != 2):
            unknown.append(name)
        else:
            parts[target][side] = tensor
    halves = [name for name, sides in parts.items() if not {"down", "up"} <= sides.keys()]
    if unknown or halves:
        what = "tensors that are no pair of matrices B A" if unknown else "only half of a pair for"
        names = unknown or halves
        raise ValueError(f"{file.path}: {len(names)} {what}: {', '.join(sorted(names)[:4])}; only plain LoRA is merged")
    pairs = {name: Pair(**sides) for name, sides in parts.items()}
    for name, pair in pairs.items():
        if pair.up.shape[1] != pair.rank:
            raise ValueError(
                f"{file.path}: {name}: A {list(pair.down.shape)} and B {list(pair.up.shape)} are not of one rank"
            )
    return Lora(file.path, pairs, **_config(file.path.parent / CONFIG))


def merge(tensors: Mapping[str, LazyTensor], lora: Lora) -> dict[str, LazyTensor]:
    """The weights of a base model (Wan's names) with an adapter's in them; a weight is computed when it is read.

    Raises ValueError for a weight that the base lacks or has in another shape: the adapter was made for another model.
    """
    merged = dict(tensors)
    for name, pair in lora.pairs.items():
        shape = (pair.up.shape[0], pair.down.shape[1])
        if name not in tensors or tensors[name].shape != shape:
            has = f"is {list(tensors[name].shape)}" if name in tensors else "is not there"
            raise ValueError(
                f"{lora.path}: changes {name} of shape {list(shape)}, which in the base model {has}; it was made for "
                "another model"
            )
        read = partial(_merged, tensors[name], pair, lora.scale(name))
        merged[name] = LazyTensor(torch.float32, shape, read)
    return merged


def _merged(weight: LazyTensor, pair: Pair, scale: float, device: Any = "cpu") -> Tensor:
    base, down, up = (tensor.read(device).float() for tensor in (weight, pair.down, pair.up))
    return torch.addmm(base, up, down, alpha=scale)


def _config(path: Path) -> dict[str, Any]:
    """alpha and root of an `adapter_config.json`; nothing where there is none."""
    if not path.is_file():
        return {}
    values = read_json(path)
    for key in ("alpha_pattern", "use_dora"):
        if values.get(key):
            raise ValueError(f"{path}: {key}={values[key]!r}: only LoRA with one alpha for all modules is merged")
    alpha = values.get("lora_alpha")
    return {"alpha": None if alpha is None else float(alpha), "root": bool(values.get("use_rslora"))}
