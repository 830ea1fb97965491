"""Tensors into a module: strictly by name and shape, quantized ones times their scales, one after the other."""

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
from dsa_engine.checkpoints.tensor_io import LazyTensor


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a module whose names and shapes must all agree; ValueError says which do not."""
    check_state_dict(module.state_dict(), tensors, source)
    module.load_state_dict(tensors, assign=any(p.is_meta for p in module.parameters()))


def load_weights_streaming(
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """`load_strict` of tensors that are still in their file, each one read, converted and assigned before the next.

    The module may be on the meta device; its parameters become frozen ones of the given device and dtype.
    """
    check_state_dict(module.state_dict(), tensors, source)
    for name, tensor in tensors.items():
        value = tensor.read(device)
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
        else:
            setattr(owner, leaf, value.to(dtype) if value.is_floating_point() else value)


def check_state_dict(expected: Mapping[str, Any], given: Mapping[str, Any], source: str | Path) -> None:
    """Raises ValueError where the names or shapes of two sets of tensors differ, with the nearest names."""
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshapen = [
        f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & given.keys())
        if tuple(given[name].shape) != tuple(expected[name].shape)
    ]
    if not (missing or unexpected or misshapen):
        return
    with_nearest = [*unexpected]
    for i, name in enumerate(unexpected[:4]):
        if near := difflib.get_close_matches(name, missing, 1, 0.8):
            with_nearest[i] = f"{name} (nearest: {near[0]})"
    groups = (("missing", missing), ("unexpected", with_nearest), ("of another shape", misshapen))
    report = "; ".join(f"{len(n)} {what}: {', '.join(n[:4])}{', ...' if len(n) > 4 else ''}" for what, n in groups if n)
    raise ValueError(f"{source}: does not fit the model's config: {report}")


def dequantize(tensors: Mapping[str, LazyTensor], source: str | Path) -> dict[str, LazyTensor]:
    """W = stored * scale for every weight that has a scale, of one value or one per row, in float32.

    Raises ValueError for a scale without its weight or of another size, and for packed formats (NVFP4, MXFP4).
    """
    scales = {}
    kept = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in key_maps.SCALES:
            scales[f"{stem}.weight"] = tensor
        elif not key_maps.IGNORED.search(name):
            kept[name] = tensor
    for name, scale in scales.items():
        rows = kept[name].shape[0] if name in kept else None
        if rows is None or prod(scale.shape) not in (1, rows):
            has = "not there" if rows is None else f"of shape {list(kept[name].shape)}"
            raise ValueError(
                f"{source}: a scale of shape {list(scale.shape)} for {name}, which is {has}; expected is one value, or "
                "one per row"
            )
        kept[name] = LazyTensor(torch.float32, kept[name].shape, partial(_scaled, kept[name], scale))
    packed = [name for name, tensor in kept.items() if not tensor.dtype.is_floating_point]
    if packed:
        raise ValueError(
            f"{source}: {len(packed)} weights of dtype {kept[packed[0]].dtype} ({', '.join(packed[:4])}); read are "
            "floating-point weights, and FP8 or INT8 with a scale"
        )
    return kept


def _scaled(weight: LazyTensor, scale: LazyTensor, device: Any = "cpu") -> Tensor:
    rows = scale.read(device).float().reshape(-1, *[1] * (len(weight.shape) - 1))  # [1 or out, 1, ...]
    return weight.read(device).float() * rows
