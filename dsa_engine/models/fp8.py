"""FP8 for a whole model: the named modes, what a device supports, FP8 weights, and the scales of an FP8 cache.

"fp8-linear" stores the weights of the blocks' GEMMs in e4m3 with one scale per output channel, and quantizes their
inputs per token; "fp8-cache" stores keys and values in e4m3 with one scale per layer and head; "fp8" does both.
Embeddings, the prompt's keys and values, norms, modulation and the last layer stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine.kernel_types import CacheScales
from dsa_engine.models.dit import Attention, Block, CausalDiT, timestep_features
from dsa_engine.models.linear import FP8Linear
from dsa_engine.ops.reference import E4M3_MAX

E4M3 = torch.float8_e4m3fn
CAPABILITY = (8, 9)  # e4m3 in hardware: Ada, Hopper and later


class Quantization(NamedTuple):
    """What is in e4m3."""

    linear: bool
    cache: bool


QUANTIZATIONS = {
    "fp8": Quantization(linear=True, cache=True),
    "fp8-linear": Quantization(linear=True, cache=False),
    "fp8-cache": Quantization(linear=False, cache=True),
}


def quantization(name: str | None, device: torch.device | str) -> Quantization:
    """The mode of a name, None for neither. Raises ValueError for an unknown name, or a device without support."""
    if name is None:
        return Quantization(False, False)
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r}: must be None or one of {', '.join(QUANTIZATIONS)}")
    why = unavailable(device)
    if why is not None:
        raise ValueError(f"quantization={name!r}: {why}; nearest is quantization=None")
    return QUANTIZATIONS[name]


def unavailable(device: torch.device | str) -> str | None:
    """Why a device cannot run in FP8; None if it can. A CPU computes in float32 on values rounded to e4m3: slower than
    without, but with FP8's results."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    needs = ".".join(map(str, CAPABILITY))
    return None if (major, minor) >= CAPABILITY else f"compute capability {major}.{minor}: e4m3 needs {needs}"


def quantize_linears(dit: CausalDiT) -> None:
    """Replace the linear layers of every block by FP8 ones, in place: q, k, v and o of the self-attention, q and o of
    the cross-attention, both of the feed-forward. The prompt's k and v run once per prompt and stay as they are.

    Raises ValueError, with nothing replaced, for sizes that FP8's tensor cores do not support, and on a GPU for another
    dtype than bfloat16, the only one that a GEMM with row-wise scales returns there.
    """
    for name in ("dim", "ffn_dim"):
        size = getattr(dit.config, name)
        if size % 16:
            near = max(16, round(size / 16) * 16)
            raise ValueError(f"{name}={size}: FP8 GEMMs need a multiple of 16; nearest is {near}")
    if dit.device.type == "cuda" and dit.dtype != torch.bfloat16:
        raise ValueError(f"dtype={dit.dtype}: FP8 GEMMs on a GPU give torch.bfloat16; load the model in that dtype")
    for block in dit.blocks:
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        own.q, own.k, own.v = FP8Linear.of((own.q, own.k, own.v))
        for owner, name in ((own, "o"), (cross, "q"), (cross, "o"), (ffn, "0"), (ffn, "2")):
            setattr(owner, name, *FP8Linear.of((getattr(owner, name),)))
        block.fp8 = True


@torch.inference_mode()
def cache_scales(dit: CausalDiT, timesteps: Sequence[float]) -> CacheScales:
    """Scales of an FP8 cache, from the weights alone: k, v [layers, H].

    They are bounds that no key or value exceeds at these timesteps (rounding aside), so nothing is ever clamped and no
    calibration data is needed. With C channels:
        a key has RMS 1 over its C channels before the norm's weight g, and RoPE keeps the length of a pair:
            |k_j| <= sqrt(C) max|g|                                           max over the head's channels
        a value is W y + b with y = LayerNorm(x) (1 + scale) + shift, and |LayerNorm(x)| <= sqrt(C):
            |v_j| <= sqrt(C) |W_j (1 + scale)| + |W_j shift + b_j|            max over channels and timesteps
    The usual key or value is about sqrt(C) smaller than its bound (39 times for Wan). In a floating-point format that
    costs nothing: e4m3 has its 3 bits from 448 down to 2^-6, 28,672 times less.
    """
    heads = dit.config.num_heads
    t = torch.tensor(sorted(set(timesteps)), device=dit.device)
    time = dit.time_embedding(timestep_features(t, dit.config.freq_dim).to(dit.dtype))
    mod = dit.time_projection(time).unflatten(-1, (6, -1)).float()
    k = torch.stack([key_bounds(block, heads) for block in dit.blocks])
    v = torch.stack([value_bounds(block, mod, heads) for block in dit.blocks])
    return CacheScales(*(torch.where(x > 0, x / E4M3_MAX, 1.0) for x in (k, v)))


def key_bounds(block: Block, heads: int) -> Tensor:
    """[H]"""
    weight = block.self_attn.norm_k.weight.float()
    return sqrt(len(weight)) * weight.abs().unflatten(0, (heads, -1)).amax(1)


def value_bounds(block: Block, mod: Tensor, heads: int) -> Tensor:
    """mod [timesteps, 6, C] -> [H]"""
    shift, scale = (block.modulation.float() + mod).unbind(1)[:2]
    weight, bias = value_weight(block.self_attn)
    length = ((1 + scale).square() @ weight.square().T).sqrt()
    bound = sqrt(weight.shape[1]) * length + (shift @ weight.T + bias).abs()
    return bound.amax(0).unflatten(0, (heads, -1)).amax(1)


def value_weight(attention: Attention) -> tuple[Tensor, Tensor]:
    """Weight and bias of the V projection in float32, dequantized if the layer is FP8."""
    layer = attention.v
    scale = layer.scale if isinstance(layer, FP8Linear) else 1.0
    return layer.weight.float() * scale, layer.bias.float()
