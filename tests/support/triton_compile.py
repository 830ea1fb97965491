"""Compiles the Triton kernels for real GPUs on a machine that has none, at the shapes of the models.

`python tests/support/triton_compile.py` prints a table and the broken rules, with `--suite` only for what the tests
check, with `--json` without rules, for `tests/ops/test_compile.py`. Every case of `triton_cases.py` calls a real
launcher on meta tensors while `JITFunction.run` compiles instead of launching, so what is compiled is what runs. It
needs a process of its own, without TRITON_INTERPRET.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).resolve().parents[2]))  # run as a script, Python looks only beside this file
from tests.support.triton_cases import ARCHES, OPS, Case, all_cases


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
WHOLE = (80, 90)  # of these the tests hold every case, of the others what comes near the shared memory's limit
# The only kernels that may put something on the stack: at most so many bytes a thread, where, and why it does no harm.
STACK = {
    "cross_attention wan 1.3B float32": (128, ARCHES, "no full-sized model runs in float32"),
    "gaussian wan 1.3B": (64, ARCHES, "one launch a chunk"),
    "attention small bf16": (32, (120,), "the small model's attention is a few microseconds"),
    "attention small float32": (32, (120,), "as in bf16"),
}


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


def compile_cases(cases: list[Case], arches: Sequence[int], suite: bool = False) -> list[Kernel]:
    """Every kernel that the cases launch, for those architectures of theirs; suite: for those that the tests hold."""
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
            for arch in arches:
                driver.set_active(AheadOfTime(arch))
                for case in cases:
                    if arch in case.arches and (not suite or case.everywhere or arch in WHOLE):
                        case.launch()
    finally:
        JITFunction.run = run
    return [kernel.result() for kernel in kernels.values()]


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
    parser.add_argument("--arches", type=int, nargs="+", choices=ARCHES, default=ARCHES, help="only for these")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only cases of these")
    args = parser.parse_args()
    cases = [case for case in all_cases(args.ops) if args.only in case.name]
    kernels = compile_cases(cases, args.arches, args.suite)
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
