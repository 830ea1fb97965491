"""A replica: an engine that others ask, over a network, for the next events of their streams.

A consumer pulls. Each question says what it has (`have`, `after`) and what it has told (`changes`), so any question may
be asked twice, and of any replica: one that does not know the stream takes it up at its last snapshot and makes the
chunks after it again. The same seed gives the same bits, with `deterministic=True` and steps that no load changes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from dsa_engine.serving.replicas.snapshots import SnapshotStore, StreamSnapshot
from dsa_engine.serving.types import ChunkReady, Closed, Event, ModelCard, StreamRequest, UpdateApplied, UpdateRejected
from dsa_engine.serving.worker.pacing import PlaybackPacer
from dsa_engine.serving.worker.stream import ActiveStream
from dsa_engine.serving.worker.worker import Worker

logger = logging.getLogger(__name__)

PREFETCH_CHUNKS = 1  # chunks made beyond the one that the consumer has: the way there and back costs no time then
POLL_TIMEOUT_S = 2.0  # seconds after which a question is answered with no events
LINGER_S = 30.0  # seconds for which the end of a stream is told
REFUSED = -1  # before all chunks: told again, it is refused again and holds up none of those after it


@dataclass(frozen=True)
class NumberedUpdate:
    """A change that a stream was told (`StreamUpdate`). index: of the chunk from which on it is in force, REFUSED, or
    None where that is not known yet."""

    prompt: str | None
    recache: bool = True
    threshold: float | None = None
    transition_chunks: int = 0
    index: int | None = None


@dataclass(frozen=True)
class PollResponse:
    """The next events, up to the first chunk; the event_id of UpdateApplied and UpdateRejected is the change's number.

    home, run: who answers; after: how many events of the run that makes in all, which the next question says as a
    ack; kept: changes of a lower number are in the snapshot and need not be told any more.
    """

    home: str
    run: str
    after: int
    kept: int
    events: list[Event]


class ReplicaStream:
    """A stream on this replica, as far as it is ahead of its consumer. Lives in the replica's event loop.

    have: index of the chunk that the consumer wants next; every: chunks between two snapshots.
    """

    def __init__(self, worker: Worker, keeper: SnapshotStore, id: str, request: StreamRequest, have: int, every: int):
        self.worker, self.keeper, self.id, self.request, self.have, self.every = (
            worker,
            keeper,
            id,
            request,
            have,
            every,
        )
        self.name = uuid.uuid4().hex
        self.floor = have  # chunks before it are made again, with the changes that they had
        self.kept = 0
        self.last_poll = worker.clock()
        self.ended = False
        self._task: ActiveStream | None = None
        self._next = 0  # index of the chunk that is being made, or will be
        self._holding = False  # that chunk waits for room
        self._pending_updates: dict[int, NumberedUpdate] = {}
        self._numbered = 0  # changes known
        self._settled = 0  # changes applied or refused
        self._thresholds: dict[int, float] = {}  # of changes that are neither yet
        self._threshold: float | None = None  # of the last one applied
        self._events: deque[Event] = deque()
        self._first = 0  # events receipted
        self._changed = asyncio.Event()
        self._unkept: deque[StreamSnapshot] = deque()  # of chunks that the consumer does not have yet
        self._keeping: asyncio.Task | None = None
        self._forgetting: asyncio.Task | None = None
        self._closing = False
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        request = self.request if self.request.snapshot_every else replace(self.request, snapshot_every=self.every)
        kept = await self._claim()
        if kept is not None:
            threshold = request.threshold if kept.threshold is None else kept.threshold
            request = replace(request, snapshot=kept.snapshot, threshold=threshold)
            self._settled, self.kept, self._threshold = kept.settled, kept.settled, kept.threshold
        if request.snapshot is not None:
            self._next = request.snapshot.rollout["index"]
        self._pending_updates = {
            number: told for number, told in self._pending_updates.items() if number >= self._settled
        }
        due, hear = self._due_updates(), self._listener()

        def begin() -> None:  # in the worker's thread: no chunk begins before its changes are there
            task = self.worker.open(request, hear, f"{self.id}/{self.name}")
            for number, told in due:
                task.update(told.prompt, str(number), told.recache, told.threshold, told.transition_chunks)
            self._task = task

        await asyncio.wrap_future(self.worker.call(begin))
        self._tell()
        if self._closing:
            self._task.close()

    def _listener(self) -> Callable[[Event], None]:
        """Carries the worker's events from its thread to this loop."""
        loop = asyncio.get_running_loop()

        def hear(event: Event) -> None:
            if isinstance(event, ChunkReady):
                chunk = event.chunk
                if chunk.index < self.floor:  # made again: the player has it, and waits for those after it
                    self._skip_pacing()
                event = replace(event, chunk=replace(chunk, latents=chunk.latents.cpu()))  # others have no such device
            try:
                loop.call_soon_threadsafe(self._event, event)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                pass

        return hear

    async def _claim(self) -> StreamSnapshot | None:
        if not self.every:
            return None
        try:
            data = await self.keeper.claim(self.id, self.name, self.have)
            device = self.worker.pipe.engine.dit.device
            return None if data is None else await asyncio.to_thread(StreamSnapshot.unpack, data, device)
        except Exception:  # it is only a short cut: from the first chunk on come the same bits
            logger.warning("the snapshot of %s cannot be had; it starts again", self.id, exc_info=True)
            return None

    def _skip_pacing(self) -> None:
        """In the worker's thread: the next chunk is wanted at once."""
        if self._task.pacer is not None:  # a job's chunks are always wanted at once
            self._task.pacer = PlaybackPacer(self._task.pacer.fps, self.worker.clock())

    # What the consumer says.

    def update(self, changes: dict[int, NumberedUpdate]) -> None:
        """All changes by number, but for those that the snapshot has; some of them may be known here."""
        for number in sorted(changes):
            if number >= self._numbered:
                self._pending_updates[number], self._numbered = changes[number], number + 1
        if self._task is not None:
            self._tell()

    def keepalive(self) -> None:
        if self._task is not None:
            self._task.keepalive()

    def close(self, reason: str = "closed") -> None:
        self._closing = True
        if self._task is not None:
            self._task.close(reason)

    def ack(self, after: int) -> None:
        """The consumer has so many events."""
        self.last_poll = self.worker.clock()
        while self._first < after and self._events:
            event = self._events.popleft()
            self._first += 1
            if isinstance(event, ChunkReady):
                self.have = event.chunk.index + 1
        self._persist()
        self._go_on()

    async def events(self) -> tuple[int, list[Event]]:
        """The next ones, up to the first chunk, and how many there were with them; none after POLL_TIMEOUT_S seconds."""
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                while not self._events:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        if self._opening.done() and self._opening.exception() is not None:
            raise self._opening.exception()
        found: list[Event] = []
        for event in self._events:
            found.append(event)
            if isinstance(event, ChunkReady):
                break
            if isinstance(event, Closed):
                self.discard_snapshot(event.reason)
        return self._first + len(found), found

    # What the worker says.

    def _event(self, event: Event) -> None:
        if isinstance(event, (UpdateApplied, UpdateRejected)):
            number = int(event.event_id)
            threshold = self._thresholds.pop(number, None)
            if isinstance(event, UpdateApplied) and threshold is not None:
                self._threshold = threshold
            self._settled = number + 1
        elif isinstance(event, Closed):
            self.ended = True
        elif isinstance(event, ChunkReady):
            self._next, self._holding = event.chunk.index + 1, True
            if event.snapshot is not None:
                self._unkept.append(StreamSnapshot(event.snapshot, self._next, self._settled, self._threshold))
            if not self.request.snapshot_every:
                event = replace(event, snapshot=None)
        if not (isinstance(event, ChunkReady) and event.chunk.index < self.have):
            self._events.append(event)
        self._go_on()
        self._changed.set()

    def _go_on(self) -> None:
        """Let the worker begin the next chunk, where there is room for it."""
        if self._holding and sum(isinstance(event, ChunkReady) for event in self._events) <= PREFETCH_CHUNKS:
            self._holding = False
            self._tell()
            self._task.ack()

    def _tell(self) -> None:
        for number, told in self._due_updates():
            self._task.update(told.prompt, str(number), told.recache, told.threshold, told.transition_chunks)

    def _due_updates(self) -> list[tuple[int, NumberedUpdate]]:
        """Changes for the next chunk. Those that the consumer saw applied come where they came then, the others not
        before the chunks that it does not have."""
        due = []
        while self._pending_updates:
            number = next(iter(self._pending_updates))
            index = self._pending_updates[number].index
            if self._next < (self.floor if index is None else index):
                break
            told = self._pending_updates.pop(number)
            due.append((number, told))
            if told.threshold is not None:
                self._thresholds[number] = told.threshold
        return due

    # InMemorySnapshotStore.

    def _persist(self) -> None:
        """Store the last snapshot that leaves out no chunk that the consumer may yet ask for."""
        ready = None
        while self._unkept and self._unkept[0].index <= self.have:
            ready = self._unkept.popleft()
        if ready is not None and self.every and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.create_task(self._store(ready))

    async def _store(self, kept: StreamSnapshot) -> None:
        try:
            data = await asyncio.to_thread(kept.pack)
            if await self.keeper.put(self.id, self.name, kept.index, data):
                self.kept = kept.settled
        except Exception:
            logger.warning("a snapshot of %s could not be kept", self.id, exc_info=True)

    def discard_snapshot(self, reason: str = "done") -> None:
        """At its end a stream needs no snapshot, but one that goes on elsewhere does."""
        if self._forgetting is None and self.every and reason not in ("shutdown", "busy"):
            self._forgetting = asyncio.create_task(self._remove())

    async def _remove(self) -> None:
        try:
            if self._keeping is not None:
                await self._keeping
            await self.keeper.remove(self.id, self.name)
        except Exception:
            logger.warning("the snapshot of %s could not be removed", self.id, exc_info=True)


class Replica:
    """Streams of a worker, for consumers elsewhere. home: its name among the replicas; every: chunks between two
    snapshots of a stream, 0 for none: a stream that moves is then made again from its first chunk on."""

    def __init__(self, worker: Worker, keeper: SnapshotStore, home: str, every: int = 8):
        self.worker, self.keeper, self.home, self.every = worker, keeper, home, every
        self._runs: dict[str, ReplicaStream] = {}

    def card(self) -> ModelCard:
        return self.worker.card

    async def check(self, request: StreamRequest) -> str | None:
        """Why the request is not possible; None where it is."""
        try:
            await asyncio.wrap_future(self.worker.check(request))
        except ValueError as error:
            return str(error)
        return None

    async def poll(
        self,
        id: str,
        have: int,
        changes: dict[int, NumberedUpdate],
        run: str | None,
        after: int,
        request: StreamRequest | None,
    ) -> PollResponse | None:
        """The stream's next events. request: opens it, or takes it up, where `run` is not here; None is returned where it
        is not here and there is no request."""
        found = self._runs.get(id)
        if found is None or found.name != run:
            if request is None:
                return None
            if found is not None:  # it was elsewhere in between, and may have been told things there
                found.close()
            found = self._runs[id] = ReplicaStream(self.worker, self.keeper, id, request, have, self.every)
        found.update(changes)
        found.ack(after)
        after, events = await found.events()
        return PollResponse(self.home, found.name, after, found.kept, events)

    def update(self, id: str, changes: dict[int, NumberedUpdate]) -> None:
        if id in self._runs:
            self._runs[id].update(changes)

    def keepalive(self, id: str) -> None:
        if id in self._runs:
            self._runs[id].keepalive()

    def close(self, id: str) -> None:
        if id in self._runs:
            self._runs[id].close()

    def sweep(self) -> None:
        """To be called now and then: gives back the places of jobs that nobody asks for any more (of live streams the
        worker does so itself), and forgets streams whose end nobody wanted to know."""
        now = self.worker.clock()
        for run in list(self._runs.values()):
            silent = now - run.last_poll
            if run.ended and silent > LINGER_S:
                run.discard_snapshot()
                del self._runs[run.id]
            elif not run.request.live and silent > self.worker.limits.idle_timeout:
                run.close("idle")

    def stats(self) -> tuple[str, dict[str, float]]:
        """Its name and its worker's numbers."""
        return self.home, self.worker.stats()

    async def stop(self, grace: float = 3.0) -> None:
        await asyncio.to_thread(self.worker.stop, grace)
