"""The extension as setup.py builds it: where and whether, what it needs to load, and what the compiler made of it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OBJECTS = ROOT / "build" / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SOURCES = ("attention", "epilogue", "graphs", "modulate", "norm_rope")


def setup(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py into a folder, with a PATH that has no nvcc unless the environment says otherwise."""
    variables = {"HOME": str(folder), "PATH": "/nonexistent"} | environment
    arguments = [sys.executable, "setup.py", command, "--build-lib", str(folder / "lib")]
    arguments += ["--build-temp", str(folder / "temp")] if command == "build_ext" else []
    return subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def extensions(folder: Path) -> list[Path]:
    return list(folder.rglob(f"*{SUFFIX}"))


def tool(name: str) -> str:
    """A program of CUDA's: installed, or out of Triton's wheel."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"{name} is neither in PATH nor in a triton wheel")
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if not found.exists():
            pytest.skip(f"{name} is neither in PATH nor in triton's wheel")
    return str(found)


def output(*command: str) -> str:
    nvdisasm = str(Path(tool("nvdisasm")).parent)  # cuobjdump looks for it
    path = os.pathsep.join((os.environ["PATH"], nvdisasm))
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The extension. A build before has left objects, then nothing is compiled here."""
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        pytest.skip("needs nvcc")
    pytest.importorskip("pybind11", reason="needs pybind11")
    folder = tmp_path_factory.mktemp("built")
    done = setup(folder, "build_ext", DSA_BUILD_CUDA="1", **os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = extensions(folder)
    return extension


def object_of(source: str) -> Path:
    (path,) = OBJECTS.glob(f"{source}-*.o")
    return path


@functools.cache
def kernels(source: str, *arguments: str) -> dict[str, str]:
    """What cuobjdump says of each function of an object's sm_90a code, by its readable name."""
    text = output(tool("cuobjdump"), "-arch", "sm_90a", *arguments, str(object_of(source)))
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function(?: :)? (?:void )?(.+)", text)
    found = {name.split(" [")[0].rstrip(":"): body for name, body in zip(parts[1::2], parts[2::2])}
    assert found, text
    return found


# ---- loading --------------------------------------------------------------------------------------------------------

LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("csrc", sys.argv[1])
csrc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(csrc)
assert "torch" not in sys.modules
def attempt(**changed):
    shape = {"dtype": 1, "shape": (1, 2, 64), "x": (16, 64, 64), "out": (16, 64, 64), "bias": (16, 0)}
    try:
        csrc.gelu_bias(**{**shape, "row_scale": 0, "stream": 0, **changed})
    except (RuntimeError, ValueError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
attempt()
attempt(shape=(1, 2, 63))
attempt(dtype=7)
sys.stdout.write(" ".join(name for name in dir(csrc) if not name.startswith("_")))
"""


def test_it_loads_without_torch_or_driver_and_then_says_what_is_missing(built):
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", LOAD, built], env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    no_device, width, dtype, names = done.stdout.splitlines()
    assert re.fullmatch(
        r"RuntimeError: gelu_bias \[1, 2, 64\]: .+ \(cudaError(InsufficientDriver|NoDevice)\)", no_device
    )
    assert width == "ValueError: gelu_bias [1, 2, 63]: 63 channels must be a multiple of 8 and at most 16384"
    assert "dtype code 7 must be 0 (float32), 1 (bfloat16) or 2 (float16)" in dtype
    launchers = {
        "attention",
        "attention_blocks",
        "attention_workspace",
        "epilogue",
        "epilogue_workspace",
        "gelu_bias",
        "modulate",
        "norm_rope",
        "set_while",
    }
    assert set(names.split()) == launchers | {"DEVICE", "DTYPES"}


def test_it_keeps_its_cuda_runtime_to_itself(built):
    """A symbol that others can see would be bound to the runtime that torch has loaded, of another version."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    symbols = output("nm", "-D", str(built))
    assert "PyInit_csrc" in symbols
    assert [line for line in symbols.splitlines() if re.search(r"\bcu|__cuda", line)] == []


# ---- building -------------------------------------------------------------------------------------------------------


def test_unchanged_sources_are_not_compiled_again(built, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in OBJECTS.iterdir()}
    done = setup(tmp_path, "build_ext", DSA_BUILD_CUDA="1", **os.environ)
    assert done.returncode == 0 and len(extensions(tmp_path)) == 1
    assert {path: path.stat().st_mtime_ns for path in OBJECTS.iterdir()} == before


@pytest.mark.parametrize(
    "mode, reason", [("0", "DSA_BUILD_CUDA=0"), ("auto", "nvcc is neither in PATH nor in CUDA_HOME")]
)
def test_without_the_compiler_the_package_is_pure_and_one_line_says_so(tmp_path, mode, reason):
    done = setup(tmp_path, "build_py", DSA_BUILD_CUDA=mode)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "dsa_engine.csrc" in line]
    assert reason in line and "pure Python" in line
    assert (tmp_path / "lib" / "dsa_engine" / "ops" / "cuda_backend.py").exists() and extensions(tmp_path) == []


def test_a_build_that_was_asked_for_fails_without_the_compiler(tmp_path):
    done = setup(tmp_path, "build_py", DSA_BUILD_CUDA="1")
    assert done.returncode and "DSA_BUILD_CUDA=1, but the CUDA kernels cannot be built: nvcc" in done.stderr


def test_an_unknown_mode_is_refused(tmp_path):
    done = setup(tmp_path, "build_py", DSA_BUILD_CUDA="yes")
    assert done.returncode and "DSA_BUILD_CUDA='yes': must be one of auto, 0, 1" in done.stderr


@pytest.fixture
def broken(tmp_path) -> str:
    """A CUDA_HOME whose nvcc compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 99.0" && exit 0\necho "no such luck" && exit 1\n')
    nvcc.chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize("release, accepted", [("11.8", False), ("12.4", False), ("12.5", True), ("13.0", True)])
def test_the_compiler_must_know_the_runtime_calls_of_the_sources(tmp_path, broken, release, accepted):
    """cudaGetDriverEntryPointByVersion came with CUDA 12.5."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("99.0", release))
    done = setup(tmp_path, "build_py", DSA_BUILD_CUDA="1", CUDA_HOME=broken)
    refused = "must be of CUDA 12.5 or later" in done.stderr
    assert (refused, done.returncode == 0) == (not accepted, accepted), done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_bound_by_memory_has_ptx_for_later_devices_and_attention_has_none(built, source):
    listed = output(tool("cuobjdump"), "-lptx", "-lelf", str(object_of(source)))
    assert ("sm_80.ptx" in listed) == ("sm_80.cubin" in listed) == (source != "attention")
    assert "sm_90" in listed


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_compiler_that_fails_is_quoted(tmp_path, broken, mode):
    pytest.importorskip("pybind11", reason="needs pybind11")
    done = setup(tmp_path, "build_ext", DSA_BUILD_CUDA=mode, CUDA_HOME=broken, PATH="/usr/bin:/bin")
    text = done.stdout + done.stderr
    assert (done.returncode != 0) == (mode == "1") and extensions(tmp_path) == []
    assert re.search(r"csrc/\w+.\w+ failed:\s+no such luck", text), text
    assert (
        "DSA_BUILD_CUDA=1, but" if mode == "1" else "dsa_engine.csrc is not built, the package is pure Python"
    ) in text


# ---- what the compiler made of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills(built, source):
    """No stack frame and no local memory. The table (pytest -rP) shows how many warps the registers leave room for."""
    lines, spilled = [], []
    for name, text in kernels(source, "--dump-resource-usage").items():
        registers, stack, shared, local = (
            int(re.search(rf"{k}:(\d+)", text)[1]) for k in ("REG", "STACK", "SHARED", "LOCAL")
        )
        warps = min(64, 65536 // (-(-registers // 8) * 8 * 32))
        lines.append(f"{registers:4} registers {warps:3} warps {shared:6} bytes shared  {name}")
        if stack or local:
            spilled.append(name)
    sys.stdout.write("\n".join(lines) + "\n")
    assert spilled == []


@pytest.mark.parametrize(
    "source, kernel, rowwise",
    [
        ("norm_rope", "norm_rope_kernel<__nv_bfloat16, {V}>", False),
        ("modulate", "modulate_kernel<__nv_bfloat16, {V}, false>", False),
        ("modulate", "modulate_kernel<__nv_bfloat16, {V}, true>", True),
        ("modulate", "gelu_kernel<__nv_bfloat16, {V}, false>", False),
        ("modulate", "gelu_kernel<__nv_bfloat16, {V}, true>", True),
    ],
)
@pytest.mark.parametrize("vectors", [4, 6])
def test_memory_is_read_and_written_16_bytes_at_a_time(built, source, kernel, rowwise, vectors):
    """e4m3 is written 8 bytes at a time: eight channels. What is narrower is a row's own scalars, not its channels."""
    if not shutil.which("c++filt"):
        pytest.skip("needs c++filt")
    name = kernel.format(V=vectors)
    (code,) = (text for key, text in kernels(source, "-sass").items() if name in key)
    loads, stores = (re.findall(rf"\b{kind}\.E\S*", code) for kind in ("LDG", "STG"))
    assert sum(".128" in x for x in loads) >= vectors
    assert sum((".64" if rowwise else ".128") in x for x in stores) >= vectors
    assert len([x for x in stores if ".128" not in x and ".64" not in x]) <= 1, stores
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_the_projection_runs_on_tensor_cores(built):
    for name, code in kernels("epilogue", "-sass").items():
        assert ("HMMA.16816.F32" in code) == ("project_kernel" in name and "<float" not in name), name
