"""Launches of the Triton kernels at the models' shapes, on meta tensors: what `triton_compile.py` compiles.

To add an op, write a function that returns its cases and name it in `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

ARCHES = (80, 86, 89, 90, 100, 120)
FP8 = (89, 90, 100, 120)  # e4m3 needs 8.9
BF16, E4M3, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


class Case(NamedTuple):
    """One launch. needs: kernel -> instructions that its SASS must have, as prefixes of opcodes parted by blanks;
    `MMA` and `ASYNC.128` stand for what the architecture has. arches: where the op runs; everywhere: the tests hold it
    on all of these."""

    name: str
    launch: Callable[[], object]
    needs: dict[str, str] = {}
    arches: tuple[int, ...] = ARCHES
    everywhere: bool = False


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Model(NamedTuple):
    """The shapes of one model: C channels, H heads of D, S tokens a frame, F frames a chunk, W frames of cache."""

    name: str
    C: int
    H: int
    D: int
    S: int
    F: int
    W: int


WAN = Model("wan 1.3B", 1536, 12, 128, 1560, 3, 21)
NARROW = Model("head dim 64", 1536, 24, 64, 1560, 3, 21)
SMALL = Model("small", 128, 4, 32, 16, 3, 12)


def norm_rope_cases() -> list[Case]:
    from dsa_engine.kernel_types import CacheScales
    from dsa_engine.triton_kernels import norm_rope as op

    def append(m: Model, dtype=BF16, cache=BF16):
        tokens = m.F * m.S
        q, k, v = meta(1, tokens, 3 * m.C, dtype=dtype).chunk(3, dim=-1)
        weights, rope = [meta(m.C, dtype=dtype)] * 2, [meta(1, tokens, m.D // 2, dtype=F32)] * 2
        kv = [meta(2, m.W, m.S, m.H, m.D, dtype=cache)] * 2
        slot, write = meta(1, dtype=torch.long), meta(1, m.F, dtype=torch.long)
        scales = CacheScales(*[meta(2, m.H, dtype=F32)] * 2) if cache == E4M3 else None
        return lambda: op.norm_rope_append(q, k, v, *weights, *rope, 1e-6, *kv, slot, write, scales)

    def norm(m: Model):
        return lambda: op.rms_norm(meta(1, m.F * m.S, m.C), meta(m.C), 1e-6)

    wide = {"norm_rope_kernel": "LDG.E.128 STG.E.128"}
    return [
        Case("norm_rope_append wan 1.3B bf16", append(WAN), wide),
        Case("norm_rope_append wan 1.3B fp8 cache", append(WAN, cache=E4M3), wide, FP8),
        Case("norm_rope_append small float32", append(SMALL, F32, F32), wide),
        Case("rms_norm wan 1.3B bf16", norm(WAN), {"rms_norm_kernel": "LDG.E.128 STG.E.128"}),
    ]


def row_cases() -> list[Case]:
    """modulate, pooling and fp8_linear: rows of hidden states, bound by memory.

    With float32 modulation a thread holds four channels, 16 bytes of it, so rows of bfloat16 move in 8 bytes a thread.
    """
    from dsa_engine.triton_kernels import fp8_linear, modulate, pooling

    def rows(m: Model, dtype=BF16):
        return meta(1, m.F * m.S, m.C, dtype=dtype)

    def vectors(m: Model, frames: int, dtype=F32):
        return meta(1, frames, 6, m.C, dtype=dtype).unbind(2)[:3]

    def norm(m: Model, dtype=BF16, vector=F32, fp8=False):
        return lambda: modulate.modulate(rows(m, dtype), *vectors(m, m.F, vector)[:2], 1e-6, fp8)

    def residual(m: Model, gate=True, fp8=False):
        first, then = vectors(m, m.F)[0] if gate else None, vectors(m, 1 if gate else m.F)[:2]
        return lambda: modulate.residual_modulate(rows(m), rows(m), first, *then, 1e-6, fp8)

    def gate(m: Model):
        return lambda: modulate.gate_residual(rows(m), rows(m), vectors(m, m.F)[0])

    def gelu(m: Model, ffn: int, fp8=False):
        return lambda: modulate.gelu_bias(meta(1, m.F * m.S, ffn), meta(ffn), fp8)

    def attention_pool(m: Model, dtype=BF16):
        return lambda: pooling.attention_pool([rows(m, dtype)], meta(1, 4, m.C, dtype=dtype), m.F, 1e-6)

    wide, half = "LDG.E.128 STG.E.128", "LDG.E.128 STG.E.64"
    weighted = {"weighted_kernel": "FFMA ASYNC.128", "join_weighted_kernel": "LDG.E.128"}
    pool = {"moments_kernel": "ASYNC.128", "join_kernel": "LDG.E.128"}
    return [
        Case("modulate wan 1.3B bf16", norm(WAN), {"modulate_kernel": half}),
        Case("modulate wan 1.3B bf16 vectors", norm(WAN, vector=BF16), {"modulate_kernel": wide}),
        Case("modulate wan 1.3B fp8", norm(WAN, fp8=True), {"modulate_kernel": "LDG.E.128 STG.E"}, FP8),
        Case("modulate small float32", norm(SMALL, F32), {"modulate_kernel": "LDG.E.64 STG.E.64"}),
        Case("residual_modulate wan 1.3B bf16", residual(WAN), {"modulate_kernel": half}),
        Case("residual_modulate wan 1.3B fp8", residual(WAN, False, True), {"modulate_kernel": half}, FP8),
        Case("gate_residual wan 1.3B bf16", gate(WAN), {"gate_residual_kernel": wide}),
        Case("gelu_bias wan 1.3B bf16", gelu(WAN, 8960), {"gelu_bias_kernel": wide}),
        Case("gelu_bias wan 1.3B fp8", gelu(WAN, 8960, True), {"gelu_bias_kernel": half}, FP8),
        Case("gelu_bias small bf16", gelu(SMALL, 512), {"gelu_bias_kernel": wide}),
        Case("quantize wan 1.3B", lambda: fp8_linear.quantize(rows(WAN)), {"quantize_kernel": half}, FP8),
        Case("pool_frames wan 1.3B", lambda: pooling.pool_frames(rows(WAN), WAN.F, 1e-6), pool),
        Case("attention_pool wan 1.3B", attention_pool(WAN), weighted),
        Case("attention_pool small float32", attention_pool(SMALL, F32), weighted | {"join_weighted_kernel": "LDG.E"}),
    ]


def epilogue_cases() -> list[Case]:
    from dsa_engine.kernel_types import FinalLayer, HeadWeights, StopRule
    from dsa_engine.triton_kernels import epilogue as op

    def step(m: Model, height: int, width: int, dtype=BF16, head: bool | str = True):
        vectors = meta(1, m.F, 2, m.C, dtype=F32).unbind(2)
        final = FinalLayer(*vectors, meta(64, m.C, dtype=dtype), meta(64, dtype=dtype))
        shapes = (m.C // 2, 3 * m.C), (m.C // 2,), (1, m.C // 2), (1,)
        mlp = HeadWeights(*(meta(*shape, dtype=dtype) for shape in shapes)) if head is True else None
        if head == "logits":
            mlp = meta(1, m.F, dtype=F32)
        rule = StopRule(*[meta(1, dtype=torch.int32)] * 4, meta(1, dtype=F32))
        hidden, time = meta(1, m.F * m.S, m.C, dtype=dtype), meta(1, m.F, m.C, dtype=dtype)
        latents, levels = [meta(1, m.F, 16, height, width)] * 2, [meta(1, m.F, dtype=F32)] * 2
        return lambda: op.epilogue(hidden, time, *latents, *levels, final, mlp, rule, 1e-6)

    def mix(op):
        return lambda: op(*[meta(1, 3, 16, 60, 104)] * 2, meta(1, 3, dtype=F32))

    tail = {"join_kernel": "LDG.E", "confidence_kernel": "ASYNC.128", "stop_kernel": "STG.E"}
    alone = {"tokens_kernel": "HMMA ASYNC.128", "stop_kernel": "STG.E"}
    wide = {"mix_kernel": "LDG.E.128 STG.E.128"}
    return [
        Case("epilogue wan 1.3B", step(WAN, 60, 104), {"tokens_kernel": "HMMA ASYNC.128", **tail}),
        Case("epilogue wan 1.3B no head", step(WAN, 60, 104, head=False), alone),
        Case("epilogue wan 1.3B logits", step(WAN, 60, 104, head="logits"), alone),
        Case("epilogue small float32", step(SMALL, 8, 8, F32), {"tokens_kernel": "FFMA ASYNC.128", **tail}),
        Case("velocity_to_x0 wan 1.3B", mix(op.velocity_to_x0), wide),
        Case("renoise wan 1.3B", mix(op.renoise), wide),
    ]


def attention_cases() -> list[Case]:
    from dsa_engine.triton_kernels import attention as op

    def attend(m: Model, dtype=BF16, cache=BF16, splits=1, runs=2):
        q = meta(1, m.F * m.S, m.H, m.D, dtype=dtype)
        kv = [meta(2, m.W * m.S, m.H, m.D, dtype=cache)] * 2
        slot, keys = meta(1, dtype=torch.long), meta(1, runs, 2, dtype=torch.long)
        scales = [meta(2, m.H, dtype=F32)] * 2 if cache == E4M3 else None
        return lambda: op.attend(q, *kv, slot, keys, scales=scales, frame=m.S, splits=splits)

    def cross(m: Model, length: int, dtype=BF16, bias=True):
        q, kv = meta(1, m.F * m.S, m.H, m.D, dtype=dtype), [meta(1, length, m.H, m.D, dtype=dtype)] * 2
        some = [meta(1, dtype=torch.int32), meta(1, dtype=F32)] if bias else [None, None]
        return lambda: op.cross_attention(q, *kv, *some)

    tensor = {"attention_kernel": "MMA ASYNC.128"}
    return [
        Case("attention wan 1.3B bf16", attend(WAN), tensor),
        Case(
            "attention wan 1.3B bf16, 2 parts",
            attend(WAN, splits=2),
            tensor | {"combine_kernel": "LDG.E.128 STG.E.128"},
            everywhere=True,
        ),
        Case("attention wan 1.3B float16", attend(WAN, torch.float16, torch.float16), tensor),
        Case("attention wan 1.3B fp8 cache", attend(WAN, cache=E4M3), tensor, FP8),
        Case("attention wan 1.3B fp8 cache, 2 parts", attend(WAN, cache=E4M3, splits=2), tensor, FP8, True),
        Case("attention head dim 64 bf16", attend(NARROW), tensor),
        Case("attention small bf16", attend(SMALL), tensor),
        Case("attention small float32", attend(SMALL, F32, F32), {"attention_kernel": "FFMA"}),
        Case("cross_attention wan 1.3B bf16", cross(WAN, 512), tensor, everywhere=True),
        Case("cross_attention wan 1.3B bf16, all keys", cross(WAN, 512, bias=False), tensor),
        Case("cross_attention wan 1.3B float32", cross(WAN, 512, F32), {"attention_kernel": "FFMA"}),
    ]


def noise_cases() -> list[Case]:
    from dsa_engine.triton_kernels import noise as op

    rows = [meta(1, dtype=torch.long)] * 3
    return [Case("gaussian wan 1.3B", lambda: op.gaussian(*rows, (3, 16, 60, 104)), {"_gaussian": "STG.E.128"})]


def norm_silu_cases() -> list[Case]:
    """Channels of the Wan VAE's levels, written behind two frames of the past."""
    from dsa_engine.triton_kernels import norm_silu as op

    def norm(channels: int, dtype=BF16, silu=True, biased=True, past=0):
        x, vectors = meta(1, 12, 60, 104, channels, dtype=dtype), [meta(channels, dtype=dtype)] * 2
        out = meta(1, 12 + past, 60, 104, channels, dtype=dtype)[:, past:]
        return lambda: op.norm_silu(x, vectors[0], silu, vectors[1] if biased else None, out)

    def residual(channels: int, dtype=BF16):
        x = meta(1, 12, 60, 104, channels, dtype=dtype)
        return lambda: op.bias_residual(x, x, meta(channels, dtype=dtype))

    wide = "LDG.E.128 STG.E.128"
    return [
        *(Case(f"norm_silu {c} bf16", norm(c, past=2), {"norm_silu_kernel": wide}) for c in (96, 192, 384)),
        Case("norm_silu 384 bf16, no silu, no bias", norm(384, silu=False, biased=False), {"norm_silu_kernel": wide}),
        Case("norm_silu 96 float32", norm(96, F32), {"norm_silu_kernel": wide}),
        *(Case(f"bias_residual {c} bf16", residual(c), {"bias_residual_kernel": wide}) for c in (96, 192, 384)),
    ]


OPS = {
    "norm_rope": norm_rope_cases,
    "rows": row_cases,
    "epilogue": epilogue_cases,
    "attention": attention_cases,
    "norm_silu": norm_silu_cases,
    "noise": noise_cases,
}


def all_cases(ops: Iterable[str] = OPS) -> list[Case]:
    return [case for op in ops for case in OPS[op]()]
