"""Attention over the cache by optional libraries, with the signature of `ops.attention`.

    cudnn      torch's scaled_dot_product_attention with cuDNN's kernel forced
    flash2     flash-attn 2, `flash_attn.flash_attn_with_kvcache`
    flash3     flash-attn 3 for Hopper, `flash_attn_interface.flash_attn_with_kvcache`
    flash4     flash-attn 4, `flash_attn.cute.flash_attn_varlen_func`

None supports runs of frames. For flash3 a frame of the ring is a page of a paged cache, so nothing is copied; for the
others the valid frames are gathered to the front, which copies the ring once per call.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_engine.ops.support import HALVES, Call, Kind, Limits, Reason

MODULES = {"cudnn": "torch", "flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
NAMES = tuple(MODULES)
MIN_CAPABILITY = {"cudnn": 8, "flash2": 8, "flash3": 9, "flash4": 9}  # major compute capability


def _small(dim: int, stored: torch.dtype | None) -> bool:
    return dim % 8 == 0 and dim <= 128


LIMITS = Limits(HALVES, HALVES, _small, "that are multiples of 8 up to 128")


def supports(name: str, call: Call) -> Reason | None:
    """Why a library cannot run a call here; None if it can. Nothing is imported to find out."""
    if call.op != "attention":
        return Reason(Kind.NO_OP, f"{name} has no {call.op}")
    package = MODULES[name].partition(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(MODULES[name]) is None:
        return Reason(Kind.NOT_INSTALLED, f"{MODULES[name]} is not installed")
    if call.capability[0] < MIN_CAPABILITY[name]:
        return Reason(Kind.DEVICE, f"{name} needs compute capability {MIN_CAPABILITY[name]}.0")
    return LIMITS.refuse(name, call)


def order_frames(keys: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """keys [B, R, 2] -> frame indices [B, W], valid ones first, and the number of valid ones [B] int32."""
    frame = torch.arange(window, device=keys.device)[:, None]
    valid = ((keys[:, None, :, 0] <= frame) & (frame < keys[:, None, :, 1])).any(-1)
    return (~valid).to(torch.uint8).argsort(dim=1, stable=True), valid.sum(1, dtype=torch.int32)


def _gather(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, keys: Tensor, scales) -> tuple[Tensor, ...]:
    """k and v [B, W * S, H, D], valid keys first, and the number of valid keys [B] int32."""
    _no_scales(scales)
    order, count = order_frames(keys, k_cache.shape[1])
    k, v = (cache[slot[:, None], order].flatten(1, 2) for cache in (k_cache, v_cache))
    return k, v, count * k_cache.shape[2]


def _no_scales(scales) -> None:
    if scales is not None:
        raise ValueError("an FP8 cache: attention through libraries takes bfloat16 and float16 ones")


def cudnn(q, k_cache, v_cache, slot, keys, scales=None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    k, v, length = _gather(q, k_cache, v_cache, slot, keys, scales)
    valid = torch.arange(k.shape[1], device=k.device) < length[:, None]
    v = torch.where(valid[:, :, None, None], v, 0)  # 0 * NaN is NaN
    k = torch.where(valid[:, :, None, None], k, 0)
    bias = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill(~valid, float("-inf"))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
    return _empty_to_zero(out.transpose(1, 2), length)


def flash2(q, k_cache, v_cache, slot, keys, scales=None) -> Tensor:
    k, v, length = _gather(q, k_cache, v_cache, slot, keys, scales)
    attend = importlib.import_module(MODULES["flash2"]).flash_attn_with_kvcache
    return _empty_to_zero(attend(q, k, v, cache_seqlens=length, causal=False), length)


def flash3(q, k_cache, v_cache, slot, keys, scales=None) -> Tensor:
    _no_scales(scales)
    slots, window, tokens = k_cache.shape[:3]
    order, count = order_frames(keys, window)
    pages = (slot[:, None] * window + order).to(torch.int32)
    attend = importlib.import_module(MODULES["flash3"]).flash_attn_with_kvcache
    k, v = (cache.view(slots * window, *cache.shape[2:]) for cache in (k_cache, v_cache))
    out = attend(q, k, v, cache_seqlens=count * tokens, page_table=pages, causal=False)
    return _empty_to_zero(out, count)


def flash4(q, k_cache, v_cache, slot, keys, scales=None) -> Tensor:
    k, v, length = _gather(q, k_cache, v_cache, slot, keys, scales)
    out = importlib.import_module(MODULES["flash4"]).flash_attn_varlen_func(q, k, v, seqused_k=length, causal=False)
    return _empty_to_zero(out[0] if isinstance(out, tuple) else out, length)


def _empty_to_zero(out: Tensor, length: Tensor) -> Tensor:
    return torch.where((length > 0)[:, None, None, None], out, 0)
