"""Compiles the Triton kernels for real GPUs on a machine that has none, at the shapes of the models.

`python tests/triton_compile.py` prints a table, `--json` the same for `tests/ops/test_compile.py`. Every case calls a
real launcher on meta tensors while `JITFunction.run` compiles instead of launching, so what is compiled is what runs.
It must run in a process of its own, without TRITON_INTERPRET. To add an op, write a function that returns its cases and
name it in `all_cases`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHES = (80, 90)
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may have
SHARED_SM = {80: 167_936, 90: 233_472}  # bytes an SM has; each block takes 1 KB more than it asks for
BF16, E4M3, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


class Case(NamedTuple):
    """One launch. needs: kernel -> instructions that its SASS must have, as prefixes of opcodes parted by blanks;
    `MMA` and `ASYNC.128` stand for what the architecture has. arches: FP8 needs 89 or later."""

    name: str
    launch: Callable[[], object]
    needs: dict[str, str] = {}
    arches: tuple[int, ...] = ARCHES


@dataclass
class Kernel:
    """One compiled kernel. registers a thread, shared bytes a block, stack and local bytes a thread (spills show as
    either), blocks that fit an SM, opcodes: SASS opcode -> count."""

    case: str
    name: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    blocks: int
    opcodes: dict[str, int]

    def count(self, prefix: str) -> int:
        """How often an instruction occurs: `LDG.E.128` counts LDG.E.128 and LDG.E.128.CONSTANT alike."""
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(f"{prefix}."))


NAMES = {  # what a need stands for, by architecture
    80: {"MMA": "HMMA", "ASYNC.128": "LDGSTS.E.BYPASS.128"},
    90: {"MMA": "HGMMA", "ASYNC.128": "LDGSTS.E.BYPASS.128"},
}


def missing(kernel: Kernel, needs: str) -> list[str]:
    """Which of the needed instructions the kernel lacks."""
    wanted = [NAMES[kernel.arch].get(need, need) for need in needs.split()]
    return [need for need in wanted if not kernel.count(need)]


def blocks_per_sm(arch: int, registers: int, warps: int, shared: int) -> int:
    """Blocks that fit an SM: 64 K registers, handed to a warp by the 256; 64 warps; 32 blocks; the shared memory."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(32, 64 // warps, by_registers, SHARED_SM[arch] // (shared + 1024))


class AheadOfTime(GPUDriver):
    """A GPU that is not there. Its number is its architecture, since compiled kernels are kept by device."""

    def __init__(self, arch: int):
        self.arch = arch

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed")


def tool(name: str, *args: str) -> str:
    """Output of a program of Triton's own CUDA toolkit."""
    return subprocess.check_output([getattr(triton.knobs.nvidia, name).path, *args], text=True)


def inspect(case: str, arch: int, compiled) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    used = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = blocks_per_sm(arch, used["REG"], warps, shared)
    return Kernel(case, compiled.metadata.name, arch, used["REG"], used["STACK"], used["LOCAL"], shared, warps, blocks,
                  dict(opcodes))  # fmt: skip


def compile_cases(cases: list[Case]) -> list[Kernel]:
    """Every kernel that the cases launch, for every architecture of theirs."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels[case.name, arch, compiled.hash] = compiled
        return compiled

    JITFunction.run = compile_only
    try:
        for arch in ARCHES:
            driver.set_active(AheadOfTime(arch))
            for case in (c for c in cases if arch in c.arches):
                case.launch()
    finally:
        JITFunction.run = run
    return [inspect(case, arch, compiled) for (case, arch, _), compiled in kernels.items()]


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
SMALL = Model("small", 128, 4, 32, 16, 3, 12)


def norm_rope_cases() -> list[Case]:
    from dsa_engine.structures import CacheScales
    from dsa_engine.triton_kernels import norm_rope as op

    def append(m: Model, dtype=BF16, cache=BF16):
        tokens = m.F * m.S
        q, k, v = meta(1, tokens, 3 * m.C, dtype=dtype).chunk(3, dim=-1)
        gains, rope = [meta(m.C, dtype=dtype)] * 2, [meta(1, tokens, m.D // 2, dtype=F32)] * 2
        kv = [meta(2, m.W, m.S, m.H, m.D, dtype=cache)] * 2
        slot, write = meta(1, dtype=torch.long), meta(1, m.F, dtype=torch.long)
        scales = CacheScales(*[meta(2, m.H, dtype=F32)] * 2, meta(2, m.H, m.D, dtype=F32)) if cache == E4M3 else None
        return lambda: op.norm_rope_append(q, k, v, *gains, *rope, 1e-6, *kv, slot, write, scales)

    def norm(m: Model):
        return lambda: op.rms_norm(meta(1, m.F * m.S, m.C), meta(m.C), 1e-6)

    wide = {"norm_rope_kernel": "LDG.E.128 STG.E.128"}
    return [
        Case("norm_rope_append wan 1.3B bf16", append(WAN), wide),
        Case("norm_rope_append wan 1.3B fp8 cache", append(WAN, cache=E4M3), wide, (90,)),
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

    wide, half = "LDG.E.128 STG.E.128", "LDG.E.128 STG.E.64"
    pool = {"moments_kernel": "ASYNC.128", "join_kernel": "LDG.E.128"}
    return [
        Case("modulate wan 1.3B bf16", norm(WAN), {"modulate_kernel": half}),
        Case("modulate wan 1.3B bf16 vectors", norm(WAN, vector=BF16), {"modulate_kernel": wide}),
        Case("modulate wan 1.3B fp8", norm(WAN, fp8=True), {"modulate_kernel": "LDG.E.128 STG.E"}, (90,)),
        Case("modulate small float32", norm(SMALL, F32), {"modulate_kernel": "LDG.E.64 STG.E.64"}),
        Case("residual_modulate wan 1.3B bf16", residual(WAN), {"modulate_kernel": half}),
        Case("residual_modulate wan 1.3B fp8", residual(WAN, False, True), {"modulate_kernel": half}, (90,)),
        Case("gate_residual wan 1.3B bf16", gate(WAN), {"gate_residual_kernel": wide}),
        Case("gelu_bias wan 1.3B bf16", gelu(WAN, 8960), {"gelu_bias_kernel": wide}),
        Case("gelu_bias wan 1.3B fp8", gelu(WAN, 8960, True), {"gelu_bias_kernel": half}, (90,)),
        Case("gelu_bias small bf16", gelu(SMALL, 512), {"gelu_bias_kernel": wide}),
        Case("quantise wan 1.3B", lambda: fp8_linear.quantise(rows(WAN)), {"quantise_kernel": half}, (90,)),
        Case("pool_frames wan 1.3B", lambda: pooling.pool_frames(rows(WAN), WAN.F, 1e-6), pool),
    ]


def epilogue_cases() -> list[Case]:
    from dsa_engine.structures import HeadWeights, Projection, StopRule
    from dsa_engine.triton_kernels import epilogue as op

    def step(m: Model, height: int, width: int, dtype=BF16, head=True):
        vectors = meta(1, m.F, 2, m.C, dtype=F32).unbind(2)
        final = Projection(*vectors, meta(64, m.C, dtype=dtype), meta(64, dtype=dtype))
        shapes = (m.C // 2, 3 * m.C), (m.C // 2,), (1, m.C // 2), (1,)
        mlp = HeadWeights(*(meta(*shape, dtype=dtype) for shape in shapes)) if head else None
        rule = StopRule(*[meta(1, dtype=torch.int32)] * 4, meta(1, dtype=F32))
        hidden, time = meta(1, m.F * m.S, m.C, dtype=dtype), meta(1, m.F, m.C, dtype=dtype)
        latents, levels = [meta(1, m.F, 16, height, width)] * 2, [meta(1, m.F, dtype=F32)] * 2
        return lambda: op.epilogue(hidden, time, *latents, *levels, final, mlp, rule, 1e-6)

    def mix(op):
        return lambda: op(*[meta(1, 3, 16, 60, 104)] * 2, meta(1, 3, dtype=F32))

    tail = {"join_kernel": "LDG.E", "judge_kernel": "ASYNC.128", "decide_kernel": "STG.E"}
    alone = {"tokens_kernel": "HMMA ASYNC.128", "decide_kernel": "STG.E"}
    wide = {"mix_kernel": "LDG.E.128 STG.E.128"}
    return [
        Case("epilogue wan 1.3B", step(WAN, 60, 104), {"tokens_kernel": "HMMA ASYNC.128", **tail}),
        Case("epilogue wan 1.3B no head", step(WAN, 60, 104, head=False), alone),
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

    def cross(m: Model, length: int):
        q, kv = meta(1, m.F * m.S, m.H, m.D), [meta(1, length, m.H, m.D)] * 2
        return lambda: op.cross_attention(q, *kv, meta(1, dtype=torch.int32), meta(1, dtype=F32))

    tensor = {"attention_kernel": "MMA ASYNC.128"}
    return [
        Case("attention wan 1.3B bf16", attend(WAN), tensor),
        Case("attention wan 1.3B bf16, 2 parts", attend(WAN, splits=2),
             tensor | {"combine_kernel": "LDG.E.128 STG.E.128"}),
        Case("attention wan 1.3B fp8 cache", attend(WAN, cache=E4M3), tensor, (90,)),
        Case("attention small bf16", attend(SMALL), tensor),
        Case("attention small float32", attend(SMALL, F32, F32), {"attention_kernel": "FFMA"}),
        Case("cross_attention wan 1.3B bf16", cross(WAN, 512), tensor),
    ]  # fmt: skip


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


def all_cases() -> list[Case]:
    """One function an op module."""
    return [*norm_rope_cases(), *row_cases(), *epilogue_cases(), *attention_cases(), *norm_silu_cases()]


def table(kernels: list[Kernel]) -> str:
    rows = [("launch", "kernel", "sm", "registers", "stack", "shared", "warps", "blocks an SM", "wide loads, stores")]
    for k in kernels:
        loads = f"{k.count('LDG.E.128')}/{k.count('LDG')}, {k.count('STG.E.128')}/{k.count('STG')}"
        rows.append((k.case, k.name, k.arch, k.registers, k.stack + k.local, k.shared, k.warps, k.blocks, loads))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the kernels as JSON")
    parser.add_argument("--only", default="", help="only launches whose name holds this")
    args = parser.parse_args()
    kernels = compile_cases([case for case in all_cases() if args.only in case.name])
    text = json.dumps([asdict(k) for k in kernels]) if args.json else table(kernels)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
