"""Where streams that run on replicas can be taken up again: their last snapshots, kept outside the replicas."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from dsa_engine.engine.session import Snapshot


@dataclass(frozen=True)
class StreamSnapshot:
    """A stream between two chunks. index: of the chunk that comes next; settled: how many changes had been applied or
    refused by then; threshold: of the last one that had any."""

    snapshot: Snapshot
    index: int
    settled: int
    threshold: float | None = None

    def pack(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self, buffer)
        return buffer.getvalue()

    @staticmethod
    def unpack(data: bytes, device: torch.device) -> StreamSnapshot:
        """Only for bytes that a replica of this deployment has packed: reading them can run any code."""
        return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


class SnapshotStore(Protocol):
    """`InMemorySnapshotStore`, wherever it is."""

    async def claim(self, id: str, run: str, have: int) -> bytes | None: ...

    async def put(self, id: str, run: str, index: int, data: bytes) -> bool: ...

    async def remove(self, id: str, run: str) -> None: ...


class Entry(NamedTuple):
    run: str
    index: int
    data: bytes | None
    touched: float


class InMemorySnapshotStore:
    """The last snapshot of each stream, in memory, as bytes.

    A stream belongs to the run that claimed it last; what an earlier one, cut off but alive, says later does not count.
    lifetime: seconds after which an entry that nobody has touched is forgotten.
    """

    def __init__(self, lifetime: float = 3600.0, clock: Callable[[], float] = time.monotonic):
        self.lifetime, self.clock = lifetime, clock
        self._entries: dict[str, Entry] = {}

    def claim(self, id: str, run: str, have: int) -> bytes | None:
        """The stream is this run's now. Returns its snapshot, None where there is none, or only one of a later chunk
        than number `have`, which is wanted next: of another stream that had the same id."""
        old = self._entries.get(id)
        found = old is not None and old.data is not None and old.index <= have
        index, data = (old.index, old.data) if found else (0, None)
        self._entries[id] = Entry(run, index, data, self.clock())
        return data

    def put(self, id: str, run: str, index: int, data: bytes) -> bool:
        """Keep a snapshot instead of the one before; False where the stream belongs to another run."""
        now = self.clock()
        self._entries = {key: e for key, e in self._entries.items() if now - e.touched <= self.lifetime}
        if id in self._entries and self._entries[id].run != run:
            return False
        self._entries[id] = Entry(run, index, data, now)
        return True

    def remove(self, id: str, run: str) -> None:
        """The stream is at its end."""
        if id in self._entries and self._entries[id].run == run:
            del self._entries[id]

    def sizes(self) -> dict[str, int]:
        """Bytes kept, by stream."""
        return {id: len(entry.data or b"") for id, entry in self._entries.items()}
