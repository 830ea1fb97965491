"""Which implementation of an op runs, and why. `DSA_BACKEND` is the only run-time switch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine.ops import reference

MODULES = {"torch": reference}
BACKENDS = ("auto", *MODULES)


class Choice(NamedTuple):
    backend: str
    why: str


def choose(wanted: str) -> Choice:
    """The backend for a value of `DSA_BACKEND`. Raises ValueError for one that does not exist."""
    if wanted not in BACKENDS:
        raise ValueError(f"DSA_BACKEND={wanted!r}: must be one of {', '.join(BACKENDS)}")
    if wanted == "torch":
        return Choice("torch", "asked for by DSA_BACKEND")
    return Choice("torch", "plain torch ops are the only implementation built into this version")


_chosen: list[Choice] = []


def choice() -> Choice:
    """What this process runs, decided at the first use."""
    if not _chosen:
        _chosen.append(choose(os.environ.get("DSA_BACKEND", "auto")))
    return _chosen[0]


def implementation(op: str, x: Tensor) -> Callable:
    """The chosen backend's function of that name for a call on x.

    The kernels run on CUDA tensors and have no backward: everything else is plain torch.
    """
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return getattr(reference, op)
    return getattr(MODULES[choice().backend], op)
