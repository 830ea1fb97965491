"""The causal diffusion transformer: Wan 2.1's maths on one chunk of frames, with the past behind a `KVMemory`.

Modules own weights only. Timesteps, positions, the prompt's keys and values and the memory come in as arguments, so one
forward serves a denoising step, a KV commit and a teacher-forced training pass. Parameter names are Wan 2.1's own.
Source: Wan 2.1 `wan/modules/model.py`; per-frame modulation as in Self-Forcing `wan/modules/causal_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsa_engine import ops
from dsa_engine.config import ModelConfig
from dsa_engine.kernel_types import FinalLayer, RowwiseFP8
from dsa_engine.models.interfaces import KVMemory, TextKV
from dsa_engine.models.linear import fused_linear
from dsa_engine.models.rope import rope_table


class BlockModulation(NamedTuple):
    """One block's modulation, float32 [B, F, dim] each."""

    shift1: Tensor  # of the self-attention
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor  # of the feed-forward
    scale2: Tensor
    gate2: Tensor
    shift3: Tensor  # of the cross-attention, [1, 1, dim]: norm3's bias
    scale3: Tensor  # [1, 1, dim]: norm3's weight minus one


class DiTOutput(NamedTuple):
    """velocity [B, F, C, H, W]; hidden: tokens [B, T, dim] after each block that was asked for; time [B, F, dim], the
    timestep embedding."""

    velocity: Tensor
    hidden: tuple[Tensor, ...]
    time: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> DiTOutput:
        """The same with a function applied to every tensor."""
        return DiTOutput(function(self.velocity), tuple(map(function, self.hidden)), function(self.time))


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """[cos(t w_j), sin(t w_j)], w_j = 10000 ** (-j / (dim / 2)), in float64. t [...] -> [..., dim] float32."""
    half = dim // 2
    rates = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float64) / half)
    angles = t.to(torch.float64)[..., None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections and q/k norms that self- and cross-attention share; the norms span all heads, as in Wan."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)


class SelfAttention(Attention):
    def forward(self, x: Tensor | RowwiseFP8, layer: int, memory: KVMemory, rope: tuple[Tensor, Tensor]) -> Tensor:
        norm_weights = (self.norm_q.weight, self.norm_k.weight)
        q, k, v = fused_linear(x, (self.q, self.k, self.v))
        return self.o(memory.attend(layer, q, k, v, norm_weights, rope, self.norm_q.eps))


class CrossAttention(Attention):
    def keys_values(self, text: Tensor) -> Tensor:
        """text [B, L, dim] -> [2, B, L, H, D]: this layer's keys and values of a prompt, computed once per prompt."""
        k, v = fused_linear(text, (self.k, self.v))
        return torch.stack((self.norm_k(k), v)).unflatten(-1, self.heads)

    def forward(self, x: Tensor | RowwiseFP8, layer: int, text: TextKV) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, self.heads)
        k, v = text.kv[layer]
        return self.o(ops.cross_attention(q, k, v, text.used, text.repeat).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, config: ModelConfig):
        up, down = nn.Linear(config.dim, config.ffn_dim), nn.Linear(config.ffn_dim, config.dim)
        super().__init__(up, nn.GELU(approximate="tanh"), down)

    def forward(self, x: Tensor | RowwiseFP8, fp8: bool = False) -> Tensor:
        """[B, T, dim] -> [B, T, dim]. fp8: its two layers are `FP8Linear`."""
        up, _, down = self
        return down(up.gelu(x) if fp8 else ops.linear_gelu(x, up.weight, up.bias))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.fp8 = False  # whether its GEMMs and their inputs are (`models.fp8.quantize_linears`)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = FeedForward(config)

    # x --+----------------------------------(+)-+-----------------------(+)-+----------------------------(+)--> x
    #     |                                   |  |                        |  |                             |
    #     +-> norm, mod1 -> self-attn, gate1 -+  +-> norm3 -> cross-attn -+  +-> norm, mod2 -> FFN, gate2 -+
    # norm is LayerNorm without weights, mod is norm * (1 + scale) + shift. The end of a sub-layer and the norm of the
    # next are one op (`ops.residual_modulate`), which reads and writes x once: so y comes in normed and modulated for
    # this block, and leaves so for the next one.
    def forward(
        self,
        x: Tensor,
        y: Tensor | RowwiseFP8,
        mod: BlockModulation,
        next_mod: BlockModulation | None,
        layer: int,
        rope,
        text: TextKV,
        memory: KVMemory,
    ) -> tuple[Tensor, Tensor | RowwiseFP8 | None]:
        """x [B, T, dim], the residual stream, and y, its norm modulated by `mod` -> x and y, modulated by `next_mod`.

        After the last block next_mod is None, and so is y.
        """
        y = self.self_attn(y, layer, memory, rope)
        x, y = ops.residual_modulate(x, y, mod.gate1, mod.shift3, mod.scale3, self.eps, self.fp8)
        y = self.cross_attn(y, layer, text)
        x, y = ops.residual_modulate(x, y, None, mod.shift2, mod.scale2, self.eps, self.fp8)
        y = self.ffn(y, self.fp8)
        if next_mod is None:
            return ops.gate_residual(x, y, mod.gate2), None
        return ops.residual_modulate(x, y, mod.gate2, next_mod.shift1, next_mod.scale1, self.eps, self.fp8)


class Head(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.patch_size[1] * config.patch_size[2] * config.out_dim)

    def final_layer(self, time: Tensor) -> FinalLayer:
        """This layer as `ops.epilogue` takes it, for the timestep embeddings [B, F, dim]."""
        shift, scale = (self.modulation.float() + time.float()[:, :, None]).unbind(2)
        return FinalLayer(shift, scale, self.head.weight, self.head.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, weight, bias = self.final_layer(time)
        return F.linear(ops.modulate(x, shift, scale, self.eps), weight, bias)


class CausalDiT(nn.Module):
    """Predicts the flow velocity of a chunk of latent frames from its noisy latents, the prompt and the past.

    checkpointing: where gradients are needed, keep only what enters each block and compute the rest again (gradient
    checkpointing): memory for a third more time.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def text_kv(self, embeds: Tensor, collapse: bool = False) -> TextKV:
        """Keys and values of every cross-attention for prompt embeddings, once per prompt.

        embeds: [B, L <= text_len, text_dim]; short ones are padded with zeros, which Wan attends to, not masks.
        collapse: let one key stand for all of a prompt's padding, exactly (`ops.cross_attention`); reads the lengths,
        so it stops the stream once.
        """
        if embeds.ndim != 3 or embeds.shape[2] != self.config.text_dim or embeds.shape[1] > self.config.text_len:
            raise ValueError(
                f"prompt_embeds of shape {list(embeds.shape)}: must be [B, L, {self.config.text_dim}] "
                f"with L at most {self.config.text_len}"
            )
        embeds = F.pad(embeds.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - embeds.shape[1]))
        used = repeat = None
        if collapse:
            order = torch.arange(1, self.config.text_len + 1, device=self.device)
            length = (embeds.ne(0).any(-1) * order).amax(1)  # up to the last token that is not zero
            used = (length + 1).clamp(max=self.config.text_len)
            repeat = (self.config.text_len + 1 - used).float()
            embeds = embeds[:, : int(used.max())]
            if length.min() == self.config.text_len:
                used = repeat = None  # there is no padding
        text = self.text_embedding(embeds)
        return TextKV(torch.stack([block.cross_attn.keys_values(text) for block in self.blocks]), used, repeat)

    def forward(
        self, x: Tensor, t: Tensor, frames: Tensor, text_kv: TextKV, memory: KVMemory, taps: Sequence[int] = ()
    ) -> DiTOutput:
        """One forward over a chunk.

        x [B, F, C, H, W] noisy latents; t [B, F] timesteps in [0, 1000] (1000 sigma); frames [B, F] absolute positions;
        text_kv: of `text_kv()`; memory supplies the past and takes this chunk's keys and values; taps: blocks, from 0,
        whose output tokens are wanted (`ConfidenceHead.taps`).
        """
        batch, count, _, height, width = x.shape
        p = self.config.patch_size[1]
        tokens, time, hidden = self.forward_features(x, t, frames, text_kv, memory, taps)
        out = self.head(tokens, time)
        out = out.view(batch, count, height // p, width // p, p, p, self.config.out_dim)
        velocity = out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, count, self.config.out_dim, height, width)
        return DiTOutput(velocity, hidden, time)

    def forward_features(
        self, x: Tensor, t: Tensor, frames: Tensor, text_kv: TextKV, memory: KVMemory, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """`forward` without the head: tokens [B, T, dim] of the last block, the time embedding [B, F, dim] and the
        tokens after the blocks `taps`."""
        _, _, _, height, width = x.shape
        self.config.tokens_per_frame(height, width)  # raises for a size off the patch grid
        p = self.config.patch_size[1]
        tokens = self._patchify(x)
        time = self.time_embedding(timestep_features(t, self.config.freq_dim).to(self.dtype))
        mod = self.time_projection(time).unflatten(-1, (6, -1)).float()
        rope = rope_table(frames, height // p, width // p, self.config.head_dim, self.config.rope_theta)
        mods = [*self._modulations(mod), None]
        y = ops.modulate(tokens, mods[0].shift1, mods[0].scale1, self.config.eps, self.blocks[0].fp8)
        hidden = []
        for layer, block in enumerate(self.blocks):
            args = (tokens, y, *mods[layer : layer + 2], layer, rope, text_kv, memory)
            # A recomputation that stops early would leave FSDP's hooks of the last module unfinished.
            again = self.checkpointing and torch.is_grad_enabled()
            tokens, y = checkpoint(block, *args, use_reentrant=False, early_stop=False) if again else block(*args)
            if layer in taps:
                hidden.append(tokens)
        return tokens, time, tuple(hidden)

    def _modulations(self, mod: Tensor) -> list[BlockModulation]:
        """Every block's, from the projected timesteps [B, F, 6, dim], at once: not in small ops block by block."""
        levels = torch.stack([block.modulation for block in self.blocks]).float()[:, :, None] + mod
        norms = ([getattr(block.norm3, name) for block in self.blocks] for name in ("bias", "weight"))
        shift3, scale3 = (torch.stack(vectors).float()[:, None, None] for vectors in norms)
        return [BlockModulation(*own.unbind(2), *plain) for own, *plain in zip(levels, shift3, scale3 - 1)]

    def _patchify(self, x: Tensor) -> Tensor:
        """The strided convolution as one GEMM: [B, F, C, H, W] -> [B, F * H/p * W/p, dim]."""
        p = self.config.patch_size[1]
        patches = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 3, 5, 2, 4, 6)
        patches = patches.reshape(x.shape[0], -1, x.shape[2] * p * p).to(self.dtype)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
