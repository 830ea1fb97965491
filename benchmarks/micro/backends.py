"""Every implementation of an op that may be there: by name, one signature, and why it cannot run where it cannot.

    torch      `reference.py`, plain torch; for linear, cuBLAS through F.linear; for vae_decode, `eager_vae.py`
    compile    torch.compile of the same
    sdpa       scaled_dot_product_attention on the valid keys, whichever kernel torch picks
    cudnn      the same with cuDNN's forced
    flash2, flash3, flash4      flash-attn, where a version is importable
    scaled_mm  torch._scaled_mm, cuBLASLt's FP8 GEMM with one scale per row and per column
    triton, cuda                this project's kernels
    channels_last, graphed      this project's VAE decoder, op by op and as one CUDA graph

sdpa, cudnn and flash are given the number of keys on the host and a view of the keys, which the engine, whose counts
lie on the device, cannot give: they are bars to beat. `DISPATCHED` are those that `ops.dispatch` may pick.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.micro import eager_vae
from benchmarks.micro.roofline import Row
from dsa_engine import ops
from dsa_engine.engine.graphed_decoder import GraphedDecoder
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import cuda_backend, dispatch, external_attention, reference

DISPATCHED = ("torch", "triton", "cuda")
FLASH = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
DECODERS = ("channels_last", "graphed")
BACKENDS = ("torch", "compile", "sdpa", "cudnn", *FLASH, "scaled_mm", "triton", "cuda", *DECODERS)
LEFT_TO_CUBLAS = ("linear_gelu",)  # ops that no kernel of this project does


def backends_of(op: str) -> tuple[str, ...]:
    return ("torch", *DECODERS) if op == "vae_decode" else tuple(b for b in BACKENDS if b not in DECODERS)


class Unavailable(Exception):
    """This backend cannot run this row here; the message says why."""


def resolve(name: str, row: Row, device: torch.device) -> Callable:
    """The function that takes the row's arguments. Raises Unavailable."""
    if name in ("triton", "cuda", "cudnn") and device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    if name == "torch":
        return plain_torch(row)
    if name in DECODERS:
        return last_chunk(
            lambda vae, chunk: vae.to_channels_last().decode if name == "channels_last" else graphed(vae, chunk)
        )
    if name == "compile":
        torch.compiler.reset()  # an op's many shapes would run into the limit of recompilations
        return torch.compile(plain_torch(row), dynamic=False)
    if name in ("triton", "cuda"):
        return project_kernel(name, row.op)
    if name == "scaled_mm":
        if row.op != "fp8_linear":
            raise Unavailable("an FP8 GEMM")
        return scaled_mm
    if row.op not in ("attention", "cross_attention") or row.what.startswith("used") or row.fp8:
        raise Unavailable("bfloat16 attention over keys that count once")
    if name in FLASH:
        return over_valid_keys(row, flash_attn(FLASH[name]))
    return over_valid_keys(row, sdpa(SDPBackend.CUDNN_ATTENTION if name == "cudnn" else None))


def refuse_others(asked: str | None = None, device: str = "cuda", only: Sequence[str] | None = None) -> dict[str, str]:
    """What `ops.dispatch` runs for each op, where it is what was asked for: figures of another backend mislead.

    asked: a value of DSA_BACKEND, None for that of this process; device: "cpu" or "cuda"; only: these ops, None for
    all. `auto` asks for anything but plain torch where a kernel for the op exists: it is what dispatch falls back to
    where a package is missing. Raises SystemExit that names the op, what was asked for and what it got.
    """
    asked = os.environ.get("DSA_BACKEND", "auto") if asked is None else asked
    found = {}
    for op in (op for op in dispatch.GROUP_OF if only is None or op in only):
        try:
            with patch.dict(os.environ, DSA_BACKEND=asked):
                backend, why = dispatch.choice(op, device)
        except (RuntimeError, ValueError) as error:
            backend, why = "none", str(error)
        if not is_as_asked(asked, op, backend, device):
            raise SystemExit(f"nothing is timed: of {op}, asked for {asked}, got {backend}: {why}")
        found[op] = backend
    return found


def is_as_asked(asked: str, op: str, backend: str, device: str) -> bool:
    """Whether a backend of an op is what a value of DSA_BACKEND asks for."""
    has = {"torch": True, "triton": op not in LEFT_TO_CUBLAS, "cuda": hasattr(cuda_backend, op)}
    has |= dict.fromkeys(external_attention.NAMES, op == "attention")
    if backend == "none" or has.get(asked):
        return backend == asked
    return backend == "torch" if device == "cpu" else backend != "torch" or op in LEFT_TO_CUBLAS


def plain_torch(row: Row) -> Callable:
    if row.op == "vae_decode":
        return last_chunk(lambda vae, chunk: partial(eager_vae.decode, vae))
    return F.linear if row.op == "linear" else getattr(reference, row.op)


def project_kernel(name: str, op: str) -> Callable:
    """A kernel of this project, in the module that its stem names."""
    if op not in dispatch.GROUP_OF:
        raise Unavailable("left to cuBLAS")
    module = "dsa_engine.ops.cuda_backend" if name == "cuda" else f"dsa_engine.triton_kernels.{dispatch.GROUP_OF[op]}"
    try:
        return getattr(importlib.import_module(module), op)
    except ImportError as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    except AttributeError:
        raise Unavailable(f"{module} has no {op}") from None


def scaled_mm(x: ops.RowwiseFP8, weight: ops.RowwiseFP8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    flat = x.values.flatten(0, -2)
    scales = x.scale.flatten(0, -2).contiguous(), weight.scale.T.contiguous()
    y = torch._scaled_mm(flat, weight.values.T, *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    return y.unflatten(0, x.values.shape[:-1])


def over_valid_keys(row: Row, attend: Callable) -> Callable:
    """attend(q, k, v) of [B, T, H, D] as the op: of a cache, its valid frames, which are not copied."""
    if row.op == "cross_attention":
        return lambda q, k, v, used, repeat: attend(q, k, v)
    frames = row.frames

    def call(q, k_cache, v_cache, slot, keys, scales):
        return attend(q, k_cache[:, :frames].flatten(1, 2), v_cache[:, :frames].flatten(1, 2))

    return call


def sdpa(backend: SDPBackend | None) -> Callable:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def flash_attn(module: str) -> Callable:
    """flash_attn_func of one of the three packages; some return the log-sum-exp as well."""
    try:
        function = importlib.import_module(module).flash_attn_func
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def last_chunk(prepare: Callable) -> Callable:
    """Decodes the last of a stream's chunks; those before it only the first time, for their state.

    prepare(vae, chunk): a function (latents, state) -> (frames, state).
    """
    streams = {}

    def call(vae: WanVAE, chunks: Tensor) -> Tensor:
        if vae not in streams:
            decode, state = prepare(vae, chunks[0]), None
            for chunk in chunks[:-1]:
                _, state = decode(chunk, state)
            streams[vae] = decode, state
        decode, state = streams[vae]
        return decode(chunks[-1], state)[0]

    return call


def graphed(vae: WanVAE, chunk: Tensor) -> Callable:
    decoder = GraphedDecoder(vae, chunk.shape)
    if chunk.is_cuda:
        decoder.capture()
    return decoder.decode
