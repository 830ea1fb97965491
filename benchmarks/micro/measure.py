"""One backend on one row: is it right, is it the same twice, how long does it take; and the peaks of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.common import environment
from benchmarks.common.cli import first_line
from benchmarks.common.timing import Timing, clock, measure
from benchmarks.micro import inputs
from benchmarks.micro.backends import DISPATCHED, Unavailable, resolve, scaled_mm
from benchmarks.micro.roofline import Row, Sizes

CACHES, MAX_SETS = 4, 24  # sets of inputs and outputs that fill the L2 cache so often, at most so many


@dataclass(frozen=True)
class OpCase:
    row: Row
    sizes: Sizes
    backend: str
    device: str
    seed: int
    seconds: float | None  # of timing; None: only whether it is right

    def inputs(self, number: int = 0) -> tuple:
        return inputs.inputs(self.row, self.sizes, self.device, self.seed + number)


@torch.no_grad()
def measure_op(case: OpCase) -> dict:
    """status: ok, wrong (its values are), failed (it raised) or absent, with why; then errors and microseconds.

    broken: the process can no longer use its GPU.
    """
    try:
        call = resolve(case.backend, case.row, torch.device(case.device))
        found = verify(case, call)
        if found["status"] == "ok" and case.seconds is not None:
            timing, why = time_op(case, call)
            found |= asdict(timing) | {
                "tflops": case.row.flop / timing.us / 1e6,
                "gbs": case.row.bytes / timing.us / 1e3,
            }
            found |= {"why": why} if why else {}
        return found
    except Unavailable as reason:
        return {"status": "absent", "why": str(reason)}
    except Exception as error:  # whatever a backend does, the others are still to be timed
        return {"status": "failed", "why": first_line(error), "broken": context_lost(case.device)}


def verify(case: OpCase, call: Callable) -> dict:
    """Errors against float32 on poisoned inputs. moved: the distance of a second run's values from the first's."""
    row, args = case.row, case.inputs()
    plain = resolve("torch", row, torch.device(case.device))
    expected = inputs.reference_fp32(row, inputs.poison_unused(row, args), plain)

    def run(function: Callable) -> list[torch.Tensor]:
        return inputs.outputs(row, args, function(*inputs.poison_unused(row, args)))

    allowed = inputs.tolerance(row, inputs.relative_error(run(plain), expected))
    with inputs.poisoned_memory(warn_only=True) if case.backend in DISPATCHED else nullcontext():
        first, second = run(call), run(call)
    error, moved = inputs.relative_error(first, expected), inputs.relative_error(second, first)
    right = error <= allowed and moved <= allowed  # NaN is neither
    return {"status": "ok" if right else "wrong", "error": error, "limit": allowed, "moved": moved}


def time_op(case: OpCase, call: Callable) -> tuple[Timing, str | None]:
    """On sets of inputs that take turns; what cannot be captured as a graph is timed without, and why."""
    calls = [partial(call, *case.inputs(number)) for number in range(1, 1 + input_sets(case))]
    if case.row.op == "vae_decode":  # one of its backends is a graph already
        return measure(calls, clock(case.device, capture=False), case.seconds), None
    try:
        return measure(calls, clock(case.device), case.seconds), None
    except RuntimeError as error:
        if torch.device(case.device).type == "cpu":
            raise
        torch.cuda.synchronize()  # raises where the error was not one of the capture
        return measure(calls, clock(case.device, capture=False), case.seconds), f"not captured: {first_line(error)}"


def input_sets(case: OpCase) -> int:
    if case.row.op == "vae_decode":
        return 1  # whose weights and state fill the cache many times
    if torch.device(case.device).type == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    return min(MAX_SETS, 1 + math.ceil(CACHES * cache / case.row.bytes))


def context_lost(device: str) -> bool:
    if torch.device(device).type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@torch.no_grad()
def machine_peaks(device: str, seconds: float) -> dict:
    """What this machine reaches on random data: GB/s of a copy, read and written, TF/s of large square GEMMs, and the
    state of the GPU while it multiplies."""
    large = torch.device(device).type != "cpu"
    side, length = (8192, 2**29) if large else (256, 2**20)
    factory = inputs.TensorFactory(device, 0)
    source = factory.normal(length)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], clock(device), seconds)
    pairs = [factory.normals(2, side, side) for _ in range(2)]
    gemm = measure([partial(torch.matmul, *pair) for pair in pairs], clock(device), seconds)
    found = {
        "copy_gbs": 2 * source.nbytes / copy.us / 1e3,
        "side": side,
        "bf16_tflops": 2 * side**3 / gemm.us / 1e6,
        "fp8_tflops": None,
        "gpu": busy_state(*pairs[0]) if large else None,
    }
    if large:
        x, weight = factory.rowwise(side, side), factory.rowwise(side, side)
        try:
            gemm = measure([lambda: scaled_mm(x, weight, None, torch.bfloat16)], clock(device), seconds)
            found["fp8_tflops"] = 2 * side**3 / gemm.us / 1e6
        except RuntimeError as error:
            found["fp8_why"] = first_line(error)
    return found


def busy_state(a: torch.Tensor, b: torch.Tensor) -> dict:
    """nvidia-smi's figures with a second of GEMMs queued behind it."""
    for _ in range(600):
        torch.matmul(a, b)
    state = environment.gpu()
    torch.cuda.synchronize()
    return state
