"""Every op in plain torch with float32 inside: the CPU path, and the oracle that the kernels are tested against.

Letters: B rows, F frames, S tokens a frame, T = F * S tokens, H heads, D head dim, C channels, W cache frames,
N cache slots. Formulas and contracts stand in the public functions of `ops/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_KEYS = 512  # up to here two plain products beat the fused CPU kernel, most of all in its backward


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x.float(), (x.shape[-1],), eps=eps) * gain.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], cos and sin [B, T, D/2]: each neighbouring pair (a, b) turns by its angle."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def norm_rope(q: Tensor, k: Tensor, gain_q: Tensor, gain_k: Tensor, cos: Tensor, sin: Tensor, eps: float):
    """RMSNorm over the full width, then RoPE. q, k [B, T, C] -> [B, T, H, D], D = 2 * cos.shape[-1]."""
    heads = (-1, 2 * cos.shape[-1])
    q = rotate(rms_norm(q, gain_q, eps).unflatten(-1, heads), cos, sin)
    k = rotate(rms_norm(k, gain_k, eps).unflatten(-1, heads), cos, sin)
    return q, k


def norm_rope_append(q, k, v, gain_q, gain_k, cos, sin, eps, k_cache, v_cache, slot, write) -> Tensor:
    q, k = norm_rope(q, k, gain_q, gain_k, cos, sin, eps)
    frames = (write.shape[1], -1)
    k_cache[slot[:, None], write] = k.unflatten(1, frames).to(k_cache.dtype)
    v_cache[slot[:, None], write] = v.reshape(k.shape).unflatten(1, frames).to(v_cache.dtype)
    return q


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over layout [B, T, H, D]; bias broadcasts to [B, H, Tq, Tk]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and k.shape[2] <= FEW_KEYS:
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        scores = scores.float() if bias is None else scores.float() + bias  # autocast makes the product bfloat16
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, length: Tensor) -> Tensor:
    if q.device.type == "cpu":  # here a length is read where it lies, and only the valid frames are touched
        rows = zip(slot.tolist(), length.tolist())
        kv = [(k_cache[s, :n].flatten(0, 1), v_cache[s, :n].flatten(0, 1)) for s, n in rows]
        return torch.cat([sdpa(q[i : i + 1], k[None].to(q.dtype), v[None].to(q.dtype)) for i, (k, v) in enumerate(kv)])
    # On an accelerator reading a length would stop the stream, so every frame is loaded and the invalid ones masked.
    # Their keys and values are replaced as well: NaN - inf and 0 * NaN are NaN.
    window, tokens = k_cache.shape[1:3]
    valid = torch.arange(window, device=q.device) < length[:, None]
    used = valid[:, :, None, None, None]
    k, v = (torch.where(used, cache[slot], 0).flatten(1, 2).to(q.dtype) for cache in (k_cache, v_cache))
    bias = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill(~valid, float("-inf"))
    return sdpa(q, k, v, bias.repeat_interleave(tokens, dim=1)[:, None, None])


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    frames = shift.shape[1]
    y = F.layer_norm(x.float(), (x.shape[-1],), eps=eps).unflatten(1, (frames, -1))
    return (y * (1 + scale.float()[:, :, None]) + shift.float()[:, :, None]).flatten(1, 2).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    y = y.float().unflatten(1, (gate.shape[1], -1)) * gate.float()[:, :, None]
    return (x.float() + y.flatten(1, 2)).to(x.dtype)


def pool_frames(hidden: Tensor, frames: int, eps: float) -> Tensor:
    """Mean and deviation of the normalised tokens of each frame: hidden [B, T, C] -> [B, F, 2 C] float32."""
    y = F.layer_norm(hidden.float(), (hidden.shape[-1],), eps=eps).unflatten(1, (frames, -1))
    mean = y.mean(dim=2, keepdim=True)
    variance = (y - mean).square().mean(dim=2)
    return torch.cat((mean.squeeze(2), variance.add_(eps).sqrt_()), dim=-1)


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    return (x.float() - sigma.float()[:, :, None, None, None] * velocity.float()).to(x.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.float()[:, :, None, None, None]
    return ((1 - s) * x0.float() + s * noise.float()).to(x0.dtype)
