"""Smoke test: is a backend's attention correct on this device? Run once, in a child process, and cached.

A backend that should beat Triton but was not measured on this device becomes the default only after it has solved small
adversarial problems correctly, and only for calls like those. A kernel that hangs or corrupts its CUDA context must not
take this process down, so a child runs them with a time limit. The verdict is kept in `$XDG_CACHE_HOME/dsa_engine`
(`~/.cache/dsa_engine`) per backend, device, driver, torch and csrc build; delete the file to test again.
`python -m dsa_engine.ops.smoke BACKEND INDEX` is that child.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops import cuda_backend, external_attention, reference
from dsa_engine.ops.support import Call

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0  # for the child, mostly to start torch and CUDA on a busy machine
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-4  # of plain torch's error in the same dtype
CASES = ((64, False), (128, False), (128, True))  # head dim, and whether the cache is e4m3; queries are bfloat16
FP8_ERROR = 0.06  # with an e4m3 cache queries and probabilities are rounded to e4m3 too, which plain torch does not


class Verdict(NamedTuple):
    passed: bool
    text: str


def covers(call: Call) -> bool:
    """Whether a verdict applies to a call: bfloat16 queries with a head dim of CASES."""
    return call.dtype in (None, torch.bfloat16) and call.head_dim in (None, *(dim for dim, _ in CASES))


# ---- in the child ---------------------------------------------------------------------------------------------------


def check(attention: Callable[..., Tensor], device: torch.device | str, cases=CASES) -> str | None:
    """What is wrong with an attention (`ops.attention`'s arguments); None if nothing is."""
    for head_dim, fp8 in cases:
        args, exact = problem(device, head_dim, fp8)
        truth = reference.attention(args[0].float(), *exact, *args[3:5]).double()
        first, again = (attention(*args) for _ in range(2))
        name = f"head dim {head_dim}, {'e4m3' if fp8 else 'bfloat16'}"
        if not torch.equal(first.view(torch.uint8), again.view(torch.uint8)):
            return f"{name} cache: not the same bits twice"
        limit = FP8_ERROR if fp8 else ERROR_FACTOR * relative_error(reference.attention(*args), truth) + ERROR_FLOOR
        error = relative_error(first, truth)
        if not error <= limit:  # NaN is not
            return f"{name} cache: error {error:.3g} of the result's norm, allowed {limit:.3g}"
    return None


def problem(device: torch.device | str, dim: int, fp8: bool) -> tuple[tuple, tuple[Tensor, Tensor]]:
    """Arguments of `ops.attention`, and its caches dequantized to float32.

    Four rows, two of one slot: a wrapped run, all frames, an empty run, no keys. NaN wherever no row may read; no size
    is a multiple of a tile.
    """
    drawn = torch.Generator().manual_seed(0)
    slots, window, tokens, heads = 4, 5, 37, 2
    slot = [2, 2, 0, 3]
    keys = [[[0, 1], [3, 5]], [[1, 3], [4, 4]], [[0, 5], [0, 0]], [[2, 2], [0, 0]]]
    q = torch.randn(len(slot), 150, heads, dim, generator=drawn).bfloat16()
    k, v = torch.randn(2, slots, window, tokens, heads, dim, generator=drawn)
    unused = torch.ones(slots, window, dtype=torch.bool)
    for s, runs in zip(slot, keys):
        for start, stop in runs:
            unused[s, start:stop] = False
    scales = None
    if fp8:
        one, other = 0.008 + 0.004 * torch.rand(2, slots, heads, generator=drawn)
        scales = CacheScales(one, other)
        k, v = (reference.to_e4m3(x / s[:, None, None, :, None]) for x, s in ((k, one), (v, other)))
        exact = [x.float() * s[:, None, None, :, None] for x, s in ((k, one), (v, other))]
    else:
        k, v = k.bfloat16(), v.bfloat16()
        exact = [k.float(), v.float()]
    for cache_ in (k, v):  # all bits set are NaN in both dtypes; float8 has no masked fill
        cache_.view(torch.uint8)[unused] = 255
    move = lambda x: x.to(device)  # noqa: E731
    scales = None if scales is None else CacheScales(*map(move, scales))
    slot, keys = torch.tensor(slot), torch.tensor(keys)
    exact = [x.masked_fill(unused[..., None, None, None], 0) for x in exact]
    return (*map(move, (q, k, v, slot, keys)), scales), tuple(map(move, exact))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def main() -> None:
    backend, index = sys.argv[1], int(sys.argv[2])
    torch.cuda.set_device(index)
    csrc = backend == "cuda"
    attention = cuda_backend.attention if csrc else getattr(external_attention, backend)  # libraries have no e4m3
    why = check(attention, f"cuda:{index}", [case for case in CASES if csrc or not case[1]])
    sys.stdout.write("\n" + json.dumps({"wrong": why}) + "\n")


# ---- in this process ------------------------------------------------------------------------------------------------


@cache
def identity(backend: str, index: int) -> dict[str, str]:
    """The key of a verdict. Of library versions it has only torch's, which brings cuDNN."""
    gpu, driver = torch.cuda.get_device_properties(index), Path("/proc/driver/nvidia/version")
    build = hashlib.sha256(Path(cuda_backend.csrc.__file__).read_bytes()).hexdigest()[:16] if backend == "cuda" else ""
    return {
        "backend": backend,
        "device": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
        "torch": torch.__version__,
        "build": build,
    }


def verdict_path(key: dict[str, str]) -> Path:
    """Where the verdict is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(home) / "dsa_engine" / f"smoke-{name}.json"


def verdict(backend: str, index: int) -> Verdict | None:
    """Verdict on a backend's attention on a CUDA device: cached, or determined now; None if it is not cached and a
    stream is being captured, when no child may be waited for."""
    key = identity(backend, index)
    kept = read(verdict_path(key))
    if kept is not None or torch.cuda.is_current_stream_capturing():
        return kept
    logger.info("trying attention by %s on %s, once; at most %.0f s", backend, key["device"], TIMEOUT_S)
    found = run_child([sys.executable, "-m", "dsa_engine.ops.smoke", backend, str(index)], TIMEOUT_S)
    if not found.passed:
        text = "attention by %s is not used on %s: %s (kept in %s)"
        logger.warning(text, backend, key["device"], found.text, verdict_path(key))
    write(verdict_path(key), key, found)
    return found


def run_child(command: Sequence[str], seconds: float) -> Verdict:
    """Run the child; kill it after the time limit."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may not even die
            child.communicate(timeout=5)
        return Verdict(False, f"its smoke test gave no answer in {seconds:g} s")
    try:
        wrong = json.loads(stdout.splitlines()[-1])["wrong"] if child.returncode == 0 else None
    except (IndexError, KeyError, TypeError, ValueError):
        return Verdict(False, f"its smoke test said {stdout[-200:]!r}")
    if child.returncode:
        last = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        return Verdict(False, f"its smoke test ended with code {child.returncode}: {last}")
    return Verdict(True, "its smoke test passed") if wrong is None else Verdict(False, f"its smoke test: {wrong}")


def read(path: Path) -> Verdict | None:
    try:
        kept = json.loads(path.read_text())
        return Verdict(bool(kept["passed"]), str(kept["text"]))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is not readable and is made anew: %s", path, error)
        return None


def write(path: Path, key: dict[str, str], found: Verdict) -> None:
    """Atomic, since other processes read it."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**key, **found._asdict()}, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        logger.warning("the verdict on attention is not kept, the next process asks again: %s", error)


if __name__ == "__main__":
    main()
