"""Roofline of a chunk's forward: FLOP and bytes of every op, how often it runs, and the time that no version can beat.

FLOP are those of GEMMs and convolutions, 2 per multiply-add. Bytes: each input read once, each output written once,
nothing kept in cache between ops. The floor is the larger of FLOP / rate and bytes / bandwidth. Vector arithmetic is
left out: the heaviest, GELU, takes a tenth of the time of its bytes. At D = 128 the exponentials of attention (16 per
clock and SM, of 8,192 FLOP in FP8) take as long as its FP8 GEMMs: that floor is reached only if the two overlap.

The forward is that of `models.dit`: one GEMM for q, k and v; the end of each sub-layer fused with the norm of the next,
also across blocks, so `modulate` runs once, before the first, and `gate_residual` once, after the last; in bfloat16
GELU in the epilogue of its GEMM. With FP8 GEMMs it is an op of its own, which quantizes too. Left out: patch embedding
(0.01 % of the FLOP), and the embeddings of text and time, made once per prompt or noise level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dsa_engine.config import ModelConfig
from dsa_engine.models.confidence import TOKENS
from dsa_engine.models.wan_vae import WanVAE

TEXT_KEYS = 60  # of a usual prompt with its padding collapsed into the last
CHUNK = 3  # latent frames
KEY_FRAMES = (CHUNK, 12, 21)  # the first chunk, the mean of a 5-second clip, a full window
STEPS = (1, 2, 3, 4)
BF16, FP32 = 2, 4
INDEX = 8
PRECISIONS = ("bf16", "fp8")
STEP_OPS = ("epilogue", "gaussian")  # run once per denoising step, not per forward; a commit has none
VAE_LEVELS = ((384, 2), (96, 8))  # channels, and multiple of the latents' sides; up to 4 times the frames
NOT_TIMED = {
    "norm_rope": "`norm_rope_append` does the same and stores K and V; without a cache only training calls it",
    "velocity_to_x0": "a part of `epilogue`",
    "renoise": "a part of `epilogue`",
}


@dataclass(frozen=True)
class Rates:
    """FLOP per second of GEMMs and of attention, by precision, and bytes per second."""

    gemm: dict[str, float]
    attention: dict[str, float]
    memory: float


HOPPER = {"bf16": 989e12, "fp8": 1979e12}  # dense, by the datasheet; the two GPUs share the chip
GPUS = {"H100 SXM": Rates(HOPPER, HOPPER, 3.35e12), "H200": Rates(HOPPER, HOPPER, 4.8e12)}
# What good kernels reach: published figures, and 85 to 90 % of the bandwidth for a copy.
PRACTICAL = {
    name: Rates({"bf16": 620e12, "fp8": 1000e12}, {"bf16": 560e12, "fp8": 820e12}, 0.875 * rates.memory)
    for name, rates in GPUS.items()
}


@dataclass(frozen=True)
class Sizes:
    """One row's chunk, in the letters of `ops`. height and width in pixels; a latent pixel is 8 x 8 of them."""

    config: ModelConfig
    height: int
    width: int
    F: int = CHUNK

    @property
    def latent(self) -> tuple[int, int]:
        if self.height % 8 or self.width % 8:
            raise ValueError(f"size {self.height}x{self.width}: both must be multiples of 8 pixels")
        return self.height // 8, self.width // 8

    @property
    def S(self) -> int:
        return self.config.tokens_per_frame(*self.latent)

    @property
    def T(self) -> int:
        return self.F * self.S

    @property
    def C(self) -> int:
        return self.config.dim

    @property
    def H(self) -> int:
        return self.config.num_heads

    @property
    def patch(self) -> int:
        """Elements of a patch, P of the last layer."""
        return self.config.patch_size[1] ** 2 * self.config.out_dim

    @property
    def vae_dim(self) -> int:
        """Of the Wan VAE; a narrow one beside the small model, whose own codec is another."""
        return 8 if self.config == ModelConfig.preset("shapes") else 96

    @property
    def linears(self) -> dict[str, tuple[int, int, int, bool]]:
        """The forward's linear layers: N, K, how many per block, and whether an FP8 GEMM adds the bias (that of `up`
        `gelu_bias` adds). o is the shape of the output projections and of the queries of cross-attention."""
        c, ffn = self.C, self.config.ffn_dim
        return {"qkv": (3 * c, c, 1, True), "o": (c, c, 3, True), "up": (ffn, c, 1, False), "down": (c, ffn, 1, True)}


@dataclass(frozen=True)
class Row:
    """One op at one shape. calls: in a forward of each precision at a KV length; of `STEP_OPS`, in a step."""

    op: str  # a public function of `ops`; linear, a plain bfloat16 GEMM; or vae_decode, of a chunk after the first
    what: str
    precision: str
    flop: int
    read: int
    written: int
    calls: dict[str, int]
    frames: int | None = None  # of keys, for attention
    keys: int | None = None  # for cross_attention

    @property
    def fp8(self) -> bool:
        return self.precision == "fp8"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.what, "fp8" if self.fp8 else "")))

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def kind(self) -> str:
        if self.op in ("linear", "linear_gelu", "fp8_linear"):
            return "products"
        return self.op if self.flop else "elementwise"

    def microseconds(self, rates: Rates) -> tuple[float, float]:
        """(of the FLOP, of the bytes)"""
        rate = rates.attention if self.op in ("attention", "cross_attention") else rates.gemm
        return 1e6 * self.flop / rate[self.precision], 1e6 * self.bytes / rates.memory

    def floor(self, rates: Rates) -> float:
        return max(self.microseconds(rates))

    def bound(self, rates: Rates) -> str:
        flop, memory = self.microseconds(rates)
        return "products" if flop > memory else "bytes"


def calls(bf16: int, fp8: int | None = None) -> dict[str, int]:
    return {"bf16": bf16, "fp8": bf16 if fp8 is None else fp8}


def elementwise(s: Sizes) -> list[Row]:
    """The ops that only move bytes, in both precisions where they have two."""
    layers, tokens, vector, wide = s.config.num_layers, s.T * s.C, s.F * s.C * FP32, s.T * s.config.ffn_dim
    weight, table, index = s.C * BF16, s.T * s.config.head_dim * FP32, (1 + s.F) * INDEX
    scales = 2 * s.H * FP32
    rows = [
        Row("rms_norm", "", "bf16", 0, tokens * BF16 + weight, tokens * BF16, calls(layers)),
        Row("gate_residual", "", "bf16", 0, 2 * tokens * BF16 + vector, tokens * BF16, calls(1)),
        # of the outputs of both attentions, which no op before them quantizes
        Row("quantize", "", "fp8", 0, tokens * BF16, tokens + s.T * FP32, calls(0, 2 * layers)),
    ]
    for precision, size, per_row in (("bf16", BF16, 0), ("fp8", 1, s.T * FP32)):  # of what a GEMM or the cache takes
        fp8 = precision == "fp8"
        qkv = 3 * tokens * BF16 + 2 * weight + table + index + scales * fp8
        for op, read, written, count in (
            ("norm_rope_append", qkv, tokens * BF16 + 2 * tokens * size, layers),
            ("modulate", tokens * BF16 + 2 * vector, tokens * size + per_row, 1),
            ("residual_modulate", 2 * tokens * BF16 + 3 * vector, tokens * (BF16 + size) + per_row, 3 * layers - 1),
            ("gelu_bias", (wide + s.config.ffn_dim) * BF16, wide * size + per_row, layers * fp8),
        ):
            rows.append(Row(op, "", precision, 0, read, written, calls(0, count) if fp8 else calls(count, 0)))
    return rows


def attentions(s: Sizes) -> list[Row]:
    layers, queries, rows = s.config.num_layers, s.T * s.C * BF16, []
    for frames in KEY_FRAMES:
        keys, index = frames * s.S, 3 * INDEX
        flop = 4 * s.T * keys * s.C
        for precision, size, scales, count in (
            ("bf16", BF16, 0, calls(layers, 0)),
            ("fp8", 1, 2 * s.H * FP32, calls(0, layers)),
        ):
            read = queries + 2 * keys * s.C * size + index + scales
            rows.append(Row("attention", f"kv {keys}", precision, flop, read, queries, count, frames=frames))
    whole, part = s.config.text_len, min(TEXT_KEYS, s.config.text_len)
    for what, keys, index, count in ((f"keys {whole}", whole, 0, layers), (f"used {part}", part, INDEX + FP32, 0)):
        read, flop = queries + 2 * keys * s.C * BF16 + index, 4 * s.T * keys * s.C
        rows.append(Row("cross_attention", what, "bf16", flop, read, queries, calls(count), keys=keys))
    return rows


def linears(s: Sizes) -> list[Row]:
    rows = []
    for what, (n, k, count, bias) in s.linears.items():
        count, flop, written = count * s.config.num_layers, 2 * s.T * n * k, s.T * n * BF16
        read = (s.T * k + n * k + n) * BF16
        rows.append(Row("linear" if bias else "linear_gelu", what, "bf16", flop, read, written, calls(count, 0)))
        read = s.T * k + n * k + (s.T + n) * FP32 + n * BF16 * bias
        rows.append(Row("fp8_linear", what, "fp8", flop, read, written, calls(0, count)))
    return rows


def step_ops(s: Sizes) -> list[Row]:
    """What a denoising step does besides its forward; `epilogue` pools by itself. A step with a `TokenHead` has one
    `attention_pool` of three blocks' tokens instead; the row is for one block."""
    tokens, per_frame, latents = s.T * s.C * BF16, s.F * s.C, s.F * s.config.in_dim * s.latent[0] * s.latent[1] * BF16
    hidden = s.C // 2
    weights = (s.patch * s.C + s.patch + hidden * 3 * s.C + hidden + hidden + 1) * BF16
    modulation, rule = 2 * per_frame * FP32, 5 * FP32
    read = tokens + per_frame * BF16 + 2 * latents + 2 * s.F * FP32 + modulation + weights + rule
    flop = 2 * s.T * s.patch * s.C + 2 * s.F * hidden * (3 * s.C + 1)
    queries = TOKENS * s.C
    return [
        Row("pool_frames", "", "bf16", 0, tokens, 2 * per_frame * FP32, calls(0)),
        Row("attention_pool", "", "bf16", 4 * s.T * queries, tokens + queries * BF16, s.F * queries * FP32, calls(0)),
        Row("epilogue", "", "bf16", flop, read, 2 * latents + (s.F + 1) * FP32, calls(1)),
        Row("gaussian", "", "bf16", 0, 3 * INDEX, latents // BF16 * FP32, calls(1)),
    ]


def vae(s: Sizes) -> list[Row]:
    """The ops between the convolutions of the Wan VAE, at its lowest and its widest level; and the whole decode."""
    rows = []
    for channels, scale in VAE_LEVELS:
        pixels = s.F * min(scale, 4) * (scale * s.latent[0]) * (scale * s.latent[1])
        one, vector = pixels * channels * BF16, channels * BF16
        what = f"{channels} channels, x{scale}"
        rows.append(Row("norm_silu", what, "bf16", 0, one + 2 * vector, one, calls(0)))
        rows.append(Row("bias_residual", what, "bf16", 0, 2 * one + vector, one, calls(0)))
    return [*rows, Row("vae_decode", "", "bf16", *decode_counts(s.vae_dim, s.F, *s.latent), calls(0))]


@cache
def decode_counts(dim: int, *latents: int) -> tuple[int, int, int]:
    """FLOP, and bytes read and written, of one decode as a whole: weights, latents, frames, and the state twice."""
    frames, *sides = latents
    with torch.device("meta"), torch.no_grad():
        vae, chunk = WanVAE(dim).to("meta", torch.bfloat16), torch.empty(1, frames, 16, *sides, dtype=torch.bfloat16)
        _, state = vae.decode(chunk)
        with FlopCounterMode(display=False) as counter:
            pixels, _ = vae.decode(chunk, state)
    past = sum(x.nbytes for x in state)
    weights = sum(x.nbytes for part in (vae.conv2, vae.decoder) for x in part.parameters())
    return counter.get_total_flops(), weights + chunk.nbytes + past, pixels.nbytes + past


def rows(s: Sizes) -> list[Row]:
    return [*linears(s), *attentions(s), *elementwise(s), *step_ops(s), *vae(s)]


def forward(all_rows: Sequence[Row], precision: str, frames: int) -> list[Row]:
    """The rows that run in a forward over `frames` frames of keys."""
    return [r for r in all_rows if r.calls[precision] and r.op not in STEP_OPS and r.frames in (None, frames)]


@dataclass(frozen=True)
class Total:
    """Sums over the rows of a forward: FLOP by kind, bytes of the elementwise ops, and microseconds by GPU."""

    flop: dict[str, int]
    elementwise: int
    us: dict[str, float]


def total(some: Sequence[Row], precision: str, gpus: dict[str, Rates]) -> Total:
    flop = dict.fromkeys(("products", "attention", "cross_attention"), 0)
    for r in some:
        if r.flop:
            flop[r.kind] += r.calls[precision] * r.flop
    times = {name: sum(r.calls[precision] * r.floor(rates) for r in some) for name, rates in gpus.items()}
    return Total(flop, elementwise_bytes(some, precision), times)


def elementwise_bytes(some: Sequence[Row], precision: str) -> int:
    return sum(r.calls[precision] * r.bytes for r in some if not r.flop)


def in_epilogues(some: Sequence[Row], s: Sizes) -> list[Row]:
    """The rows if GEMM epilogues did still more: GELU moves nothing, and with bias, gate and residual the GEMM itself
    writes the stream, for one read of it."""
    tokens = s.T * s.C * BF16
    saved = {"residual_modulate": (0, tokens), "gate_residual": (tokens, tokens)}
    rows = []
    for r in (r for r in some if r.op != "gelu_bias"):
        read, written = saved.get(r.op, (0, 0))
        rows.append(replace(r, read=r.read - read, written=r.written - written))
    return rows
