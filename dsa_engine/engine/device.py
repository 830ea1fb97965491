"""What work on a device takes beside tensors: points in its time, and copies to the host. On a CPU both are trivial."""

from __future__ import annotations

import time

import torch
from torch import Tensor


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
