"""Every implementation of an op that may be there: by name, one signature, and why it cannot run where it cannot.

    torch      `reference.py`, plain torch; for linear, cuBLAS through F.linear
    compile    torch.compile of the same
    sdpa       scaled_dot_product_attention on the valid keys, whichever kernel torch picks
    cudnn      the same with cuDNN's forced
    flash2, flash3, flash4      flash-attn, where a version is importable
    scaled_mm  torch._scaled_mm, cuBLASLt's FP8 product with a scale a row and a column
    triton, cuda                this project's kernels

sdpa, cudnn and flash are given the number of keys on the host and a view of the keys, which the engine, where it lies
on the device, cannot give: they are bars to beat. `DISPATCHED` are the ones that `ops.dispatch` may pick.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.micro.roofline import Row
from dsa_engine import ops
from dsa_engine.ops import dispatch, external_attention, reference

BACKENDS = ("torch", "compile", "sdpa", "cudnn", "flash2", "flash3", "flash4", "scaled_mm", "triton", "cuda")
DISPATCHED = ("torch", "triton", "cuda")
FLASH = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}

LEFT_TO_CUBLAS = ("linear_gelu",)  # ops that no kernel of this project does


class Unavailable(Exception):
    """This backend cannot run this row here; the message says why."""


def contender(name: str, row: Row, device: torch.device) -> Callable:
    """The function that takes the row's arguments. Raises Unavailable."""
    if name in ("triton", "cuda") and device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    if name == "torch":
        return plain(row)
    if name == "compile":
        torch.compiler.reset()  # an op's many shapes would run into the limit of recompilations
        return torch.compile(plain(row), dynamic=False)
    if name in ("triton", "cuda"):
        return own(name, row.op)
    if name == "scaled_mm":
        if row.op != "fp8_linear":
            raise Unavailable("an FP8 product")
        return scaled_mm
    if row.op not in ("attention", "cross_attention") or row.what.startswith("used") or row.precision == "fp8":
        raise Unavailable("bfloat16 attention over keys that count once")
    if name in FLASH:
        return over_keys(row, flash(FLASH[name]))
    if name == "cudnn" and device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    return over_keys(row, fused(SDPBackend.CUDNN_ATTENTION if name == "cudnn" else None))


def refuse_others(asked: str | None = None, device: str = "cuda", only: Sequence[str] | None = None) -> dict[str, str]:
    """What `ops.dispatch` runs for each op, where it is what was asked for: figures of another backend mislead.

    asked: a value of DSA_BACKEND, None for that of this process; device: "cpu" or "cuda"; only: these ops, None for
    all. `auto` asks for anything but plain torch where a kernel for the op exists: it is what dispatch falls back to
    where a package is missing. Raises SystemExit that names the op, what was asked for and what it got.
    """
    wanted = os.environ.get("DSA_BACKEND", "auto") if asked is None else asked
    found = {}
    for op in (op for op in dispatch.STEM_OF if only is None or op in only):
        try:
            with asking(wanted):
                backend, why = dispatch.choice(op, device)
        except (RuntimeError, ValueError) as error:
            backend, why = "none", str(error)
        if not meets(wanted, op, backend, device):
            raise SystemExit(f"nothing is timed: of {op}, asked for {wanted}, got {backend}: {why}")
        found[op] = backend
    return found


def meets(wanted: str, op: str, backend: str, device: str) -> bool:
    """Whether a backend of an op is what a value of DSA_BACKEND asks for."""
    if backend == "none":
        return False
    from dsa_engine.ops import cuda_backend

    has = {"triton": op not in LEFT_TO_CUBLAS, "cuda": hasattr(cuda_backend, op)} | dict.fromkeys(
        external_attention.NAMES, op == "attention"
    )
    if wanted == "torch" or has.get(wanted, False):
        return backend == wanted
    return backend == "torch" if device == "cpu" else backend != "torch" or op in LEFT_TO_CUBLAS


@contextmanager
def asking(wanted: str) -> Iterator[None]:
    """DSA_BACKEND is `wanted` inside."""
    before = os.environ.get("DSA_BACKEND")
    os.environ["DSA_BACKEND"] = wanted
    try:
        yield
    finally:
        del os.environ["DSA_BACKEND"]
        if before is not None:
            os.environ["DSA_BACKEND"] = before


def plain(row: Row) -> Callable:
    return F.linear if row.op == "linear" else getattr(reference, row.op)


def own(name: str, op: str) -> Callable:
    """A kernel of this project, in the module that its stem names."""
    public = getattr(ops, op, None)
    if public is None:
        raise Unavailable("left to cuBLAS")
    stem = public.__module__.rpartition(".")[2]
    module = f"dsa_engine.triton_kernels.{stem}" if name == "triton" else "dsa_engine.ops.cuda_backend"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    if not hasattr(found, op):
        raise Unavailable(f"{module} has no {op}")
    return getattr(found, op)


def scaled_mm(x: ops.RowwiseFP8, weight: ops.RowwiseFP8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    flat = x.values.flatten(0, -2)
    scales = x.scale.flatten(0, -2).contiguous(), weight.scale.T.contiguous()
    y = torch._scaled_mm(flat, weight.values.T, *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    return y.unflatten(0, x.values.shape[:-1])


def over_keys(row: Row, attend: Callable) -> Callable:
    """attend(q, k, v) of [B, T, H, D] as the op: of a cache, its valid frames, which are not copied."""
    if row.op == "cross_attention":
        return lambda q, k, v, used, repeat: attend(q, k, v)
    frames = row.frames

    def call(q, k_cache, v_cache, slot, keys, scales):
        return attend(q, k_cache[:, :frames].flatten(1, 2), v_cache[:, :frames].flatten(1, 2))

    return call


def fused(backend: SDPBackend | None) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def flash(module: str) -> Callable:
    """flash_attn_func of one of the three packages; some return the log-sum-exp as well."""
    try:
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f"{module} is not installed")
    except ModuleNotFoundError as error:
        raise Unavailable(f"{module} is not installed") from error
    function = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend
