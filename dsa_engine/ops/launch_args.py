"""Checked arguments of csrc's launchers (csrc/tensor_args.h): addresses and strides of tensors.

Wrong tensors raise ValueError with the op, the tensor's name, what it is and what it must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float8_e4m3fn": 3}
MAX_CHANNELS = 16384
NO_ROWS, NO_FRAMES, NO_VECTOR = (0, 0, 0), (0, 0, 0, 0, 1), (0, 0)


def dtype_code(op: str, name: str, x: Tensor) -> int:
    kind = str(x.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise ValueError(f"{op}: {name} of {x.dtype} must be of one of {', '.join(DTYPES)}")
    return DTYPES[kind]


def shape(op: str, x: Tensor) -> tuple[int, int, int]:
    batch, tokens, channels = x.shape
    if channels % 8 or not 8 <= channels <= MAX_CHANNELS:
        nearest = min(max(1, round(channels / 8)), MAX_CHANNELS // 8) * 8
        raise ValueError(
            f"{op}: C = {channels} must be a multiple of 8 and at most {MAX_CHANNELS}; nearest is {nearest}"
        )
    return batch, tokens, channels


def strides(x: Tensor) -> tuple[int, int]:
    """Of the first two dims; 0 for a dim of size one, so that it broadcasts."""
    first, second = (x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))
    return first, second


def as_3d(x: Tensor) -> Tensor:
    """[..., C] as [B, T, C]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def rows(op: str, name: str, x: Tensor | None):
    """[B, T, C]: its address and strides; a row starts at a multiple of 16 bytes, or of 8 channels if they are e4m3."""
    if x is None:
        return NO_ROWS
    step = min(16, 8 * x.itemsize)
    batch, row = strides(x)
    if x.stride(2) != 1 or any(n % step for n in (x.data_ptr(), batch * x.itemsize, row * x.itemsize)):
        raise ValueError(
            f"{op}: {name} {list(x.shape)} of {x.dtype} with strides {list(x.stride())}, {x.data_ptr() % step} bytes "
            f"off: rows must be contiguous and start at multiples of {step} bytes"
        )
    return x.data_ptr(), batch, row


def per_frame(op: str, name: str, m: Tensor | None, x: Tensor):
    """[B or 1, F, C], float32 or of x's dtype, for x [B, F * S, C]."""
    if m is None:
        return NO_FRAMES
    check_parameter(op, name, m, x)
    address, batch, frame = rows(op, name, m)
    return address, dtype_code(op, name, m), batch, frame, x.shape[1] // m.shape[1]


def vector(op: str, name: str, v: Tensor, x: Tensor):
    """[C], float32 or of x's dtype."""
    check_parameter(op, name, v, x)
    return rows(op, name, v[None, None])[0], dtype_code(op, name, v)


def check_parameter(op: str, name: str, p: Tensor, x: Tensor) -> None:
    if p.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"{op}: {name} of {p.dtype} must be float32 or {x.dtype}, as the activations")


def check_contiguous(op: str, name: str, x: Tensor, dtype: torch.dtype, step: int = 1) -> None:
    if x.dtype != dtype or not x.is_contiguous() or x.data_ptr() % step:
        raise ValueError(
            f"{op}: {name} of {x.dtype} with strides {list(x.stride())}, {x.data_ptr() % step} bytes off: must be "
            f"contiguous {dtype} at a multiple of {step} bytes"
        )
