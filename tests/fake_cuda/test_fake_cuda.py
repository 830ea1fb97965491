"""Runs the files `on_*.py` of this folder on the pretend GPU (`support.fake_cuda`), in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_DATA = ("--no-data", "60000", "--compile", "90")
RUNS = [  # file, which of its tests (pytest's -k; together all of them), options of the device
    ("on_rules.py", "", ()),
    ("on_parts.py", "", ()),
    ("on_small.py", "float32", ()),
    ("on_small.py", "fp8", ()),
    ("on_small.py", "token", ()),
    ("on_small.py", "not float32 and not fp8 and not token", ()),
    ("on_wan.py", "", NO_DATA),
]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: torch without CUDA lacks a device guard")
@pytest.mark.parametrize("file, tests, options", RUNS, ids=[f"{file} {tests}".strip() for file, tests, _ in RUNS])
def test_on_the_pretend_gpu(file, tests, options, tmp_path):
    outer = ("DSA_", "PYTEST_", "TRITON_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    program = ("-m", "tests.support.fake_cuda", *options, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests)
    done = subprocess.run(
        [sys.executable, *program, f"--basetemp={tmp_path / 'inner'}", f"tests/fake_cuda/{file}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
