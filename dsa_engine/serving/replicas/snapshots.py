"""The last snapshots of streams on replicas, kept outside the replicas, so that another replica can continue them."""

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
    """A stream between two chunks."""

    snapshot: Snapshot
    index: int  # of the next chunk
    settled: int  # updates applied or rejected so far
    threshold: float | None = None  # of the last update that had one

    def pack(self) -> bytes:
        buffer = io.BytesIO()
        torch.save(self, buffer)
        return buffer.getvalue()

    @staticmethod
    def unpack(data: bytes, device: torch.device) -> StreamSnapshot:
        """Only for bytes that a replica of this deployment has packed: unpickling can run any code."""
        return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


class SnapshotStore(Protocol):
    """`InMemorySnapshotStore`, wherever it runs."""

    async def claim(self, id: str, run: str, needed: int) -> bytes | None: ...

    async def put(self, id: str, run: str, index: int, data: bytes) -> bool: ...

    async def remove(self, id: str, run: str) -> None: ...


class StoredSnapshot(NamedTuple):
    run: str
    index: int  # type: ignore[assignment]
    data: bytes | None
    touched: float


class InMemorySnapshotStore:
    """The last snapshot of each stream, as bytes.

    A stream belongs to the run (`ReplicaStream`) that claimed it last. Writes of an earlier run, cut off but still
    alive, are ignored.

    Args:
        lifetime: seconds after which an unused entry is dropped.
        clock: seconds; replaced by tests.
    """

    def __init__(self, lifetime: float = 3600.0, clock: Callable[[], float] = time.monotonic):
        self.lifetime, self.clock = lifetime, clock
        self._entries: dict[str, StoredSnapshot] = {}

    def claim(self, id: str, run: str, needed: int) -> bytes | None:
        """Give the stream to this run. Returns its snapshot; None if there is none, or only one later than chunk
        `needed`, the consumer's next: then it is of another stream that had the same id."""
        old = self._entries.get(id)
        usable = old is not None and old.data is not None and old.index <= needed
        index, data = (old.index, old.data) if usable else (0, None)
        self._entries[id] = StoredSnapshot(run, index, data, self.clock())
        return data

    def put(self, id: str, run: str, index: int, data: bytes) -> bool:
        """Replace the stream's snapshot; False if the stream belongs to another run."""
        now = self.clock()
        self._entries = {key: e for key, e in self._entries.items() if now - e.touched <= self.lifetime}
        if id in self._entries and self._entries[id].run != run:
            return False
        self._entries[id] = StoredSnapshot(run, index, data, now)
        return True

    def remove(self, id: str, run: str) -> None:
        """The stream has ended."""
        if id in self._entries and self._entries[id].run == run:
            del self._entries[id]

    def sizes(self) -> dict[str, int]:
        """Bytes held, by stream."""
        return {id: len(entry.data or b"") for id, entry in self._entries.items()}
