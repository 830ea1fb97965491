"""Runs the files `on_*.py` of this folder on the pretend GPU (`support.fake_cuda`), each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_DATA = ("--no-data", "60000", "--compile", "90")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: torch without CUDA lacks a device guard")
@pytest.mark.parametrize(
    "file, options",
    [("on_rules.py", ()), ("on_small.py", ()), ("on_parts.py", ()), ("on_wan.py", NO_DATA)],
)
def test_on_the_pretend_gpu(file, options, tmp_path):
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("DSA_", "PYTEST_", "TRITON_"))
    }
    command = [
        sys.executable,
        "-m",
        "tests.support.fake_cuda",
        *options,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'inner'}", f"tests/fake_cuda/{file}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
