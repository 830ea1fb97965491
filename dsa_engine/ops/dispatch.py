"""Which implementation of each op runs, and why. `DSA_BACKEND` is the only run-time switch.

On a CPU, and wherever a gradient is wanted, every op is plain torch. On a CUDA device `auto` takes what a measurement
on that compute capability has found fastest (`MEASURED`) and, where nothing was measured, the portable Triton kernels:
a kernel that nobody has timed is no default over one that runs everywhere. Another value of `DSA_BACKEND` asks for one
implementation: of all ops that it has, the others staying as in `auto`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine.ops import libraries, reference

STEMS = {
    "norm_rope": ("rms_norm", "norm_rope", "norm_rope_append"),
    "attention": ("attention", "cross_attention"),
    "modulate": ("modulate", "gate_residual", "residual_modulate", "gelu_bias", "linear_gelu"),
    "pooling": ("pool_frames",),
    "epilogue": ("velocity_to_x0", "renoise", "epilogue"),
    "fp8_linear": ("quantise", "fp8_linear"),
    "noise": ("gaussian",),
    "norm_silu": ("norm_silu", "bias_residual"),
}
STEM_OF = {op: stem for stem, ops in STEMS.items() for op in ops}
KERNELS = ("triton", "cuda")
BACKENDS = ("auto", "torch", *KERNELS, *libraries.NAMES)

# Fastest backend by compute capability and op, from `benchmarks/kernels.py` on such a device. None was measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}


class Choice(NamedTuple):
    backend: str
    why: str


def choose(op: str, wanted: str, capability: tuple[int, int] | None, lacks: Callable[[str, str], str | None]) -> Choice:
    """The backend of an op for a value of `DSA_BACKEND` on a device of some compute capability, None for a CPU.

    lacks(backend, op): why a backend cannot run the op here, None if it can. Raises ValueError for a value that does
    not exist, RuntimeError for one that was asked for by name, has the op and cannot run here.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"DSA_BACKEND={wanted!r}: must be one of {', '.join(BACKENDS)}")
    if capability is None:
        return Choice("torch", "the tensors are on a CPU")
    if wanted == "torch":
        return Choice("torch", "asked for by DSA_BACKEND")
    if wanted in KERNELS or (wanted in libraries.NAMES and op == "attention"):
        why_not = lacks(wanted, op)
        if why_not is None:
            return Choice(wanted, "asked for by DSA_BACKEND")
        if "has no" not in why_not:  # an op that a backend simply does not have is nobody's mistake
            raise RuntimeError(f"DSA_BACKEND={wanted}: {op} cannot run here: {why_not}")
    fastest = MEASURED.get(capability, {}).get(op)
    if fastest is not None and lacks(fastest, op) is None:
        return Choice(fastest, f"fastest when measured on compute capability {capability[0]}.{capability[1]}")
    why_not = lacks("triton", op)
    return Choice("triton", "portable; nothing was measured") if why_not is None else Choice("torch", why_not)


def lacks(backend: str, op: str) -> str | None:
    """Why a backend cannot run an op on this machine's current CUDA device; None if it can."""
    if backend == "torch":
        return None
    if backend in libraries.NAMES:
        return libraries.unavailable(backend) if op == "attention" else f"{backend} has no {op}"
    try:
        module = _module(backend, op)
    except ImportError as error:
        return f"{backend} is not installed: {error}"
    if not hasattr(module, op):
        return f"{backend} has no {op}"
    if backend == "cuda":
        return module.unavailable(op)
    return None if torch.cuda.get_device_capability() >= (8, 0) else "Triton kernels need compute capability 8.0"


def _module(backend: str, op: str):
    return importlib.import_module(
        "dsa_engine.ops.cuda" if backend == "cuda" else f"dsa_engine.triton_kernels.{STEM_OF[op]}"
    )


def choice(op: str, device: str = "cuda") -> Choice:
    """What this process runs for an op on a kind of device, "cpu" or "cuda"."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    return choose(op, os.environ.get("DSA_BACKEND", "auto"), capability, lacks)


@cache
def _function(op: str) -> Callable:
    backend = choice(op).backend
    if backend == "torch":
        return getattr(reference, op)
    return getattr(libraries, backend) if backend in libraries.NAMES else getattr(_module(backend, op), op)


def implementation(op: str, x: Tensor) -> Callable:
    """The function that runs an op for a call on x; decided once a process for CUDA tensors."""
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return getattr(reference, op)
    return _function(op)
