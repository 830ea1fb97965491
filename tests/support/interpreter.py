"""Small floats done right in Triton's interpreter, for tests only.

Triton 3.6 keeps bfloat16 and FP8 as raw bits in integer arrays of numpy. Its interpreter then multiplies the bits of
bfloat16 in `tl.dot`, truncates float32 to bfloat16 and rounds ties of FP8 away from zero. `install()` makes casts round
to nearest even as the hardware does (FP8 saturates: `cvt.satfinite`), makes dot multiply the values, and turns any
other arithmetic on raw bits into a TypeError: a kernel upcasts first.

`install()` has no effect without TRITON_INTERPRET, nor the second time. `tests/support/kernels.py` calls it.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

RAW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
BITS = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16)}  # integers of that size, of either library


def decode(x: TensorHandle) -> np.ndarray:
    """The values of a handle: float32 for those kept as raw bits, the array itself for all others."""
    kind = RAW.get(x.dtype.scalar)
    if kind is None:
        return x.data
    bits = np.array(x.data, order="C").view(BITS[kind.itemsize][0])
    return torch.from_numpy(bits).view(kind).float().numpy()


def encode(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Values to a handle of dtype, rounded to nearest even."""
    array, kind = _get_np_dtype(dtype), RAW.get(dtype)
    if kind is None:
        return TensorHandle(values.astype(array), dtype)
    wide = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if kind.itemsize == 1:
        wide = wide.clamp(-torch.finfo(kind).max, torch.finfo(kind).max)  # NaN stays NaN
    return TensorHandle(wide.to(kind).view(BITS[kind.itemsize][1]).numpy().view(array), dtype)


def cast(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    return encode(decode(src), dst_type.scalar)


def cast_rounded(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode) -> TensorHandle:
    if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"cast to {dst_type} with {rounding_mode}: only nearest even is emulated")
    return cast(self, src, dst_type)


def dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision, max_num_imprecise_acc):
    product = np.matmul(decode(a), decode(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def refuse_raw_bits(method, operands: int):
    """A builder method that raises where one of its first `operands` handles is raw bits."""

    def checked(self, *args):
        for x in args[:operands]:
            if x.dtype.scalar in RAW:
                raise TypeError(f"arithmetic on {x.dtype.scalar}: the interpreter holds raw bits, cast to tl.float32")
        return method(self, *args)

    return checked


def install() -> None:
    builder = InterpreterBuilder
    if not triton.knobs.runtime.interpret or builder.cast_impl is cast:
        return
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, cast_rounded, dot
    for name, operands in (("binary_op", 2), ("unary_op", 1), ("create_clampf", 3), ("create_fma", 3)):
        setattr(builder, name, refuse_raw_bits(getattr(builder, name), operands))
