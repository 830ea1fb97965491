"""The state of the pretend device: what happened, what is allocated, what is captured, which device is current."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = f"{Path(__file__).resolve().parents[3]}/"
HERE = f"{Path(__file__).resolve().parent}/"

# Kinds of events. Inside a capture those of FORBIDDEN are errors, as they are on a GPU.
READ = "host read"  # .item(), .tolist(), a shape that depends on data: the host waits for the device
TO_DEVICE = "copy to device"
TO_HOST = "copy to host"
PINNED = "pinned allocation"
WAIT = "wait"  # synchronize() of the device, a stream or an event
FORBIDDEN = {READ, TO_DEVICE, TO_HOST, PINNED, WAIT}


class Event(NamedTuple):
    """phase: what the program said it was doing (`device.phase`); place: lines of the project, innermost first."""

    phase: str
    kind: str
    detail: str
    place: str


class Memory:
    """Bytes of live storages; at their peak with those of `pools`, which graphs keep for their replays. A storage lives
    as long as a tensor on it."""

    def __init__(self):
        self.now = self.peak = 0
        self.pools: dict[Any, int] = {}
        self._users: dict[int, list[int]] = {}  # by storage: bytes, tensors on it
        self._lock = threading.RLock()  # again by itself: a tensor may be collected at any allocation

    def hold(self, inner: torch.Tensor) -> Hold:
        """To be kept by a tensor for as long as it lives."""
        storage = inner.untyped_storage()
        with self._lock:
            users = self._users.setdefault(storage._cdata, [storage.nbytes(), 0])
            users[1] += 1
            if users[1] == 1:
                self.now += users[0]
                self.peak = max(self.peak, self.reserved)
        return Hold(self, inner)

    @property
    def reserved(self) -> int:
        return self.now + sum(self.pools.values())

    def drop(self, key: int) -> None:
        with self._lock:
            users = self._users[key]
            users[1] -= 1
            if not users[1]:
                self.now -= users[0]
                del self._users[key]


class Hold:
    """No weak reference to the tensor does: torch refuses to swap one that has such."""

    def __init__(self, memory: Memory, inner: torch.Tensor):
        self._memory, self._inner = memory, inner  # inner: the storage goes after its count

    def __del__(self):
        self._memory.drop(self._inner.untyped_storage()._cdata)


class Device:
    """One for the process. count: of GPUs; capability: of each; total: bytes of each; no_data: elements above which a
    tensor holds none, None: all do."""

    def __init__(self):
        self.count, self.capability, self.total = 2, (9, 0), 80 << 30
        self.no_data: int | None = None
        self.phase = "start"
        self.events: Counter[Event] = Counter()
        self.memory = Memory()
        self.capture: Any = None  # graphs.Capture
        self.captured: Counter[str] = Counter()  # operations in captures
        self.guard: Any = None  # of this device for torch's own C++, by thread (guard.cpp)
        self._thread = threading.local()

    @property
    def current(self) -> int:
        return self.guard.get_current()

    @current.setter
    def current(self, index: int) -> None:
        self.guard.set_current(index)

    @property
    def streams(self) -> list:
        """Of this thread, the current one last, each with the device that was current before."""
        if not hasattr(self._thread, "streams"):
            self._thread.streams = []
        return self._thread.streams

    def event(self, kind: str, detail: str = "") -> None:
        """Something that a GPU does not do for nothing. Raises RuntimeError in a capture that does not allow it."""
        place = where()
        self.events[Event(self.phase, kind, detail, place)] += 1
        if self.capturing and kind in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind} {detail} at {place}")

    @property
    def capturing(self) -> bool:
        """Whether this thread's stream is: captures are `thread_local`."""
        return self.capture is not None and self.capture.thread == threading.get_ident()

    def reset_peak(self) -> None:
        self.memory.peak = self.memory.reserved

    def of(self, phase: str, *kinds: str) -> dict[Event, int]:
        """The events of a phase."""
        return {e: n for e, n in self.events.items() if e.phase == phase and (not kinds or e.kind in kinds)}


def where(depth: int = 3) -> str:
    """The innermost lines of the project that are running, this package's own left out."""
    places, frame = [], sys._getframe(1)
    while frame is not None and len(places) < depth:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and not file.startswith(HERE) and "/site-packages/" not in file:
            places.append(f"{file[len(ROOT) :]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)


device = Device()
