"""A replica: a worker whose streams are polled over a network.

A poll says which chunk the consumer needs next, how many events it has, and all updates it has sent. So a poll may be
repeated, and may go to any replica: one that does not know the stream continues it from its last snapshot and makes the
chunks after that again. They have the same bits, given `deterministic=True` and steps that do not depend on load.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from dataclasses import dataclass, replace

from dsa_engine.serving.replicas.snapshots import SnapshotStore, StreamSnapshot
from dsa_engine.serving.types import (
    ChunkReady,
    Closed,
    CloseReason,
    Event,
    ModelCard,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)
from dsa_engine.serving.worker.stream import ActiveStream
from dsa_engine.serving.worker.worker import Worker

logger = logging.getLogger(__name__)

PREFETCH_CHUNKS = 1  # chunks made beyond the one that the consumer has, to hide the round trip
POLL_TIMEOUT_S = 2.0  # a poll is answered after this time even without events
LINGER_S = 30.0  # how long the end of a stream can still be polled
REJECTED = -1  # as an index: before all chunks, so that a repeated update is rejected again and delays none after it


@dataclass(frozen=True)
class NumberedUpdate:
    """An update of a stream (`StreamUpdate`). Its number is its place in the order in which they were sent.

    index: of the chunk from which on it is in force, REJECTED, or None if that is not known yet.
    """

    prompt: str | None
    recache: bool = True
    threshold: float | None = None
    transition_chunks: int = 0
    index: int | None = None


@dataclass(frozen=True)
class PollResponse:
    """The next events, up to the first chunk. The event_id of UpdateApplied and UpdateRejected is the update's
    number."""

    replica_id: str
    run: str  # name of the `ReplicaStream`
    received: int  # events of the run with these; the next poll acknowledges them by this number
    persisted: int  # updates below this number are in the stored snapshot and need not be sent again
    events: list[Event]


class ReplicaStream:
    """A stream on this replica, as far as it is ahead of its consumer. Belongs to the replica's event loop.

    Args:
        worker: makes the chunks.
        store: keeps the snapshots.
        id: of the stream, the same on all replicas.
        request: opens it.
        needed: index of the chunk that the consumer needs next.
        every: chunks between two snapshots, 0 for none.
    """

    def __init__(self, worker: Worker, store: SnapshotStore, id: str, request: StreamRequest, needed: int, every: int):
        self.worker, self.store, self.id, self.request, self.every = worker, store, id, request, every
        self.needed = needed
        self.replay_end = needed  # chunks before it are made again, with the updates that they had
        self.run = uuid.uuid4().hex
        self.persisted = 0
        self.last_poll = worker.clock()
        self.ended = False
        self._stream: ActiveStream | None = None
        self._next = 0  # index of the chunk that the worker makes now or next
        self._unacked = False  # the worker waits until that chunk may start
        self._pending_updates: dict[int, NumberedUpdate] = {}
        self._known = 0  # updates known
        self._settled = 0  # updates applied or rejected
        self._thresholds: dict[int, float] = {}  # of updates that are not settled
        self._threshold: float | None = None  # of the last one applied
        self._events: deque[Event] = deque()
        self._acked = 0  # events that the consumer has
        self._changed = asyncio.Event()
        self._snapshots: deque[StreamSnapshot] = deque()  # taken after chunks that the consumer does not have yet
        self._writing: asyncio.Task | None = None
        self._discarding: asyncio.Task | None = None
        self._closing = False
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        request = self.request if self.request.snapshot_every else replace(self.request, snapshot_every=self.every)
        stored = await self._claim()
        if stored is not None:
            threshold = request.threshold if stored.threshold is None else stored.threshold
            request = replace(request, snapshot=stored.snapshot, threshold=threshold)
            self._settled = self.persisted = stored.settled
            self._threshold = stored.threshold
        if request.snapshot is not None:
            self._next = request.snapshot.rollout["index"]
        self._pending_updates = {number: u for number, u in self._pending_updates.items() if number >= self._settled}
        due, loop = self._due_updates(), asyncio.get_running_loop()

        def open_stream() -> None:  # in the worker's thread: no chunk starts before its updates are there
            stream = self.worker.open(request, lambda event: self._listen(loop, event), f"{self.id}/{self.run}")
            _send(stream, due)
            self._stream = stream

        await asyncio.wrap_future(self.worker.call(open_stream))
        _send(self._stream, self._due_updates())
        if self._closing:
            self._stream.close()

    def _listen(self, loop: asyncio.AbstractEventLoop, event: Event) -> None:
        """Carry an event from the worker's thread to the replica's loop."""
        if isinstance(event, ChunkReady):
            chunk = event.chunk
            if chunk.index < self.replay_end:  # the player has it and waits for later ones
                self._stream.restart_pacing()
            event = replace(event, chunk=replace(chunk, latents=chunk.latents.cpu()))  # other hosts lack this device
        try:
            loop.call_soon_threadsafe(self._on_event, event)
        except RuntimeError:  # the loop is closed
            pass

    # From the consumer.

    def update(self, updates: dict[int, NumberedUpdate]) -> None:
        """All updates by number, without those in the snapshot; some may be known already."""
        for number in sorted(updates):
            if number >= self._known:
                self._pending_updates[number], self._known = updates[number], number + 1
        if self._stream is not None:
            _send(self._stream, self._due_updates())

    def keepalive(self) -> None:
        if self._stream is not None:
            self._stream.keepalive()

    def close(self, reason: CloseReason = "closed") -> None:
        self._closing = True
        if self._stream is not None:
            self._stream.close(reason)

    def ack(self, received: int) -> None:
        """The consumer has so many events."""
        self.last_poll = self.worker.clock()
        while self._acked < received and self._events:
            event = self._events.popleft()
            self._acked += 1
            if isinstance(event, ChunkReady):
                self.needed = event.chunk.index + 1
        self._persist()
        self._ack_worker()

    async def next_events(self) -> tuple[int, list[Event]]:
        """The next events, up to the first chunk, and the number of all events with these. Empty after a timeout."""
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                while not self._events:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        if self._opening.done() and self._opening.exception() is not None:
            raise self._opening.exception()
        events: list[Event] = []
        for event in self._events:
            events.append(event)
            if isinstance(event, ChunkReady):
                break
            if isinstance(event, Closed):
                self.discard_snapshot(event.reason)
        return self._acked + len(events), events

    # From the worker.

    def _on_event(self, event: Event) -> None:
        if isinstance(event, (UpdateApplied, UpdateRejected)):
            number = int(event.event_id)
            threshold = self._thresholds.pop(number, None)
            if isinstance(event, UpdateApplied) and threshold is not None:
                self._threshold = threshold
            self._settled = number + 1
        elif isinstance(event, Closed):
            self.ended = True
        elif isinstance(event, ChunkReady):
            self._next, self._unacked = event.chunk.index + 1, True
            if event.snapshot is not None:
                self._snapshots.append(StreamSnapshot(event.snapshot, self._next, self._settled, self._threshold))
            if not self.request.snapshot_every:
                event = replace(event, snapshot=None)
        if not (isinstance(event, ChunkReady) and event.chunk.index < self.needed):
            self._events.append(event)
        self._ack_worker()
        self._changed.set()

    def _ack_worker(self) -> None:
        """Let the worker start the next chunk unless enough are prefetched."""
        if self._unacked and sum(isinstance(event, ChunkReady) for event in self._events) <= PREFETCH_CHUNKS:
            self._unacked = False
            _send(self._stream, self._due_updates())
            self._stream.ack()

    def _due_updates(self) -> list[tuple[int, NumberedUpdate]]:
        """Updates due at the next chunk. Already acknowledged updates are replayed at their original chunk; the rest
        are applied no earlier than the first chunk that the consumer has not received."""
        due = []
        while self._pending_updates:
            number = next(iter(self._pending_updates))
            index = self._pending_updates[number].index
            if self._next < (self.replay_end if index is None else index):
                break
            update = self._pending_updates.pop(number)
            due.append((number, update))
            if update.threshold is not None:
                self._thresholds[number] = update.threshold
        return due

    # Snapshots.

    async def _claim(self) -> StreamSnapshot | None:
        if not self.every:
            return None
        try:
            data = await self.store.claim(self.id, self.run, self.needed)
            device = self.worker.pipe.engine.dit.device
            return None if data is None else await asyncio.to_thread(StreamSnapshot.unpack, data, device)
        except Exception:  # only a short cut: starting from the first chunk gives the same bits
            logger.warning("the snapshot of %s could not be read; it starts again", self.id, exc_info=True)
            return None

    def _persist(self) -> None:
        """Store the latest snapshot that is not later than the chunk that the consumer needs."""
        ready = None
        while self._snapshots and self._snapshots[0].index <= self.needed:
            ready = self._snapshots.popleft()
        if ready is not None and self.every and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write(ready))

    async def _write(self, snapshot: StreamSnapshot) -> None:
        try:
            data = await asyncio.to_thread(snapshot.pack)
            if await self.store.put(self.id, self.run, snapshot.index, data):
                self.persisted = snapshot.settled
        except Exception:
            logger.warning("a snapshot of %s could not be stored", self.id, exc_info=True)

    def discard_snapshot(self, reason: str = "done") -> None:
        """After the end, unless the stream continues on another replica."""
        if self._discarding is None and self.every and reason not in ("shutdown", "busy"):
            self._discarding = asyncio.create_task(self._remove())

    async def _remove(self) -> None:
        try:
            if self._writing is not None:
                await self._writing
            await self.store.remove(self.id, self.run)
        except Exception:
            logger.warning("the snapshot of %s could not be removed", self.id, exc_info=True)


def _send(stream: ActiveStream, updates: list[tuple[int, NumberedUpdate]]) -> None:
    for number, u in updates:
        stream.update(u.prompt, str(number), u.recache, u.threshold, u.transition_chunks)


class Replica:
    """Streams of a worker for consumers in other processes.

    Args:
        worker: runs already.
        store: keeps the snapshots.
        replica_id: its name among the replicas.
        every: chunks between two snapshots of a stream; 0 for none: a stream that moves starts again.
    """

    def __init__(self, worker: Worker, store: SnapshotStore, replica_id: str, every: int = 8):
        self.worker, self.store, self.replica_id, self.every = worker, store, replica_id, every
        self._streams: dict[str, ReplicaStream] = {}

    def card(self) -> ModelCard:
        return self.worker.card

    async def check(self, request: StreamRequest) -> str | None:
        """Why the request is not possible, None if it is."""
        try:
            await asyncio.wrap_future(self.worker.check(request))
        except ValueError as error:
            return str(error)
        return None

    async def poll(
        self,
        id: str,
        needed: int,
        updates: dict[int, NumberedUpdate],
        run: str | None,
        received: int,
        request: StreamRequest | None,
    ) -> PollResponse | None:
        """The stream's next events.

        Args:
            id: of the stream.
            needed: index of the chunk that the consumer needs next.
            updates: all that were sent, by number, without those in the stored snapshot.
            run: that `received` counts events of.
            received: events that the consumer has.
            request: opens or continues the stream if `run` is not here.

        Returns:
            None if the run is not here and there is no request.
        """
        stream = self._streams.get(id)
        if stream is None or stream.run != run:
            if request is None:
                return None
            if stream is not None:  # it was on another replica in between, and may have been updated there
                stream.close()
            stream = self._streams[id] = ReplicaStream(self.worker, self.store, id, request, needed, self.every)
        stream.update(updates)
        stream.ack(received)
        received, events = await stream.next_events()
        return PollResponse(self.replica_id, stream.run, received, stream.persisted, events)

    def update(self, id: str, updates: dict[int, NumberedUpdate]) -> None:
        if id in self._streams:
            self._streams[id].update(updates)

    def keepalive(self, id: str) -> None:
        if id in self._streams:
            self._streams[id].keepalive()

    def close(self, id: str) -> None:
        if id in self._streams:
            self._streams[id].close()

    def sweep(self) -> None:
        """To be called regularly: closes jobs that are no longer polled (the worker does that for live streams) and
        forgets streams whose end was not polled."""
        now = self.worker.clock()
        for stream in list(self._streams.values()):
            silent = now - stream.last_poll
            if stream.ended and silent > LINGER_S:
                stream.discard_snapshot()
                del self._streams[stream.id]
            elif not stream.request.live and silent > self.worker.limits.idle_timeout:
                stream.close("idle")

    def stats(self) -> tuple[str, dict[str, float]]:
        """Its id and its worker's stats."""
        return self.replica_id, self.worker.stats()

    async def stop(self, grace: float = 3.0) -> None:
        await asyncio.to_thread(self.worker.stop, grace)
