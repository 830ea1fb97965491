"""Which implementation of each op runs, and why. `DSA_BACKEND` is the only run-time switch.

On a CPU, and wherever a gradient is needed, every op is plain torch. On a CUDA device `auto` takes the backend that was
measured fastest on that compute capability (`MEASURED`) and otherwise the portable Triton kernels: an unmeasured kernel
is no default. The exception is attention on Hopper, where cuDNN is known to beat Triton: there it is the first of csrc,
flash-attn 3 and cuDNN that has passed `ops/smoke.py` on the device, else Triton. Any other value of `DSA_BACKEND`
requests one backend for all ops and tensors that it supports; the rest stays as in `auto`. Each backend declares what
it supports (`ops/support.py`). A call that falls back to plain torch because no kernel supports it is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine.ops import external_attention, reference, smoke
from dsa_engine.ops.support import E4M3, Call, Kind, Limits, Reason

logger = logging.getLogger(__name__)

OP_GROUPS = {
    "norm_rope": ("rms_norm", "norm_rope", "norm_rope_append"),
    "attention": ("attention", "cross_attention"),
    "modulate": ("modulate", "gate_residual", "residual_modulate", "gelu_bias", "linear_gelu"),
    "pooling": ("pool_frames", "attention_pool"),
    "epilogue": ("velocity_to_x0", "renoise", "epilogue"),
    "fp8_linear": ("quantize", "fp8_linear"),
    "noise": ("gaussian",),
    "norm_silu": ("norm_silu", "bias_residual"),
}
GROUP_OF = {op: stem for stem, ops in OP_GROUPS.items() for op in ops}
KERNELS = ("triton", "cuda")
BACKENDS = ("auto", "torch", *KERNELS, *external_attention.NAMES)

# Fastest backend by compute capability and op, from `benchmarks/kernels.py` on such a device. None measured yet.
MEASURED: dict[tuple[int, int], dict[str, str]] = {}

# What the Triton kernels support; their head dims are powers of two.
POWERS = Limits(head_dim=lambda dim, stored: dim & (dim - 1) == 0, head_dims="that are powers of two")
TILES = Limits(head_dim=lambda dim, stored: dim in (16, 32, 64, 128), head_dims="16, 32, 64 and 128")
TRITON = dict.fromkeys(GROUP_OF, POWERS) | {
    "attention": TILES,
    "cross_attention": TILES,
    "fp8_linear": Limits((E4M3,)),
    "gaussian": Limits((torch.int64,)),
}


class Choice(NamedTuple):
    backend: str
    why: str


class Candidate(NamedTuple):
    """A backend that `auto` tries; smoke_test: only where its attention has passed `ops/smoke.py` on the device."""

    backend: str
    why: str
    smoke_test: bool = False


def choose(call: Call, requested: str, supports: Callable[[str, Call], Reason | None]) -> Choice:
    """The backend of a call for a value of `DSA_BACKEND`.

    supports(backend, call): why a backend cannot run it here, None if it can. Raises ValueError for an unknown value,
    RuntimeError if the requested backend has the op but cannot run it here at all.
    """
    if requested not in BACKENDS:
        raise ValueError(f"DSA_BACKEND={requested!r}: must be one of {', '.join(BACKENDS)}")
    if call.capability is None:
        return Choice("torch", "the tensors are on a CPU")
    if requested != "auto":
        reason = supports(requested, call)
        if reason is None:
            return Choice(requested, "asked for by DSA_BACKEND")
        if not reason.here:
            raise RuntimeError(f"DSA_BACKEND={requested}: {call.op} cannot run here: {reason.text}")
        if reason.kind is Kind.CALL:  # a backend that simply lacks the op is not worth a warning
            logger.warning("DSA_BACKEND=%s does not run %s, the default does: %s", requested, call, reason.text)
    for backend, why, smoke_test in candidates(call):
        reason = supports(backend, call)
        if reason is None and smoke_test:
            verdict = smoke.verdict(backend, call.index)
            if verdict is None:
                logger.warning("%s is first called in a stream capture: no smoke test now, so not %s", call, backend)
            if verdict is None or not verdict.passed:
                continue
        if reason is None:
            return Choice(backend, why)
    if reason.kind is Kind.CALL:
        logger.warning("plain torch runs %s: %s", call, reason.text)
    return Choice("torch", reason.text)


def candidates(call: Call) -> list[Candidate]:
    """The backends that `auto` tries for a call on a CUDA device, in order; plain torch is the last resort."""
    fastest = MEASURED.get(call.capability, {}).get(call.op)
    if fastest is None:
        hopper = (call.op, call.capability) == ("attention", (9, 0)) and smoke.covers(call)
        passed = "right on this device by its smoke test; nothing was measured"
        tested = [Candidate(backend, passed, True) for backend in ("cuda", "flash3", "cudnn") if hopper]
        return [*tested, Candidate("triton", "portable; nothing was measured")]
    measured = f"fastest when measured on compute capability {call.capability[0]}.{call.capability[1]}"
    return [
        Candidate(fastest, measured),
        Candidate("triton", f"portable; {fastest}, {measured}, does not run this"),
    ]


def supports(backend: str, call: Call) -> Reason | None:
    """Why a backend cannot run a call on its CUDA device; None if it can."""
    if backend == "torch":
        return None
    if backend in external_attention.NAMES:
        return external_attention.supports(backend, call)
    try:
        module = _module(backend, call.op)
    except ImportError as error:
        return Reason(Kind.NOT_INSTALLED, f"{backend} is not installed: {error}")
    if not hasattr(module, call.op):
        return Reason(Kind.NO_OP, f"{backend} has no {call.op}")
    if backend == "cuda":
        return module.supports(call)
    if call.capability < (8, 0):
        return Reason(Kind.DEVICE, "Triton kernels need compute capability 8.0")
    if E4M3 in (call.dtype, call.stored) and call.capability < (8, 9):
        return Reason(Kind.CALL, "triton's e4m3 needs compute capability 8.9")
    return TRITON[call.op].refuse("triton", call)


def _module(backend: str, op: str):
    return importlib.import_module(
        "dsa_engine.ops.cuda_backend" if backend == "cuda" else f"dsa_engine.triton_kernels.{GROUP_OF[op]}"
    )


def choice(op: str, device: str = "cuda") -> Choice:
    """What this process runs for an op on "cpu" or the current "cuda" device, whatever its tensors."""
    if device != "cuda":
        return _choice(Call(op, None))
    return _choice(Call(op, torch.cuda.get_device_capability(), index=torch.cuda.current_device()))


@cache
def _choice(call: Call) -> Choice:
    return choose(call, os.environ.get("DSA_BACKEND", "auto"), supports)


@cache
def _function(op: str, dtype: torch.dtype, head_dim: int | None, stored: torch.dtype | None, index: int) -> Callable:
    backend = _choice(Call(op, torch.cuda.get_device_capability(index), dtype, head_dim, stored, index)).backend
    if backend == "torch":
        return getattr(reference, op)
    module = external_attention if backend in external_attention.NAMES else _module(backend, op)
    return getattr(module, backend if module is external_attention else op)


def resolve(op: str, x: Tensor, head_dim: int | None = None, stored: torch.dtype | None = None) -> Callable:
    """The function that runs an op for a call on x; cached per process for each kind of CUDA call (`Call`)."""
    device = x.device
    if device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return getattr(reference, op)
    return _function(op, x.dtype, head_dim, stored, device.index)
