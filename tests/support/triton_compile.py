"""Compiles the Triton kernels for real GPUs on a machine that has none, at the shapes of the models.

`python tests/support/triton_compile.py` prints a table and what breaks a rule, `--suite` only of what the tests hold, `--json`
without the rules for `tests/ops/test_compile.py`. Every case calls a real launcher on meta tensors while
`JITFunction.run` compiles instead of launching, so what is compiled is what runs. It must run in a process of its own,
without TRITON_INTERPRET. To add an op, write a function that returns its cases and name it in `all_cases`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


class Chip(NamedTuple):
    """What one SM of an architecture has. shared: bytes, of which each block takes 1 KB more than it asks for; mma: the
    opcode of its tensor cores. Source: the CUDA C++ programming guide, "Compute Capabilities"."""

    shared: int
    warps: int
    blocks: int
    mma: str

    @property
    def limit(self) -> int:
        """Bytes of shared memory that one block may have."""
        return self.shared - 1024


CHIPS = {
    80: Chip(167_936, 64, 32, "HMMA"),  # A100
    86: Chip(102_400, 48, 16, "HMMA"),  # RTX 3090
    89: Chip(102_400, 48, 24, "HMMA"),  # RTX 4090, L40S
    90: Chip(233_472, 64, 32, "HGMMA"),  # H100, H200
    100: Chip(233_472, 64, 32, "UTCHMMA"),  # B200
    120: Chip(102_400, 48, 24, "HMMA"),  # RTX 5090
}
ARCHES = tuple(CHIPS)
FP8 = (89, 90, 100, 120)  # e4m3 needs 8.9
WHOLE = (80, 90)  # of these the tests hold every case, of the others what comes near the shared memory's limit
# The only kernels that may put something on the stack: at most so many bytes a thread, where, and why it does no harm.
STACK = {
    "cross_attention wan 1.3B float32": (128, ARCHES, "no full-sized model runs in float32"),
    "gaussian wan 1.3B": (64, ARCHES, "one launch a chunk"),
    "attention small bf16": (32, (120,), "the small model's attention is a few microseconds"),
    "attention small float32": (32, (120,), "as in bf16"),
}
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


def missing(kernel: Kernel, needs: str) -> list[str]:
    """Which of the needed instructions the kernel lacks."""
    names = {"MMA": CHIPS[kernel.arch].mma, "ASYNC.128": "LDGSTS.E.BYPASS.128"}
    wanted = [names.get(need, need) for need in needs.split()]
    return [need for need in wanted if not kernel.count(need)]


def blocks_per_sm(arch: int, registers: int, warps: int, shared: int) -> int:
    """Blocks that fit an SM: 64 K registers, handed to a warp by the 256; its warps, blocks and shared memory."""
    chip, by_registers = CHIPS[arch], 65536 // (-(-registers * 32 // 256) * 256) // warps
    return min(chip.blocks, chip.warps // warps, by_registers, chip.shared // (shared + 1024))


def breaks(kernel: Kernel) -> str | None:
    """Which rule a kernel breaks: the shared memory of a block, and no spills but those of STACK."""
    limit, (stack, arches, _) = CHIPS[kernel.arch].limit, STACK.get(kernel.case, (0, (), ""))
    stack *= kernel.arch in arches
    if kernel.shared > limit or kernel.blocks < 1:
        return f"{kernel.case}, {kernel.name}, sm_{kernel.arch}: {kernel.shared} bytes shared, at most {limit}"
    if kernel.stack + kernel.local > stack:
        return f"{kernel.case}, {kernel.name}, sm_{kernel.arch}: {kernel.stack + kernel.local} bytes on the stack"
    return None


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


def inspect(case: str, arch: int, compiled, sass: bool) -> Kernel:
    """sass: count the opcodes too, which takes a third of a second."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", *(["-sass"] if sass else []), file.name)
    used = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", usage))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = blocks_per_sm(arch, used["REG"], warps, shared)
    return Kernel(
        case,
        compiled.metadata.name,
        arch,
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        shared,
        warps,
        blocks,
        dict(opcodes),
    )


def compile_cases(cases: list[Case], suite: bool = False) -> list[Kernel]:
    """Every kernel that the cases launch, for every architecture of theirs; suite: for those that the tests hold."""
    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if (case.name, arch, compiled.hash) not in kernels:
            sass = arch in WHOLE or not suite
            kernels[case.name, arch, compiled.hash] = pool.submit(inspect, case.name, arch, compiled, sass)
        return compiled

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a kernel is inspected while the next is compiled
            for arch in ARCHES:
                driver.set_active(AheadOfTime(arch))
                for case in cases:
                    if arch in case.arches and (not suite or case.everywhere or arch in WHOLE):
                        case.launch()
    finally:
        JITFunction.run = run
    return [kernel.result() for kernel in kernels.values()]


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

    wide, half = "LDG.E.128 STG.E.128", "LDG.E.128 STG.E.64"
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
    ]


def epilogue_cases() -> list[Case]:
    from dsa_engine.kernel_types import FinalLayer, HeadWeights, StopRule
    from dsa_engine.triton_kernels import epilogue as op

    def step(m: Model, height: int, width: int, dtype=BF16, head=True):
        vectors = meta(1, m.F, 2, m.C, dtype=F32).unbind(2)
        final = FinalLayer(*vectors, meta(64, m.C, dtype=dtype), meta(64, dtype=dtype))
        shapes = (m.C // 2, 3 * m.C), (m.C // 2,), (1, m.C // 2), (1,)
        mlp = HeadWeights(*(meta(*shape, dtype=dtype) for shape in shapes)) if head else None
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


def all_cases() -> list[Case]:
    """One function an op module."""
    functions = norm_rope_cases, row_cases, epilogue_cases, attention_cases, norm_silu_cases, noise_cases
    return [case for function in functions for case in function()]


def table(kernels: list[Kernel]) -> str:
    rows = [
        ("launch", "kernel", "sm", "registers", "stack", "shared", "of", "warps", "blocks an SM", "wide loads, stores")
    ]
    for k in kernels:
        loads = f"{k.count('LDG.E.128')}/{k.count('LDG')}, {k.count('STG.E.128')}/{k.count('STG')}"
        rows.append(
            (
                k.case,
                k.name,
                k.arch,
                k.registers,
                k.stack + k.local,
                k.shared,
                CHIPS[k.arch].limit,
                k.warps,
                k.blocks,
                loads if k.opcodes else "",
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the kernels as JSON")
    parser.add_argument("--only", default="", help="only launches whose name holds this")
    parser.add_argument("--suite", action="store_true", help="only what the tests hold")
    args = parser.parse_args()
    cases = [case for case in all_cases() if args.only in case.name]
    kernels = compile_cases(cases, args.suite)
    if args.json:
        sys.stdout.write(json.dumps([asdict(k) for k in kernels]) + "\n")
        return
    broken = [rule for rule in map(breaks, kernels) if rule]
    needs = {(case.name, name): text for case in cases for name, text in case.needs.items()}
    for k in kernels:
        lacks = missing(k, needs.get((k.case, k.name), "")) if k.opcodes else []
        broken += [f"{k.case}, {k.name}, sm_{k.arch}: has no {need}" for need in lacks]
    allowed = [f"stack, known: {name}: {why}" for name, (*_, why) in STACK.items()]
    sys.stdout.write("\n".join([table(kernels), "", *allowed, *(broken or ["no rule is broken"])]) + "\n")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
