"""What every benchmark writes beside its figures: the machine and its state, versions, the commit, the JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

from dsa_engine.files import atomic_write

# nvidia-smi's field: our name
SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_mhz_max",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
    "clocks_event_reasons.active": "throttle",
}
# bits of `clocks_event_reasons.active`, as of nvml.h
THROTTLE = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}


def commit() -> str:
    """The repository's commit, with a + when it has uncommitted changes."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str | int | None]:
    """Of what the kernels are built from and run beside; None for what is not there."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "triton": triton,
    }


def throttled(mask: str) -> list[str]:
    """`0x0000000000000005` -> ["idle", "power cap"]."""
    value = int(mask, 16)
    return [name for bit, name in THROTTLE.items() if value & bit]


def gpu_state(line: str) -> dict[str, str | float | list[str]]:
    """One line of nvidia-smi's CSV of the fields `SMI`; a field that the driver does not report stays its text."""
    found: dict[str, str | float | list[str]] = {}
    for name, text in zip(SMI.values(), (cell.strip() for cell in line.split(","))):
        try:
            found[name] = text if name == "driver" else throttled(text) if name == "throttle" else float(text)
        except ValueError:
            found[name] = text
    return found


def gpu(device: int = 0) -> dict | None:
    """The GPU and the state that it is in now: clocks and power mean something only under load. None without one."""
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(device)
    found = {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": about.total_memory / 2**30,
        "l2_mib": about.L2_cache_size / 2**20,
    }
    uuid = str(about.uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia_smi": f"{type(error).__name__}: {error}"}
    return found | gpu_state(run.stdout.splitlines()[0])


def machine() -> dict:
    """Processor, threads, versions, and the GPU (None without one)."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return {"cpu": cpu, "threads": torch.get_num_threads(), **versions(), "gpu": gpu()}


def save(result: dict, path: Path) -> None:
    """The file appears when it is whole; its folder is created."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
