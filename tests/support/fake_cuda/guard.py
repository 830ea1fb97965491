"""Builds and loads `guard.cpp`, once a torch: without it torch's own C++ fails where it asks for the current device."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> ctypes.CDLL:
    """Raises RuntimeError where there is no compiler, or it fails."""
    folder = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"dsa-fake-cuda-{os.getuid()}-{key}.so"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = ["g++", "-std=c++20", "-O0", abi, "-shared", "-fPIC", f"-I{folder / 'include'}", str(SOURCE)]
        done = subprocess.run(
            [*command, f"-L{folder / 'lib'}", "-lc10", "-o", str(part)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not build: {done.stderr}")
        part.replace(target)
    return ctypes.CDLL(str(target))
