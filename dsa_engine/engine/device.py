"""Device plumbing: the current device, streams, timing events, copies to the host. Trivial on a CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def current(device: torch.device) -> AbstractContextManager:
    """Context in which a CUDA device is the thread's current one: Triton and csrc launch on that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_device(method: Method) -> Method:
    """Decorator: the object's `device` is current during the method. For public entry points, since every thread
    starts on device 0."""

    @functools.wraps(method)
    def there(self, *args, **kwargs):
        with current(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, there)


class Streams(NamedTuple):
    """An engine's own streams, created once: torch hands out 32 in turn, and two that run at once must be distinct and
    not share cuBLAS's per-stream workspace."""

    capture: torch.cuda.Stream  # of the model's graphs
    decode: torch.cuda.Stream  # the decoder's graphs are captured there too

    @classmethod
    def on(cls, device: torch.device) -> Streams | None:
        """None without a CUDA device."""
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None


def stream_of(device: torch.device) -> Any:
    """The thread's current stream, for another thread to `follow`; None without a CUDA device."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def follow(stream: Any) -> None:
    """Make it this thread's current stream, and its device the current one."""
    if stream is not None:
        torch.cuda.set_stream(stream)


class Moment:
    """When everything launched so far is done: an event on a CUDA device's current stream, else the clock. No wait.

    `later.since(earlier)` are the seconds between two; on a CUDA device both must be complete, as they are once the
    host has waited for something launched after them.
    """

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._seconds = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        if self._event is None:
            return self._seconds - earlier._seconds
        return 1e-3 * earlier._event.elapsed_time(self._event)

    def wait(self) -> None:
        """The host waits for it, and for nothing launched later."""
        if self._event is not None:
            self._event.synchronize()


def copied(x: Tensor) -> Tensor:
    """x on the host, without a wait: from a CUDA device into page-locked memory, valid once a later `Moment` is."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def read(x: Tensor) -> Tensor:
    """x on the host: the engine's only wait for a device beside that for the frames."""
    host = copied(x)
    Moment(x.device).wait()
    return host
