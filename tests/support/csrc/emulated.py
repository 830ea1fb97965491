"""The CUDA extension with its kernels on the host, compiled once, for `dsa_engine.ops.cuda_backend`."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = Path(__file__).parents[3] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-DDSA_EMULATE", "-shared", "-fPIC", "-Wno-psabi"]
ORDERS = (0, 1, 5)  # of a block's threads: a forgotten barrier goes unnoticed in one order


def cuda_headers() -> Path | None:
    """CUDA's include folder, which the emulator needs for its types; no compiler, no driver."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


@functools.cache
def module():
    """The compiled module; skips the test where there is no compiler or no CUDA header."""
    headers = cuda_headers()
    if headers is None or not shutil.which("g++"):
        pytest.skip("needs g++ and CUDA's headers")
    import pybind11

    folder = tempfile.TemporaryDirectory(prefix="dsa-emulated-")
    target = Path(folder.name) / "csrc.so"
    includes = [headers, pybind11.get_include(), sysconfig.get_path("include"), HERE, CSRC]
    command = ["g++", *FLAGS, *(f"-I{path}" for path in includes), str(HERE / "emulated.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("csrc", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.set_order = ctypes.CDLL(str(target)).set_order
    loaded.folder = folder  # removed with the module
    return loaded


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error beside the largest exact magnitude; infinite where one is not a number and the other is."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape
    if not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    return ((actual - exact).abs().nan_to_num().max() / exact.abs().nan_to_num().max().clamp(min=1e-30)).item()


def check_error(name: str, actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float) -> None:
    """At most twice the error of plain torch in the same dtype, both against `exact`; `floor` where plain has none."""
    ours, theirs = error(actual, exact), error(plain, exact)
    worst = (actual.double() - exact.double()).abs().nan_to_num(nan=float("inf")).argmax().item()
    index = [i.item() for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
    assert ours <= 2 * theirs + floor, f"{name}: error {ours:.3g}, plain torch {theirs:.3g}, worst at {index}"
