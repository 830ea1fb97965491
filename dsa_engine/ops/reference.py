"""Every op in plain torch with float32 inside: the CPU path, and the oracle of the kernels' tests.

Letters: B rows, F frames, S tokens a frame, T = F * S tokens, H heads, D head dim, C channels, W cache frames,
N cache slots. Formulas and contracts stand in the public functions of `ops/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_engine.kernel_types import Epilogue, HeadWeights, RowwiseFP8, StopRule

E4M3_MAX = 448.0  # the largest value of e4m3
FEW_KEYS = 512  # up to here two plain matmuls and their backward beat the fused kernel in training on a CPU


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x.float(), (x.shape[-1],), eps=eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], cos and sin [B, T, D/2]: each neighbouring pair (a, b) turns by its angle."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    if not torch.is_grad_enabled():  # a third of the time, but torch.compile has no complex numbers
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def norm_rope(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float):
    heads = (-1, 2 * cos.shape[-1])
    q = rotate(rms_norm(q, weight_q, eps).unflatten(-1, heads), cos, sin)
    k = rotate(rms_norm(k, weight_k, eps).unflatten(-1, heads), cos, sin)
    return q, k


def norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, eps, k_cache, v_cache, slot, write, scales=None) -> Tensor:
    q, k = norm_rope(q, k, weight_q, weight_k, cos, sin, eps)
    v = v.reshape(k.shape)
    if scales is not None:
        k = to_e4m3(k.float() / scales.k[slot][:, None, :, None])
        v = to_e4m3(v.float() / scales.v[slot][:, None, :, None])
    frames = (write.shape[1], -1)
    k_cache[slot[:, None], write] = k.unflatten(1, frames).to(k_cache.dtype)
    v_cache[slot[:, None], write] = v.unflatten(1, frames).to(v_cache.dtype)
    return q


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over layout [B, T, H, D]; bias broadcasts to [B, H, Tq, Tk]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if torch.is_grad_enabled() and q.device.type == "cpu" and k.shape[2] <= FEW_KEYS:
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        scores = scores.float() if bias is None else scores.float() + bias  # autocast makes the matmul bfloat16
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor | None = None, repeat: Tensor | None = None
) -> Tensor:
    if used is None:
        return sdpa(q, k, v)
    order = torch.arange(k.shape[1], device=k.device)
    valid, last = order < used[:, None], order == used[:, None] - 1
    k, v = (torch.where(valid[:, :, None, None], x, 0) for x in (k, v))
    bias = torch.where(last, repeat.log()[:, None], 0.0).masked_fill(~valid, float("-inf"))
    return sdpa(q, k, v, bias.to(q.dtype)[:, None, None])


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, keys: Tensor, scales=None) -> Tensor:
    if q.device.type == "cpu":  # runs are read in place, only valid frames are touched
        return torch.cat(
            [
                _attend_row(q[b : b + 1], k_cache, v_cache, s, runs, scales)
                for b, (s, runs) in enumerate(zip(slot.tolist(), keys.tolist()))
            ]
        )
    # Reading `keys` would synchronize a GPU, so every frame is loaded and invalid ones are masked. Their keys and
    # values are replaced as well: NaN - inf and 0 * NaN are NaN.
    window, tokens = k_cache.shape[1:3]
    frame = torch.arange(window, device=q.device)[:, None]
    valid = ((keys[:, None, :, 0] <= frame) & (frame < keys[:, None, :, 1])).any(-1)
    used = valid[:, :, None, None, None]
    k, v = (torch.where(used, cache[slot].to(q.dtype), 0).flatten(1, 2) for cache in (k_cache, v_cache))
    if scales is not None:
        k, v = _scaled(k, scales.k[slot]), _scaled(v, scales.v[slot])
    bias = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill(~valid, float("-inf"))
    out = sdpa(q, k, v, bias.repeat_interleave(tokens, dim=1)[:, None, None])
    return torch.where(valid.any(1)[:, None, None, None], out, 0)


def _attend_row(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: int, runs: list[list[int]], scales) -> Tensor:
    """One row [1, T, H, D] over its runs of frames."""
    runs = [run for run in runs if run[0] < run[1]]
    if not runs:
        return torch.zeros_like(q)
    parts = ([cache[slot, start:stop].flatten(0, 1) for start, stop in runs] for cache in (k_cache, v_cache))
    k, v = ((x[0] if len(runs) == 1 else torch.cat(x))[None].to(q.dtype) for x in parts)  # one run is not copied
    if scales is not None:
        k, v = _scaled(k, scales.k[slot, None]), _scaled(v, scales.v[slot, None])
    return sdpa(q, k, v)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, H, D] times scale [B, H]."""
    return (x.float() * scale[:, None, :, None]).to(x.dtype)


def norm_silu(
    x: Tensor, weight: Tensor, silu: bool = True, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    y = x.float() if bias is None else x.float() + bias.float()
    y = y * (x.shape[-1] ** 0.5 / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-12))
    y = y * weight.float()  # one step at a time: each keeps one more float32 tensor alive
    y = F.silu(y) if silu else y
    return y.to(x.dtype) if out is None else out.copy_(y)


def bias_residual(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    return (x.float() + (y.float() + bias.float())).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, fp8: bool = False):
    shift, scale = shift.float(), 1 + scale.float()
    if shift.shape[:2] == scale.shape[:2] == (1, 1):  # one modulation for all is LayerNorm's own weight and bias
        y = F.layer_norm(x.float(), (x.shape[-1],), scale[0, 0], shift[0, 0], eps)
    else:
        y = F.layer_norm(x.float(), (x.shape[-1],), eps=eps).unflatten(1, (shift.shape[1], -1))
        y = torch.addcmul(shift[:, :, None], y, scale[:, :, None]).flatten(1, 2)
    return quantize(y) if fp8 else y.to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    frames = (gate.shape[1], -1)
    x32, y32 = x.float().unflatten(1, frames), y.float().unflatten(1, frames)
    return torch.addcmul(x32, y32, gate.float()[:, :, None]).flatten(1, 2).to(x.dtype)


def residual_modulate(x, y, gate, shift, scale, eps, fp8=False):
    x = x + y if gate is None else gate_residual(x, y, gate)
    return x, modulate(x, shift, scale, eps, fp8)


def gelu_bias(x: Tensor, bias: Tensor, fp8: bool = False):
    y = F.gelu(x.float() + bias.float(), approximate="tanh")
    return quantize(y) if fp8 else y.to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.device.type == "cuda" and not torch.is_grad_enabled():
        # cuBLASLt's epilogue, which is the tanh approximation. The same call on a CPU means the exact GELU.
        y = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def to_e4m3(x: Tensor) -> Tensor:
    """Round to nearest even; saturate at the largest value instead of NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(x: Tensor) -> RowwiseFP8:
    top = x.float().abs().amax(dim=-1, keepdim=True)
    scale = top / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return RowwiseFP8(to_e4m3(x.float() / scale), scale)


def fp8_linear(x: RowwiseFP8, weight: RowwiseFP8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = (x.values.float() @ weight.values.float().T) * x.scale * weight.scale[:, 0]
    return (y if bias is None else y + bias.float()).to(dtype)


def pool_frames(hidden: Tensor, frames: int, eps: float) -> Tensor:
    y = F.layer_norm(hidden.float(), (hidden.shape[-1],), eps=eps).unflatten(1, (frames, -1))
    mean = y.mean(dim=2, keepdim=True)
    variance = (y - mean).square().mean(dim=2)
    return torch.cat((mean.squeeze(2), variance.add_(eps).sqrt_()), dim=-1)


def attention_pool(hidden: Sequence[Tensor], queries: Tensor, frames: int, eps: float) -> Tensor:
    y = torch.stack(list(hidden), dim=1).float()  # [B, N, T, C]
    y = F.layer_norm(y, (y.shape[-1],), eps=eps).unflatten(2, (frames, -1))
    share = (y @ queries.float().mT[:, None]).softmax(dim=-2)
    return (share.mT @ y).transpose(1, 2)


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    return (x.float() - sigma.float()[:, :, None, None, None] * velocity.float()).to(x.dtype)


def renoise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.float()[:, :, None, None, None]
    return ((1 - s) * x0.float() + s * noise.float()).to(x0.dtype)


def unpatchify(patches: Tensor, like: Tensor) -> Tensor:
    """patches [B, T, p * p * c], token order (frame, row, column), patch order (p, p, c) -> [B, F, c, H, W]."""
    batch, frames, channels, height, width = like.shape
    p = math.isqrt(patches.shape[-1] // channels)
    grid = patches.view(batch, frames, height // p, width // p, p, p, channels)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(like.shape)


def confidence_mlp(features: Tensor, head: HeadWeights) -> Tensor:
    """The confidence head's MLP: features [B, F, 3 C] -> logits [B, F] float32."""
    hidden = F.silu(F.linear(features.to(head.weight1.dtype), head.weight1, head.bias1))
    return F.linear(hidden, head.weight2, head.bias2).squeeze(-1).float()


def reduce_confidence(confidence: Tensor, reduce: Tensor) -> Tensor:
    """Confidence [B, F] of the frames, float32 -> [B] of the rows; reduce [B]: index of `REDUCE`."""
    low, mean, high = confidence.amin(1), confidence.sum(1) / confidence.shape[1], confidence.amax(1)
    return torch.where(reduce == 0, low, torch.where(reduce == 1, mean, high))


def stop_flags(confidence: Tensor, rule: StopRule) -> Tensor:
    """Which rows stop after this step: [B] bool."""
    confident = reduce_confidence(confidence, rule.reduce) >= rule.threshold
    return (rule.step >= rule.max_steps) | ((rule.step >= rule.min_steps) & confident)


def epilogue(hidden, time, x, noise, sigma, next_sigma, final, head, rule, eps) -> Epilogue:
    tokens = modulate(hidden, final.shift, final.scale, eps)
    velocity = unpatchify(F.linear(tokens, final.weight, final.bias), x)
    x0 = velocity_to_x0(x, velocity, sigma)
    confidence = x.new_full(x.shape[:2], float("nan"), dtype=torch.float32)  # never above a threshold
    if isinstance(head, Tensor):
        confidence = head.float().sigmoid()
    elif head is not None:
        features = torch.cat((pool_frames(hidden, time.shape[1], eps), time.float()), dim=-1)
        confidence = confidence_mlp(features, head).sigmoid()
    state = torch.cat((confidence, stop_flags(confidence, rule).float()[:, None]), dim=1)
    return Epilogue(x0, renoise(x0, noise, next_sigma), state)


def gaussian(seed: Tensor, chunk: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    rows = zip(seed.tolist(), chunk.tolist(), step.tolist())
    counters = (np.random.Philox(key=key % 2**64, counter=[0, 0, s, c]) for key, c, s in rows)
    words = torch.from_numpy(np.stack([bits.random_raw(-(-count // 2)).view(np.int64) for bits in counters]))
    low, high = words & 0xFFFFFFFF, (words >> 32) & 0xFFFFFFFF
    r = ((low >> 8).float().add_(0.5) * 2**-24).log_().mul_(-2).sqrt_()
    angle = high.float() * (2 * math.pi * 2**-32)
    pairs = torch.stack((r * angle.cos(), r * angle.sin()), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape).to(seed.device)
