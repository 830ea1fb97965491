"""One backend on one row: is it right, is it the same twice, how long does it take; and the ceilings of the machine."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.common import environment
from benchmarks.common.cli import first_line
from benchmarks.common.timing import Timing, clock, measure
from benchmarks.micro import inputs
from benchmarks.micro.backends import DISPATCHED, Unavailable, contender, scaled_mm
from benchmarks.micro.roofline import Row, Sizes

CACHES, MOST_SETS = 4, 24  # sets of inputs and outputs that fill the L2 cache so often, at most so many


@dataclass(frozen=True)
class Job:
    row: Row
    sizes: Sizes
    backend: str
    device: str
    seed: int
    seconds: float | None  # of timing; None: only whether it is right


def judge(job: Job) -> dict:
    """status: ok, wrong (its numbers are), failed (it raised) or absent, with why; then errors and microseconds.

    broken: the process can no longer use its GPU.
    """
    try:
        with torch.no_grad():
            return _judge(job)
    except Unavailable as reason:
        return {"status": "absent", "why": str(reason)}
    except Exception as error:  # whatever a backend does, the others are still to be timed
        return {"status": "failed", "why": first_line(error), "broken": broken(job.device)}


def _judge(job: Job) -> dict:
    call = contender(job.backend, job.row, torch.device(job.device))
    found = check(job, call)
    if found["status"] == "ok" and job.seconds is not None:
        timing, why = time(job, call)
        found |= asdict(timing) | {"tflops": job.row.flop / timing.us / 1e6, "gbs": job.row.bytes / timing.us / 1e3}
        found |= {"why": why} if why else {}
    return found


def check(job: Job, call) -> dict:
    """Errors against float32 on hostile inputs. moved: the distance of a second run's numbers from the first's."""
    row = job.row
    args = inputs.inputs(row, job.sizes, job.device, job.seed)
    expected = inputs.truth(row, inputs.hostile(row, args))
    plain = contender("torch", row, torch.device(job.device))

    def run(function) -> list[torch.Tensor]:
        return inputs.outputs(row, args, function(*inputs.hostile(row, args)))

    allowed = inputs.limit(row, inputs.distance(run(plain), expected))
    with inputs.poisoned() if job.backend in DISPATCHED else nullcontext():
        first, second = run(call), run(call)
    error, moved = inputs.distance(first, expected), inputs.distance(second, first)
    right = error <= allowed and moved <= allowed  # NaN is neither
    return {"status": "ok" if right else "wrong", "error": error, "limit": allowed, "moved": moved}


def time(job: Job, call) -> tuple[Timing, str | None]:
    """On sets of inputs that take turns; what cannot be captured as a graph is timed without, and why."""
    some = range(1, 1 + sets(job.row, job.device))
    calls = [partial(call, *inputs.inputs(job.row, job.sizes, job.device, job.seed + i)) for i in some]
    try:
        return measure(calls, clock(job.device), job.seconds), None
    except RuntimeError as error:
        if torch.device(job.device).type == "cpu":
            raise
        torch.cuda.synchronize()  # raises where the error was not one of the capture
        return measure(calls, clock(job.device, capture=False), job.seconds), f"not captured: {first_line(error)}"


def sets(row: Row, device: str) -> int:
    if torch.device(device).type == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, 1 + math.ceil(CACHES * cache / row.bytes))


def broken(device: str) -> bool:
    if torch.device(device).type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def ceilings(device: str, seconds: float) -> dict:
    """What this machine reaches on random data: GB/s of a copy, read and written, TF/s of large square products, and
    the state of the GPU while it multiplies."""
    large = torch.device(device).type != "cpu"
    side, length = (8192, 2**29) if large else (256, 2**20)
    draw = inputs.Draw(device, 0)
    with torch.no_grad():
        source = draw.normal(length)
        target = torch.empty_like(source)
        copy = measure([lambda: target.copy_(source)], clock(device), seconds)
        pairs = [(draw.normal(side, side), draw.normal(side, side)) for _ in range(2)]
        product = measure([partial(torch.matmul, a, b) for a, b in pairs], clock(device), seconds)
        found = {
            "copy_gbs": 2 * source.nbytes / copy.us / 1e3,
            "side": side,
            "bf16_tflops": 2 * side**3 / product.us / 1e6,
            "fp8_tflops": None,
            "gpu": None,
        }
        if large:
            found["gpu"] = busy_state(*pairs[0])
            found |= fp8_ceiling(draw, side, device, seconds)
    return found


def busy_state(a: torch.Tensor, b: torch.Tensor) -> dict:
    """nvidia-smi's figures with a second of products queued behind it."""
    for _ in range(600):
        torch.matmul(a, b)
    state = environment.gpu()
    torch.cuda.synchronize()
    return state


def fp8_ceiling(draw: inputs.Draw, side: int, device: str, seconds: float) -> dict:
    x, weight = draw.rowwise(side, side), draw.rowwise(side, side)
    try:
        timing = measure([lambda: scaled_mm(x, weight, None, torch.bfloat16)], clock(device), seconds)
    except RuntimeError as error:
        return {"fp8_why": first_line(error)}
    return {"fp8_tflops": 2 * side**3 / timing.us / 1e6}
