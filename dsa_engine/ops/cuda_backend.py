"""The ops as CUDA kernels (`csrc/`), with the names and arguments of `reference.py`.

They check what the kernels assume, allocate results, and pass addresses, strides and the current stream. The kernels
read and write 16 bytes at a time: rows are contiguous and start at multiples of 16 bytes, C is a multiple of 8 and at
most 16384. Wrong tensors raise ValueError; a CUDA error raises RuntimeError with the op and its shape. Contracts: the
public functions of `ops/`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_engine.kernel_types import CacheScales, Epilogue, FinalLayer, HeadWeights, RowwiseFP8, StopRule
from dsa_engine.ops import launch_args
from dsa_engine.ops.support import E4M3, Call, Kind, Limits, Reason

try:
    from dsa_engine import csrc  # type: ignore[attr-defined]
except ImportError as error:  # a pure Python installation
    csrc, _missing = None, str(error)

OPS = (
    "attention",
    "epilogue",
    "gate_residual",
    "gelu_bias",
    "modulate",
    "norm_rope",
    "norm_rope_append",
    "residual_modulate",
    "rms_norm",
)
NO_CACHE, NO_ANGLES, NO_RING = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0), (0, False, 0, False, 1)
NO_HEAD = (0, 0, 0, 0, 0, 0, launch_args.NO_FRAMES, 0)


# The condition of a loop on the device (engine/device_loop.py): a kernel, not an op.
SET_WHILE = "set_while"
ATTENTION_HEAD_DIMS = {torch.bfloat16: (64, 128), E4M3: (128,)}  # by the dtype of the cache


def _eights(dim: int, stored: torch.dtype | None) -> bool:
    return dim % 8 == 0


ROWS = Limits(head_dim=_eights, head_dims="that are multiples of 8")
LIMITS = dict.fromkeys(OPS, ROWS) | {
    "attention": Limits(
        (torch.bfloat16,),
        tuple(ATTENTION_HEAD_DIMS),
        lambda dim, stored: dim in ATTENTION_HEAD_DIMS[stored or torch.bfloat16],
        "64 and 128 (an e4m3 cache: 128)",
    )
}


def supports(call: Call) -> Reason | None:
    """Why a call cannot run here; None if nothing known speaks against it."""
    if call.op not in OPS:
        return Reason(Kind.NO_OP, f"cuda has no {call.op}")
    if csrc is None:
        return Reason(Kind.NOT_INSTALLED, why_unavailable(call.op))
    why = why_unavailable(call.op, call.capability)
    if why is not None:
        return Reason(Kind.DEVICE, why)
    if call.stored == E4M3 and call.capability != (9, 0):
        return Reason(Kind.CALL, "cuda's e4m3 needs compute capability 9.0")
    return LIMITS[call.op].refuse("cuda", call)


def why_unavailable(op: str, capability: tuple[int, int] | None = None) -> str | None:
    """Why the kernel of an op or SET_WHILE cannot run on a device of that capability (None: the current device); None
    if it can."""
    if op not in (*OPS, SET_WHILE):
        return f"{op} has no CUDA kernel"
    if csrc is None:
        return f"the CUDA extension is not part of this installation ({_missing})"
    if csrc.DEVICE == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        major, minor = capability or torch.cuda.get_device_capability()
        if (major, minor) != (9, 0) if op == "attention" else major < 8:  # the others have PTX for later devices
            needs = "9.0 alone" if op == "attention" else "8.0 and later"
            return f"compute capability {major}.{minor}: {op} was compiled for {needs}"
    return None


# ---- norm_rope ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    op, rows, out = "rms_norm", launch_args.as_3d(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    to = launch_args.rows(op, "out", launch_args.as_3d(out))
    operand = launch_args.rows(op, "x", rows), launch_args.vector(op, "weight", weight, x), False, to, NO_CACHE
    _norm_rope(op, rows, 0, eps, (operand,), NO_ANGLES, NO_RING)
    return out


def norm_rope(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float):
    op, head_dim = "norm_rope", 2 * cos.shape[-1]
    if q.dtype != k.dtype:
        raise ValueError(f"{op}: q and k of {q.dtype} and {k.dtype} must have one dtype")
    angles = _angles(op, cos, sin, q)
    operands, results = zip(*(_to_dense(op, x, weight, q) for x, weight in ((q, weight_q), (k, weight_k))))
    _norm_rope(op, q, head_dim, eps, operands, angles, NO_RING)
    return tuple(y.unflatten(-1, (-1, head_dim)) for y in results)


def norm_rope_append(
    q, k, v, weight_q, weight_k, cos, sin, eps, k_cache, v_cache, slot, write, scales: CacheScales | None = None
) -> Tensor:
    op, head_dim = "norm_rope_append", 2 * cos.shape[-1]
    angles = _angles(op, cos, sin, q)
    for name, index in (("slot", slot), ("write", write)):
        if index.dtype not in (torch.int32, torch.int64) or not index.is_contiguous():
            raise ValueError(f"{op}: {name} of {index.dtype} must be contiguous int64 or int32")
    ring = (slot.data_ptr(), slot.dtype == torch.int64, write.data_ptr(), write.dtype == torch.int64, k_cache.shape[2])
    if scales is None:
        k_scale = v_scale = 0
    else:
        _check_e4m3(op, q)
        for name, x in zip(scales._fields, scales):
            launch_args.check_contiguous(op, f"scales.{name}", x, torch.float32)
        k_scale, v_scale = scales.k.data_ptr(), scales.v.data_ptr()
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v of {q.dtype}, {k.dtype}, {v.dtype} must have one dtype")
    to_out, out = _to_dense(op, q, weight_q, q)
    k_cache, v_cache = (*_cache(op, k_cache, head_dim), k_scale), (*_cache(op, v_cache, head_dim), v_scale)
    to_k = (
        launch_args.rows(op, "k", k),
        launch_args.vector(op, "weight_k", weight_k, q),
        True,
        launch_args.NO_ROWS,
        k_cache,
    )
    to_v = launch_args.rows(op, "v", v), launch_args.NO_VECTOR, False, launch_args.NO_ROWS, v_cache
    _norm_rope(op, q, head_dim, eps, (to_out, to_k, to_v), angles, ring)
    return out.unflatten(-1, (-1, head_dim))


def _norm_rope(op: str, x: Tensor, head_dim: int, eps: float, operands, angles, ring) -> None:
    csrc.norm_rope(
        op=op,
        dtype=launch_args.dtype_code(op, "x", x),
        shape=launch_args.shape(op, x),
        head_dim=head_dim,
        eps=eps,
        operands=operands,
        angles=angles,
        ring=ring,
        stream=_stream(op, x),
    )


def _to_dense(op: str, x: Tensor, weight: Tensor, like: Tensor):
    """The launcher's operand that writes x, normed and rotated, to a new tensor; and that tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vector = launch_args.vector(op, "weight", weight, like)
    return (launch_args.rows(op, "x", x), vector, True, launch_args.rows(op, "out", out), NO_CACHE), out


def _angles(op: str, cos: Tensor, sin: Tensor, x: Tensor):
    head_dim = 2 * cos.shape[-1]
    if head_dim % 8 or x.shape[-1] % head_dim:
        raise ValueError(f"{op}: head dim {head_dim} must be a multiple of 8 that divides C = {x.shape[-1]}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.stride() != sin.stride():
        raise ValueError(f"{op}: cos of {cos.dtype} and sin of {sin.dtype} must be float32 with equal strides")
    launch_args.rows(op, "sin", sin)
    address, batch, row = launch_args.rows(op, "cos", cos)
    return address, sin.data_ptr(), batch, row


def _cache(op: str, cache: Tensor, head_dim: int):
    step = min(16, 8 * cache.itemsize)
    aligned = all(n % step == 0 for n in (cache.data_ptr(), *(s * cache.itemsize for s in cache.stride()[:3])))
    if cache.stride()[3:] != (head_dim, 1) or cache.shape[4] != head_dim or not aligned:
        raise ValueError(
            f"{op}: cache {list(cache.shape)} with strides {list(cache.stride())} must have contiguous heads of "
            f"{head_dim} channels, and tokens at multiples of {step} bytes"
        )
    return cache.data_ptr(), launch_args.dtype_code(op, "cache", cache), *cache.stride()[:3]


# ---- modulate -------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False) -> Tensor | RowwiseFP8:
    return _modulate("modulate", x, None, None, shift, scale, eps, fp8)[1]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return _modulate("gate_residual", x, y, gate, None, None, 0.0, False)[0]


def residual_modulate(x, y, gate, shift, scale, eps, fp8=False) -> tuple[Tensor, Tensor | RowwiseFP8]:
    return _modulate("residual_modulate", x, y, gate, shift, scale, eps, fp8)


def gelu_bias(x: Tensor, bias: Tensor, fp8: bool = False) -> Tensor | RowwiseFP8:
    op, rows = "gelu_bias", launch_args.as_3d(x)
    result, out, row_scale = _result(op, x, fp8)
    csrc.gelu_bias(
        dtype=launch_args.dtype_code(op, "x", x),
        shape=launch_args.shape(op, rows),
        x=launch_args.rows(op, "x", rows),
        out=out,
        bias=launch_args.vector(op, "bias", bias, x),
        row_scale=row_scale,
        stream=_stream(op, x),
    )
    return result


def _modulate(op: str, x: Tensor, y: Tensor | None, gate, shift, scale, eps: float, fp8: bool):
    """(x + gate y, its modulated norm): the first without y, the second without shift are None."""
    total = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    result, out, row_scale = (None, launch_args.NO_ROWS, 0) if shift is None else _result(op, x, fp8)
    if y is not None and y.dtype != x.dtype:
        raise ValueError(f"{op}: y of {y.dtype} must be of x's dtype, {x.dtype}")
    csrc.modulate(
        op=op,
        dtype=launch_args.dtype_code(op, "x", x),
        shape=launch_args.shape(op, x),
        x=launch_args.rows(op, "x", x),
        y=launch_args.rows(op, "y", y),
        sum=launch_args.rows(op, "sum", total),
        out=out,
        gate=launch_args.per_frame(op, "gate", gate, x),
        shift=launch_args.per_frame(op, "shift", shift, x),
        scale=launch_args.per_frame(op, "scale", scale, x),
        eps=eps,
        row_scale=row_scale,
        stream=_stream(op, x),
    )
    return total, result


def _result(op: str, x: Tensor, fp8: bool):
    """A new tensor like x, or a new `RowwiseFP8`; its rows; the address of its scales."""
    if not fp8:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return out, launch_args.rows(op, "out", launch_args.as_3d(out)), 0
    _check_e4m3(op, x)
    out = RowwiseFP8(
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device),
    )
    return out, launch_args.rows(op, "out", launch_args.as_3d(out.values)), out.scale.data_ptr()


# ---- epilogue -------------------------------------------------------------------------------------------------------


def epilogue(
    hidden: Tensor,
    time: Tensor,
    x: Tensor,
    noise: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    final: FinalLayer,
    head: HeadWeights | Tensor | None,
    rule: StopRule,
    eps: float,
) -> Epilogue:
    op, (batch, frames, channels, height, width) = "epilogue", x.shape
    tokens, outputs = hidden.shape[1] // frames, final.weight.shape[0]
    launch_args.check_contiguous(op, "weight", final.weight, hidden.dtype, step=16)
    sigma, next_sigma = sigma.contiguous(), next_sigma.contiguous()  # the engine gives one value per row, expanded
    for name, s in (("sigma", sigma), ("next_sigma", next_sigma)):
        launch_args.check_contiguous(op, name, s, torch.float32)
    for name, r in zip(rule._fields, rule):
        launch_args.check_contiguous(op, name, r, torch.float32 if name == "threshold" else torch.int32)
    if noise.dtype != x.dtype:
        raise ValueError(f"{op}: noise of {noise.dtype} must be of x's dtype, {x.dtype}")
    x0, after = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    state = torch.empty(batch, frames + 1, dtype=torch.float32, device=x.device)
    units = head.weight1.shape[0] if isinstance(head, HeadWeights) else 0
    size = csrc.epilogue_workspace(batch=batch, frames=frames, tokens=tokens, channels=hidden.shape[2], units=units)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    csrc.epilogue(
        dtype=launch_args.dtype_code(op, "hidden", hidden),
        shape=(batch, frames, tokens, hidden.shape[2], outputs),
        hidden=launch_args.rows(op, "hidden", hidden),
        shift=launch_args.per_frame(op, "shift", final.shift, hidden),
        scale=launch_args.per_frame(op, "scale", final.scale, hidden),
        weight=final.weight.data_ptr(),
        bias=launch_args.vector(op, "bias", final.bias, hidden),
        eps=eps,
        latents=(launch_args.dtype_code(op, "x", x), channels, height, width, round((outputs / channels) ** 0.5)),
        x=_latents(op, "x", x),
        noise=_latents(op, "noise", noise),
        x0=_latents(op, "x0", x0),
        next=_latents(op, "next", after),
        sigma=sigma.data_ptr(),
        next_sigma=next_sigma.data_ptr(),
        head=_head(op, head, time, hidden),
        rule=tuple(r.data_ptr() for r in rule),
        state=state.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=_stream(op, x),
    )
    return Epilogue(x0, after, state)


def _head(op: str, head: HeadWeights | Tensor | None, time: Tensor, hidden: Tensor):
    if head is None:
        return NO_HEAD
    if isinstance(head, Tensor):
        launch_args.check_contiguous(op, "logits", head, torch.float32)
        return (*NO_HEAD[:-1], head.data_ptr())
    for name, x in zip(head._fields, head):
        launch_args.check_contiguous(op, name, x, head.weight1.dtype, step=16 if name == "weight1" else 1)
    if time.stride(2) != 1:
        raise ValueError(f"{op}: time with strides {time.stride()} must have contiguous channels")
    dtype, time_dtype = launch_args.dtype_code(op, "weight1", head.weight1), launch_args.dtype_code(op, "time", time)
    time_of = (time.data_ptr(), time_dtype, *launch_args.strides(time), hidden.shape[1] // time.shape[1])
    return (dtype, head.weight1.shape[0], *(w.data_ptr() for w in head), time_of, 0)


def _latents(op: str, name: str, x: Tensor):
    if not x[0, 0].is_contiguous():
        raise ValueError(f"{op}: {name} with strides {x.stride()} must have contiguous frames [c, H, W]")
    return x.data_ptr(), *x.stride()[:2]


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, keys: Tensor, scales: CacheScales | None = None
) -> Tensor:
    op, (batch, tokens, heads, head_dim) = "attention", q.shape
    dtype, k_scale, v_scale = torch.bfloat16, 0, 0
    if scales is not None:
        dtype, k_scale, v_scale = E4M3, scales.k.data_ptr(), scales.v.data_ptr()
        launch_args.check_contiguous(op, "scales.k", scales.k, torch.float32)
        launch_args.check_contiguous(op, "scales.v", scales.v, torch.float32)
    head_dims = ATTENTION_HEAD_DIMS[dtype]
    if head_dim not in head_dims:
        nearest = min(head_dims, key=lambda d: abs(d - head_dim))
        raise ValueError(
            f"{op}: head dim {head_dim} with a cache of {k_cache.dtype} must be one of "
            f"{', '.join(map(str, head_dims))}; nearest is {nearest}"
        )
    launch_args.check_contiguous(op, "q", q, torch.bfloat16, step=16)
    launch_args.check_contiguous(op, "k_cache", k_cache, dtype, step=16)
    launch_args.check_contiguous(op, "v_cache", v_cache, dtype, step=16)
    slot, keys = slot.long().contiguous(), keys.long().contiguous()
    out = torch.empty_like(q)
    blocks = csrc.attention_blocks(sms=_sm_count(q))
    size = csrc.attention_workspace(batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, blocks=blocks)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    csrc.attention(
        shape=(batch, tokens, heads, head_dim, *k_cache.shape[:3], keys.shape[1]),
        q=q.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        out=out.data_ptr(),
        slot=slot.data_ptr(),
        keys=keys.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_bytes=size,
        blocks=blocks,
        stream=_stream(op, q),
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out


# ---- the device ----------------------------------------------------------------------------------------------------


def _stream(op: str, x: Tensor) -> int:
    """The current stream of x's device, which must be the current device."""
    if x.device.type != csrc.DEVICE:
        raise ValueError(f"{op}: tensors on {x.device} must be on {csrc.DEVICE}")
    if x.device.type == "cpu":  # the emulator in tests
        return 0
    if x.device.index != torch.cuda.current_device():
        raise ValueError(f"{op}: tensors on {x.device}, the current device is cuda:{torch.cuda.current_device()}")
    return torch.cuda.current_stream(x.device).cuda_stream


def _sm_count(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _check_e4m3(op: str, x: Tensor) -> None:
    """The conversion exists in the code for 9.0 only; other devices run code for 8.0, which would trap."""
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) != (9, 0):
        raise ValueError(f"{op}: e4m3 on {torch.cuda.get_device_name(x.device)}: needs compute capability 9.0")
