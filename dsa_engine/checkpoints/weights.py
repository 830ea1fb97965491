"""Tensors into a module: strictly by name and shape, one after the other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
