"""Puts the pretend device in the place of torch.cuda, for the rest of the process."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch
import torch.profiler

from . import graphs, guard
from .device import PINNED, WAIT, device
from .tensor import CudaMode, pinned


class Current:
    """`torch.cuda.device(index)`."""

    def __init__(self, index):
        self.index = index_of(index)

    def __enter__(self):
        self.before, device.current = device.current, self.index
        return self

    def __exit__(self, *_):
        device.current = self.before


def index_of(given) -> int:
    index = given if isinstance(given, int) or given is None else torch.device(given).index
    return device.current if index is None or index < 0 else index


def set_device(given) -> None:
    index = index_of(given)
    if index >= device.count:
        raise RuntimeError(f"invalid device ordinal: cuda:{index}, there are {device.count}")
    device.current = index


def properties(_=None) -> SimpleNamespace:
    major, minor = device.capability
    return SimpleNamespace(
        name="pretend GPU",
        major=major,
        minor=minor,
        total_memory=device.total,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        uuid="none",
    )


REPLACED = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: device.count,
    "current_device": lambda: device.current,
    "set_device": set_device,
    "device": Current,
    "get_device_capability": lambda _=None: device.capability,
    "get_device_name": lambda _=None: "pretend GPU",
    "get_device_properties": properties,
    "mem_get_info": lambda _=None: (device.total - device.memory.reserved, device.total),
    "memory_allocated": lambda _=None: device.memory.now,
    "memory_reserved": lambda _=None: device.memory.reserved,
    "max_memory_allocated": lambda _=None: device.memory.peak,
    "max_memory_reserved": lambda _=None: device.memory.peak,
    "reset_peak_memory_stats": lambda _=None: device.reset_peak(),
    "synchronize": lambda _=None: device.event(WAIT, "device"),
    "empty_cache": lambda: None,
    "is_current_stream_capturing": lambda: device.capturing,
    "Stream": graphs.Stream,
    "Event": graphs.Event,
    "CUDAGraph": graphs.CUDAGraph,
    "graph": graphs.graph,
    "stream": graphs.stream,
    "set_stream": graphs.set_stream,
    "current_stream": graphs.current_stream,
    "default_stream": graphs.default_stream,
    "graph_pool_handle": graphs.graph_pool_handle,
    "manual_seed_all": lambda seed: None,
}


def pin_memory(tensor: torch.Tensor, *_) -> torch.Tensor:
    device.event(PINNED, "pin_memory")
    return pinned(tensor.clone())


class Generator(torch.Generator):
    """One of the pretend device is the CPU's, which draws for it."""

    def __new__(cls, device_="cpu"):
        return super().__new__(cls, "cpu")


class Profile(torch.profiler.profile):
    """Of the host alone: there is no device to trace."""

    def __init__(self, *, activities=None, **options):
        kept = [a for a in activities or () if a != torch.profiler.ProfilerActivity.CUDA]
        super().__init__(activities=kept or None, **options)


def no_inference(mode=True):
    """`torch.inference_mode` as no_grad: of a tensor made in the one, torch lets no other than itself make views."""
    return torch.no_grad()(mode) if callable(mode) else torch.set_grad_enabled(not mode)


def install() -> None:
    """To be called before the project is imported: some of what is replaced is used as a decorator."""
    device.guard = guard.load()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
    torch.inference_mode = no_inference
    torch.Generator = Generator
    torch.profiler.profile = Profile
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor.to("cuda")
    torch.backends.cudnn.version = lambda: 91900
    run = threading.Thread.run

    def run_with_mode(thread):
        torch._C._set_only_lift_cpu_tensors(True)
        with CudaMode():
            run(thread)

    threading.Thread.run = run_with_mode
    CudaMode().__enter__()


def install_loop() -> graphs.Runtime:
    """A loop on the device too. It needs the project, so it is called once that may be imported."""
    from dsa_engine.engine import device_loop
    from dsa_engine.ops import cuda_backend as kernels
    from dsa_engine.ops import smoke

    smoke.verdict = lambda backend, index: smoke.Verdict(False, "a child process has no pretend device")
    runtime = graphs.Runtime()
    device_loop.runtime = lambda: runtime
    device_loop.unavailable = lambda: None
    kernels.csrc = runtime
    return runtime
