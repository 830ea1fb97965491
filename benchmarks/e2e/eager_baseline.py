"""The baseline: the same model in plain PyTorch, rolled out as the Self-Forcing authors roll theirs out.

Same weights, dtype, threads and decoder, but norms, modulation and residuals are ops of their own, RoPE multiplies
complex numbers in float64, the window of keys and values is shifted by a copy when it rolls, attention is torch's SDPA,
all `text_len` keys of the prompt are attended to, every chunk takes all steps, and its clean keys and values take a
forward of their own at t = 0, except for a clip's last chunk. Given the engine's noise, its latents are the engine's up
to rounding (`difference`). In its favour: nothing is read back from the device, and the angles of RoPE are computed
once per forward, where the authors' code computes them in every layer.

`compiled` puts torch.compile round the two halves of a block and, on a GPU, asks for cuDNN's SDPA; its RoPE is in real
numbers, since Inductor has no complex ones. The decoder is left as it is.

Source: Self-Forcing (arXiv 2506.08009), its `pipeline/causal_inference.py` and `wan/modules/causal_model.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.e2e.timeline import Chunk
from dsa_engine import Fixed, Pipeline
from dsa_engine.engine.device import Moment
from dsa_engine.engine.session import to_uint8
from dsa_engine.models.dit import CausalDiT
from dsa_engine.sampling.schedule import TIMESTEPS, Schedule

Noise = Callable[[int, int], Tensor]  # (chunk, step), both from 0: [1, F, C, h, w]


class ShiftedCache:
    """Keys and values of every layer [1, window * tokens, H, D] in the order of their frames, the sink first."""

    def __init__(self, layers: int, window: int, sink: int, frames: int, like: Tensor):
        """frames: of a chunk; like: the keys of one frame [1, S, H, D]."""
        self.window, self.sink, self.frames, self.tokens = window, sink, frames, like.shape[1]
        shape = (len(like), window * self.tokens, *like.shape[2:])
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.filled = 0  # frames, the current chunk's included

    def roll(self) -> None:
        """Make room for the next chunk: what is kept moves to the front, behind the sink."""
        evicted = max(0, self.filled + self.frames - self.window)
        if evicted:
            start, end, by = (n * self.tokens for n in (self.sink, self.filled, evicted))
            for x in (x for kv in self.layers for x in kv):
                x[:, start : end - by] = x[:, start + by : end].clone()
        self.filled += self.frames - evicted

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the chunk's own; returns all that it sees."""
        end = self.filled * self.tokens
        for x, new in zip(self.layers[layer], (k, v)):
            x[:, end - new.shape[1] : end] = new
        return tuple(x[:, :end] for x in self.layers[layer])


def layer_norm(x: Tensor, eps: float, affine: nn.LayerNorm | None = None) -> Tensor:
    weight_bias = () if affine is None else (affine.weight.float(), affine.bias.float())
    return F.layer_norm(x.float(), x.shape[-1:], *weight_bias, eps=eps).type_as(x)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + norm.eps)
    return y.type_as(x) * norm.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, C], shift and scale [B, F, 1, C]: each frame's tokens with its own."""
    return (x.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


def rotate_complex(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T, H, D] times rotation complex128 [T, 1, D / 2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def rotate_real(x: Tensor, rotation: Tensor) -> Tensor:
    """The same with rotation float32 [T, 1, D / 2, 2], cosines and sines."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, C]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


class EagerDiT:
    """The forward of a `CausalDiT` on its own weights, for one clip."""

    def __init__(self, dit: CausalDiT, compiled: bool = False):
        self.dit, self.config, self.compiled = dit, dit.config, compiled
        self.rotate = rotate_real if compiled else rotate_complex
        first, second = self._first_half, self._second_half
        if compiled:
            first, second = (torch.compile(half, dynamic=False) for half in (first, second))
        self.first_half, self.second_half = first, second

    def text(self, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values of a prompt [1, L, text_dim], padded with zeros to text_len."""
        embeds = F.pad(embeds.to(self.dit.device, self.dit.dtype), (0, 0, 0, self.config.text_len - embeds.shape[1]))
        text = self.dit.text_embedding(embeds)
        heads = (self.config.num_heads, -1)
        attentions = [block.cross_attn for block in self.dit.blocks]
        return [(rms_norm(a.k(text), a.norm_k).unflatten(2, heads), a.v(text).unflatten(2, heads)) for a in attentions]

    def __call__(self, x: Tensor, sigma: float, start: int, text: list[tuple[Tensor, Tensor]], cache: ShiftedCache):
        """Velocity of the chunk x [1, F, C, h, w] whose first frame is frame `start` of the clip."""
        dit, frames = self.dit, x.shape[1]
        tokens = dit.patch_embedding(x.transpose(1, 2))  # [1, dim, F, h / p, w / p]
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        emb = dit.time_embedding(self._sinusoid(x.new_full((1, frames), TIMESTEPS * sigma, dtype=torch.float64)))
        levels = dit.time_projection(emb).unflatten(2, (6, -1))
        rotation = self._rotation(start, grid)
        for layer, block in enumerate(dit.blocks):
            q, k, v, after = self.first_half(block, tokens, levels, rotation)
            y = sdpa(q, *cache.append(layer, k, v))
            tokens = self.second_half(block, tokens, y, after, *text[layer])
        shift, scale = (dit.head.modulation[:, None] + emb[:, :, None]).chunk(2, dim=2)
        tokens = dit.head.head(modulate(layer_norm(tokens, self.config.eps), shift, scale))
        p = self.config.patch_size[1]
        tokens = tokens.view(1, *grid, p, p, self.config.out_dim)
        return torch.einsum("bfhwpqc->bfchpwq", tokens).reshape(1, frames, self.config.out_dim, *x.shape[3:])

    def _first_half(self, block: nn.Module, x: Tensor, levels: Tensor, rotation: Tensor):
        """Up to the self-attention: q, k, v [B, T, H, D], and the modulation that is still to come."""
        shift, scale, *after = (block.modulation[:, None] + levels).chunk(6, dim=2)
        y, attn, heads = modulate(layer_norm(x, block.eps), shift, scale), block.self_attn, (self.config.num_heads, -1)
        q, k = rms_norm(attn.q(y), attn.norm_q), rms_norm(attn.k(y), attn.norm_k)
        q, k, v = (z.unflatten(2, heads) for z in (q, k, attn.v(y)))
        return self.rotate(q, rotation), self.rotate(k, rotation), v, after

    def _second_half(self, block: nn.Module, x: Tensor, y: Tensor, after: list[Tensor], text_k: Tensor, text_v: Tensor):
        gate1, shift2, scale2, gate2 = after
        x = x + gated(block.self_attn.o(y), gate1)
        cross = block.cross_attn
        q = rms_norm(cross.q(layer_norm(x, block.eps, block.norm3)), cross.norm_q)
        x = x + cross.o(sdpa(q.unflatten(2, (self.config.num_heads, -1)), text_k, text_v))
        return x + gated(block.ffn(modulate(layer_norm(x, block.eps), shift2, scale2)), gate2)

    def _sinusoid(self, t: Tensor) -> Tensor:
        half = self.config.freq_dim // 2
        angles = t[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.dit.dtype)

    def _rotation(self, start: int, grid: tuple[int, int, int]) -> Tensor:
        """[T, 1, D / 2]: by how much each token's pairs turn, first those of time, then of height and of width."""
        half, options = self.config.head_dim // 2, {"dtype": torch.float64, "device": self.dit.device}
        axes = [torch.arange(first, first + count, **options) for first, count in zip((start, 0, 0), grid)]
        angles = []
        for positions, pairs in zip(
            torch.meshgrid(*axes, indexing="ij"), (half - 2 * (half // 3), half // 3, half // 3)
        ):
            rates = self.config.rope_theta ** (-torch.arange(pairs, **options) / pairs)
            angles.append(positions.reshape(-1, 1, 1) * rates)
        angles = torch.cat(angles, dim=-1)
        rotation = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(rotation).float() if self.compiled else rotation


class Baseline:
    """Opens streams of one pipeline's model, decoder and schedule. dit: another generator than its own."""

    def __init__(self, pipe: Pipeline, compiled: bool = False, dit: CausalDiT | None = None):
        if pipe.config.rope == "relative" and pipe.config.sink:
            raise ValueError(f"rope={pipe.config.rope!r} with sink={pipe.config.sink}: the baseline's sink never moves")
        self.pipe, self.dit = pipe, dit or pipe.engine.dit
        self.model = EagerDiT(self.dit, compiled)
        self.sigmas = Schedule(pipe.config.steps, pipe.config.shift).sigmas

    def attention(self):
        """Which SDPA: torch's choice or, compiled and on a GPU, cuDNN's."""
        force = self.model.compiled and self.dit.device.type == "cuda"
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if force else nullcontext()


class BaselineStream:
    """One clip."""

    def __init__(
        self,
        baseline: Baseline,
        embeds: Tensor,
        window: int,
        size: tuple[int, int],
        chunks: int | None = None,
        noise: Noise | None = None,
    ):
        """window: frames of the cache, the current chunk's included; size: of the latents; chunks: of the clip, None
        for an endless one; noise: torch's own by default."""
        self.baseline, self.chunks = baseline, chunks
        pipe, dit = baseline.pipe, baseline.dit
        self.frames, self.decoder, self.device = pipe.config.chunk_frames, pipe.engine.decoder, dit.device
        shape, options = (1, self.frames, dit.config.in_dim, *size), {"device": dit.device, "dtype": dit.dtype}
        self.noise = noise or (lambda chunk, step: torch.randn(shape, **options))
        with torch.inference_mode():
            self.text = baseline.model.text(embeds)
            frame = torch.empty(1, dit.config.tokens_per_frame(*size), *self.text[0][0].shape[2:], **options)
            self.cache = ShiftedCache(len(self.text), window, pipe.config.sink, self.frames, frame)
        self.index, self.state = 0, None

    @torch.inference_mode()
    def next(self) -> Chunk:
        start, begun = time.perf_counter(), Moment(self.device)
        latents = self.denoise()
        denoised = Moment(self.device)
        forwards = len(self.baseline.sigmas) + self.commit(latents)
        committed = Moment(self.device)
        pixels, self.state = self.decoder.decode(latents, self.state)
        decoded = Moment(self.device)
        frames = len(to_uint8(pixels[0]))  # waits for all of it
        times = {"denoise": denoised.since(begun), "commit": committed.since(denoised)}
        times |= {"decode": decoded.since(committed)}
        ms = {stage: 1e3 * seconds for stage, seconds in times.items()}
        return Chunk.delivered(len(self.baseline.sigmas), frames, [self.cache.filled] * forwards, ms, start)

    def denoise(self) -> Tensor:
        """The next chunk's latents, after all steps."""
        self.cache.roll()
        sigmas, x = self.baseline.sigmas, self.noise(self.index, 0)
        for step, (sigma, after) in enumerate(zip(sigmas, (*sigmas[1:], 0.0)), 1):
            x0 = (x.float() - sigma * self.forward(x, sigma).float()).type_as(x)
            if step < len(sigmas):
                x = ((1 - after) * x0.float() + after * self.noise(self.index, step).float()).type_as(x)
        return x0

    def commit(self, latents: Tensor) -> bool:
        """Write the clean keys and values, unless the clip ends here; on to the next chunk."""
        more = self.chunks is None or self.index + 1 < self.chunks
        if more:
            self.forward(latents, 0.0)
        self.index += 1
        return more

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        with self.baseline.attention():
            return self.baseline.model(x, sigma, self.index * self.frames, self.text, self.cache)

    def close(self) -> None:
        """Nothing to give back."""


def difference(pipe: Pipeline, baseline: Baseline, embeds: Tensor, size: tuple[int, int], chunks: int) -> dict:
    """The engine's latents of a clip against the baseline's, both from the same noise and with all steps."""
    noise = draw_noise(pipe, size, chunks)
    return {"chunks": chunks} | errors(engine_latents(pipe, embeds, noise), eager_latents(baseline, embeds, noise))


def fidelity(pipe: Pipeline, embeds: Tensor, size: tuple[int, int], chunks: int, dit: CausalDiT | None = None) -> dict:
    """The engine's latents against those of plain PyTorch in float32, from the same noise and with all steps; eager:
    those of plain PyTorch in the engine's dtype. dit: the weights before quantization, where the engine's are FP8."""
    dit, noise = dit or pipe.engine.dit, draw_noise(pipe, size, chunks)
    exact = eager_latents(Baseline(pipe, dit=copy.deepcopy(dit).float()), embeds, noise)
    eager = eager_latents(Baseline(pipe, dit=dit), embeds, noise)
    return {"chunks": chunks} | errors(engine_latents(pipe, embeds, noise), exact) | {"eager": errors(eager, exact)}


def draw_noise(pipe: Pipeline, size: tuple[int, int], chunks: int) -> Tensor:
    """[S, 1, F, C, h, w] in the model's dtype: the initial noise, and that after each step but the last."""
    dit, levels = pipe.engine.dit, len(pipe.config.steps)
    shape = (levels, 1, chunks * pipe.config.chunk_frames, dit.config.in_dim, *size)
    generator = torch.Generator(dit.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=dit.device).to(dit.dtype)


def engine_latents(pipe: Pipeline, embeds: Tensor, noise: Tensor) -> Tensor:
    renoise = noise[1:] if len(noise) > 1 else None
    return pipe.generate_latents(noise[0], embeds, renoise, Fixed(len(noise)), commit="clean")


@torch.inference_mode()
def eager_latents(baseline: Baseline, embeds: Tensor, noise: Tensor) -> Tensor:
    size = baseline.pipe.config.chunk_frames
    per_chunk = noise.to(baseline.dit.dtype).split(size, dim=2)
    window = baseline.pipe.config.window or len(per_chunk) * size
    stream = BaselineStream(
        baseline, embeds, window, noise.shape[-2:], len(per_chunk), lambda chunk, step: per_chunk[chunk][step]
    )
    latents = []
    for _ in per_chunk:
        latents.append(stream.denoise())
        stream.commit(latents[-1])
    return torch.cat(latents, dim=1)


def errors(ours: Tensor, theirs: Tensor) -> dict:
    """The largest absolute difference, that relative to the largest magnitude of theirs, and PSNR in dB with this
    magnitude as the peak, None where they are equal."""
    error, peak = (ours.double() - theirs.double()).abs(), theirs.double().abs().max().item()
    mse = error.square().mean().item()
    return {
        "max_abs": error.max().item(),
        "relative": error.max().item() / peak,
        "psnr_db": 10 * math.log10(peak**2 / mse) if mse else None,
    }
