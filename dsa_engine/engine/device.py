"""What work on a device takes beside tensors: that it is current, streams, points in its time, copies to the host.

On a CPU all of it is trivial.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def current(device: torch.device) -> AbstractContextManager:
    """In it a CUDA device is the thread's current one. Triton and csrc launch there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_device(method: Method) -> Method:
    """A method during which the object's `device` is current: for whatever can be called from outside, for nobody else
    knows which device that is, and every thread begins with the first."""

    @functools.wraps(method)
    def there(self, *args, **kwargs):
        with current(self.device):
            return method(self, *args, **kwargs)

    return there


class Streams(NamedTuple):
    """The streams of an engine beside its callers' own, made once: torch hands out 32 in turn, and two that are at work
    at once must not be the same one, nor share the workspace that cuBLAS keeps for each."""

    capture: torch.cuda.Stream  # of the model's graphs
    decode: torch.cuda.Stream  # the decoder's graphs are captured there too

    @classmethod
    def on(cls, device: torch.device) -> Streams | None:
        """None where there is no CUDA device."""
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None


def stream_of(device: torch.device) -> Any:
    """The thread's current stream, for another thread to `follow`; None where there is no CUDA device."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def follow(stream: Any) -> None:
    """From now on this thread launches on that stream, and so on its device."""
    if stream is not None:
        torch.cuda.set_stream(stream)


class Moment:
    """When what was launched until now is done: of a CUDA device's current stream an event, elsewhere the clock.

    It is taken without a wait. Seconds from one to another are `later.since(earlier)`; on a CUDA device both must have
    come by then, as they have once the host has waited for something that was launched after them.
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
        """The host waits until it has come, and for nothing that was launched later."""
        if self._event is not None:
            self._event.synchronize()


def copied(x: Tensor) -> Tensor:
    """x on the host, without a wait: from a CUDA device into page-locked memory, there once a later `Moment` is."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def read(x: Tensor) -> Tensor:
    """x on the host: the one way in which the engine waits for a device."""
    host = copied(x)
    Moment(x.device).wait()
    return host
