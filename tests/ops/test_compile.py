"""The Triton kernels compiled at the models' shapes with no GPU: registers, memory, SASS. For sm_80 and sm_90 all, for
four more those near the shared memory's limit; `python tests/support/triton_compile.py` checks all for all."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.support.triton_cases import ARCHES, OPS, all_cases
from tests.support.triton_compile import STACK, WHOLE, Kernel, blocks_per_sm, breaks, missing, table

CASES = all_cases()
OTHERS = tuple(op for op in OPS if op != "attention")
GROUPS = {  # architectures and ops that are compiled for at once
    "sm_80 attention": ((80,), ("attention",)),
    "sm_80 others": ((80,), OTHERS),
    "sm_90 attention": ((90,), ("attention",)),
    "sm_90 others": ((90,), OTHERS),
    "other architectures": ((86, 89, 100, 120), tuple(OPS)),
}


@functools.cache
def compiled(group: str) -> list[Kernel]:
    """In a process of its own, since in this one the kernels may belong to the interpreter."""
    arches, ops = GROUPS[group]
    program = Path(__file__).parents[1] / "support" / "triton_compile.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program, "--json", "--suite", "--arches", *map(str, arches), "--ops", *ops],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [Kernel(**k) for k in json.loads(done.stdout.splitlines()[-1])]
    sys.stdout.write("\n" + table(kernels) + "\n")
    return kernels


@pytest.mark.parametrize("group", GROUPS)
def test_shared_memory_fits_and_nothing_spills(group):
    """But what STACK names, with a reason."""
    assert [rule for rule in map(breaks, compiled(group)) if rule] == []
    assert {k.arch for k in compiled(group)} == set(GROUPS[group][0])


def test_a_rule_that_is_broken_is_named():
    """The tiles of Hopper do not fit a B200: Triton's barriers of tensor memory come on top."""
    b200 = Kernel("attention", "attention_kernel", 100, 255, 0, 0, 234_496, 8, 0, {})
    assert breaks(b200) == "attention, attention_kernel, sm_100: 234496 bytes shared, at most 232448"
    spills = Kernel("gaussian wan 1.3B", "_gaussian", 90, 40, 72, 0, 0, 4, 12, {})
    assert "72 bytes on the stack" in breaks(spills) and breaks(dataclasses.replace(spills, stack=64)) is None


@pytest.mark.parametrize(
    "group, case",
    [
        pytest.param(group, case, id=f"{group} {case.name}")
        for group, (arches, ops) in GROUPS.items()
        for case in all_cases(ops)
        if {*arches} <= {*WHOLE} & {*case.arches}
    ],
)
def test_instructions(group, case):
    """Wide accesses and the tensor cores' instructions are there."""
    mine = {k.name: k for k in compiled(group) if k.case == case.name}
    assert set(case.needs) <= set(mine), f"{set(case.needs)} not all in {set(mine)}"
    lacking = {name: missing(mine[name], needs) for name, needs in case.needs.items()}
    assert not any(lacking.values()), f"{lacking}, has {[k.opcodes for k in mine.values()]}"


def test_every_case_names_what_it_needs():
    assert all(case.needs and set(case.arches) <= set(ARCHES) for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES) and set(STACK) <= {case.name for case in CASES}
    pairs = [(arch, op) for arches, ops in GROUPS.values() for arch in arches for op in ops]
    assert sorted(pairs) == sorted(product(ARCHES, OPS))


@pytest.mark.parametrize(
    "arch, registers, warps, shared, blocks",
    [
        (90, 32, 4, 0, 16),
        (90, 128, 4, 0, 4),
        (90, 168, 12, 0, 1),
        (90, 255, 8, 0, 1),
        (80, 40, 1, 0, 32),
        (80, 64, 4, 81_920, 2),
        (90, 16, 4, 232_448, 1),
        (80, 72, 8, 1_024, 3),
        (86, 32, 4, 0, 12),
        (86, 16, 1, 0, 16),
        (120, 255, 8, 101_376, 1),
        (100, 242, 8, 234_496, 0),
    ],
)
def test_blocks_per_sm(arch, registers, warps, shared, blocks):
    assert blocks_per_sm(arch, registers, warps, shared) == blocks


def test_needs_are_whole_parts_of_opcodes():
    kernel = Kernel("case", "kernel", 90, 32, 0, 0, 0, 4, 16, {"LDG.E.128.CONSTANT": 2, "LDG.E.1280": 1, "HGMMA.64": 1})
    assert kernel.count("LDG.E.128") == 2 and kernel.count("LDG.E") == 3
    assert missing(kernel, "LDG.E.128 MMA") == [] and missing(kernel, "STG.E.128 QGMMA") == ["STG.E.128", "QGMMA"]
