"""Everything static stands in pyproject.toml; this builds the CUDA extension `dsa_engine.csrc` from csrc/.

DSA_BUILD_CUDA=auto (or unset): built where nvcc is found, else a pure Python package and a line that says so; a build
that fails says why and leaves a pure Python package too. 1: built, or the installation fails. 0: not built.
Neither torch, nor a GPU, nor a driver is needed. Unchanged sources are not compiled again: build/csrc has the objects.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "csrc"
EXTENSION = "dsa_engine.csrc"
# Slowest first. wgmma and TMA need sm_90a; the memory-bound kernels run from sm_80 on, after Hopper by their PTX, which
# the driver compiles.
SOURCES = ("attention.cu", "modulate.cu", "epilogue.cu", "norm_rope.cu", "graphs.cu", "bindings.cpp")
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
AMPERE = ["-gencode=arch=compute_80,code=[sm_80,compute_80]"]
MIN_CUDA = (12, 5)  # the first CUDA with cudaGetDriverEntryPointByVersion (csrc/attention.cu)
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The CUDA runtime is linked in and hidden, or its calls would go to the copy that torch has loaded.
LINK = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-Xlinker", "-s"]


class BuildFailed(Exception):
    pass


def build_mode() -> str:
    value = os.environ.get("DSA_BUILD_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"DSA_BUILD_CUDA={value!r}: must be one of auto, 0, 1")
    return value


def find_nvcc() -> tuple[str, str]:
    """The compiler and its version; BuildFailed where there is none that works."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home)) or shutil.which("nvcc")
    if nvcc is None:
        raise BuildFailed("nvcc is neither in PATH nor in CUDA_HOME/bin")
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildFailed(f"{nvcc} does not run: {error}") from error
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < MIN_CUDA:
        raise BuildFailed(
            f"{nvcc} must be of CUDA {MIN_CUDA[0]}.{MIN_CUDA[1]} or later, for sm_90a and "
            f"cudaGetDriverEntryPointByVersion; it says {version.strip()!r}"
        )
    return nvcc, version


def plan() -> str | None:
    """Why no extension is built; None if it is."""
    mode = build_mode()
    if mode == "0":
        return "DSA_BUILD_CUDA=0"
    try:
        find_nvcc()
    except BuildFailed as error:
        if mode == "1":
            raise SystemExit(f"DSA_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}") from error
        return str(error)
    return None


def included(path: Path, seen: set[Path]) -> set[Path]:
    """A source and all files of csrc/ that it includes."""
    if path.exists() and path not in seen:
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
            included(path.parent / name, seen)
    return seen


def compile_source(name: str, nvcc: str, version: str) -> Path:
    """The object of a source; compiled only if the source, its headers, its command or the compilers changed."""
    import pybind11

    source = ROOT / "csrc" / name
    flags, includes, identity = list(FLAGS), [], [version]
    if source.suffix == ".cpp":
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        identity += [sys.version, pybind11.__version__]
    else:
        flags += HOPPER if name == "attention.cu" else HOPPER + AMPERE
    content = [path.read_text() for path in sorted(included(source, set()))]
    key = hashlib.sha256("\0".join([*flags, *identity, *content]).encode()).hexdigest()[:16]
    target = OBJECTS / f"{source.stem}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        run([nvcc, *flags, *includes, "-c", str(source), "-o", str(partial)], f"compiling csrc/{name}")
        for old in OBJECTS.glob(f"{source.stem}-*.o"):
            if old != partial:
                old.unlink(missing_ok=True)
        partial.rename(target)
    return target


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"{what} failed:\n{done.stdout}")


def remove_stale(name: str) -> None:
    """Remove the extension of an earlier editable build, whose kernels may differ from the sources."""
    for path in ROOT.joinpath(*EXTENSION.split(".")[:-1]).glob(name):
        path.unlink()


class BuildPython(build_py):
    """Says once why there is no extension."""

    def run(self):
        if why:
            self.warn(f"{EXTENSION} is not built: {why}; the package is pure Python")
            if self.editable_mode:
                remove_stale(EXTENSION.split(".")[-1] + sysconfig.get_config_var("EXT_SUFFIX"))
        super().run()


class BuildExtension(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            OBJECTS.mkdir(parents=True, exist_ok=True)
            nvcc, version = find_nvcc()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda name: compile_source(name, nvcc, version), SOURCES))
            run([nvcc, *LINK, *map(str, objects), "-o", str(target)], "linking")
        except BuildFailed as error:
            if build_mode() == "1":
                raise SystemExit(f"DSA_BUILD_CUDA=1, but {error}") from error
            self.warn(f"{EXTENSION} is not built, the package is pure Python: {error}")
            ext.optional = True
            target.unlink(missing_ok=True)
            if self.editable_mode:
                remove_stale(target.name)


if __name__ == "__main__":
    why = plan()
    sources = [f"csrc/{name}" for name in SOURCES]
    setup(
        ext_modules=[] if why else [Extension(EXTENSION, sources)],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    )
