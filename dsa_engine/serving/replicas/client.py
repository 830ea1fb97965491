"""Streams that run on replicas, from asyncio: they go on when a replica dies, leaves or does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol

from dsa_engine.serving.replicas.replica import REJECTED, NumberedUpdate, PollResponse
from dsa_engine.serving.types import (
    ChunkReady,
    Closed,
    Event,
    ModelCard,
    Opened,
    Overloaded,
    Queued,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)

logger = logging.getLogger(__name__)

FAILOVER_TIMEOUT_S = 60.0  # without a slot on any replica; then the stream fails
STATS_TTL_S = 1.0  # stats older than this are fetched again


class ReplicaUnavailable(Exception):
    """A call reached no replica, or got no answer. It can be repeated."""


class Replicas(Protocol):
    """Calls to replicas (`Replica`)."""

    async def call(
        self, method: str, *args: Any, replica_id: str | None = None, avoid: frozenset[str] = frozenset()
    ) -> Any:
        """Call a method of this replica. If it is gone, or None, call the least loaded one, preferably none to avoid.
        Raises ReplicaUnavailable."""

    async def stats(self) -> dict[str, dict[str, float]]:
        """The workers' stats by replica. Raises ReplicaUnavailable."""


class RemoteStream:
    """A stream on some replica (`types.Stream`).

    It keeps all updates and its progress. Of what a replica answers only the new part counts: chunks by index, updates
    by number.
    """

    def __init__(self, backend: RemoteBackend, request: StreamRequest, id: str):
        self.id, self.request = id, request
        self.replica_id: str | None = None
        self.moves = 0  # replicas that it has left
        self._backend = backend
        self._run: str | None = None
        self._received = 0  # events of the run
        self._avoid: frozenset[str] = frozenset()
        self._needed = 0 if request.snapshot is None else request.snapshot.rollout["index"]  # next chunk
        self._updates: dict[int, NumberedUpdate] = {}  # without those in the stored snapshot
        self._event_ids: dict[int, str | None] = {}  # of updates that are neither applied nor rejected
        self._numbered = 0
        self._opened = self._closing = self._ended = False
        self._queued = False  # on its replica
        self._close_sent_to: str | None = None
        self._events: deque[Event] = deque()
        self._last_slot = backend.clock()  # when a replica last answered that it has a slot
        self._last_keepalive = 0.0

    def __aiter__(self) -> RemoteStream:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self.first()
        self._events.popleft()
        self._ended = isinstance(event, Closed)
        self._backend.dispatch_event(self, event)
        return event

    async def first(self) -> Event:
        """The next event, which the iteration will give too. Cancelling this loses nothing."""
        while not self._events:
            await self._poll()
        return self._events[0]

    async def update(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        self._updates[self._numbered] = NumberedUpdate(prompt, recache, threshold, transition_chunks)
        self._event_ids[self._numbered] = event_id
        self._numbered += 1
        await self._notify("update", self.id, dict(self._updates))

    def keepalive(self) -> None:
        now = self._backend.clock()
        if now - self._last_keepalive >= STATS_TTL_S:
            self._last_keepalive = now
            self._backend.spawn(self._notify("keepalive", self.id))

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            await self._notify("close", self.id)

    async def _notify(self, method: str, *args: Any) -> None:
        """Best effort: if it is lost, the next poll says the same, or the replica is gone."""
        if self.replica_id is not None and not self._ended:
            self._close_sent_to = self.replica_id if method == "close" else self._close_sent_to
            try:
                await self._backend.replicas.call(method, *args, replica_id=self.replica_id)
            except ReplicaUnavailable as error:
                logger.info("%s of stream %s was lost: %s", method, self.id, error)

    async def _poll(self) -> None:
        """Ask for the next events. State changes only after the answer, without an await, so it can be cancelled."""
        backend = self._backend
        if self._closing or backend.closing:
            if self.replica_id != self._close_sent_to:  # it got its slot after the close was sent
                await self._notify("close", self.id)
            return self._events.append(Closed("closed" if self._closing else "shutdown"))
        request = self.request if self.replica_id is None else None
        args = (self.id, self._needed, dict(self._updates), self._run, self._received, request)
        try:
            response = await backend.replicas.call("poll", *args, replica_id=self.replica_id, avoid=self._avoid)
        except ReplicaUnavailable as error:
            logger.warning("stream %s lost replica %s at chunk %d: %s", self.id, self.replica_id, self._needed, error)
            if self.replica_id is None:  # any replica would have done
                return await self._retry(Closed("failed", f"no replica answers: {error}"))
            self._avoid |= {self.replica_id}
            return self._leave()
        if response is None:  # another replica answered: the stream's own is gone
            return self._leave()
        no_slot = self._merge_response(response)
        if no_slot is not None:
            await self._retry(no_slot)
        elif self._queued and not response.events and backend.has_slot_beside(self.replica_id):
            await self._notify("close", self.id)  # a replica that was started since, or has a free slot now
            self._avoid = frozenset({self.replica_id})
            self._leave()

    async def _retry(self, closed: Closed) -> None:
        """No replica has a slot: wait before all are tried again, or end the stream."""
        if not self._opened and closed.reason != "failed":
            self._events.append(closed)
        elif self._backend.clock() - self._last_slot > self._backend.failover_timeout:
            self._events.append(Closed("failed", closed.error))
        else:
            await self._backend.retry_delay()

    def _leave(self) -> None:
        self.moves += self.replica_id is not None
        self.replica_id, self._run, self._received, self._queued = None, None, 0, False

    def _merge_response(self, response: PollResponse) -> Closed | None:
        """Returns the reason if no replica has a slot."""
        self.replica_id, self._run, self._received = response.replica_id, response.run, response.received
        self._updates = {number: u for number, u in self._updates.items() if number >= response.persisted}
        for event in response.events:
            if isinstance(event, Closed) and event.reason in ("busy", "shutdown"):
                everywhere = self.replica_id in self._avoid  # there was no other
                self._avoid = frozenset() if everywhere else self._avoid | {self.replica_id}
                self._leave()
                return event if everywhere else None
            event = self._as_new(event)
            if event is not None:
                self._events.append(event)
        self._last_slot, self._avoid = self._backend.clock(), frozenset()
        return None

    def _as_new(self, event: Event) -> Event | None:
        """The event for the consumer; None if it was given before, from this replica or another."""
        if isinstance(event, (Queued, Opened)):
            self._queued = isinstance(event, Queued)
            known, self._opened = self._opened, self._opened or isinstance(event, Opened)
            return None if known else event
        if isinstance(event, (UpdateApplied, UpdateRejected)):
            number = int(event.event_id)
            if number not in self._event_ids:
                return None
            index = event.index if isinstance(event, UpdateApplied) else REJECTED
            self._updates[number] = replace(self._updates[number], index=index)
            return replace(event, event_id=self._event_ids.pop(number))
        if isinstance(event, ChunkReady):
            if event.chunk.index < self._needed:
                return None
            self._needed = event.chunk.index + 1
        if isinstance(event, Closed) and self._backend.closing and not self._closing:
            return Closed("shutdown")
        return event


class RemoteBackend:
    """`types.Backend` on replicas. Made by `connect`.

    `observers` are called with (stream, event) for all events of its streams, for example metrics.
    """

    def __init__(
        self,
        replicas: Replicas,
        card: ModelCard,
        failover_timeout: float = FAILOVER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.replicas, self.card, self.failover_timeout, self.clock = replicas, card, failover_timeout, clock
        self.observers: list[Callable[[RemoteStream, Event], None]] = []
        self.closing = False
        self._streams: dict[str, RemoteStream] = {}
        self._stats: dict[str, dict[str, float]] = {}
        self._stats_time = clock()
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(
        cls, replicas: Replicas, min_replicas: int = 1, failover_timeout: float = FAILOVER_TIMEOUT_S
    ) -> RemoteBackend:
        """Waits for the first replica, then for `min_replicas` up to the timeout. Raises ReplicaUnavailable."""
        backend = cls(replicas, await replicas.call("card"), failover_timeout)
        await backend._fetch_stats()
        while len(backend._stats) < min_replicas and backend.clock() - backend._stats_time < failover_timeout:
            await asyncio.sleep(0.2)
            await backend._fetch_stats()
        return backend

    async def retry_delay(self) -> None:
        await asyncio.sleep(min(0.5, self.failover_timeout / 10))

    async def check(self, request: StreamRequest) -> None:
        start = self.clock()
        while True:
            try:
                error = await self.replicas.call("check", request)
                break
            except ReplicaUnavailable as unavailable:
                if self.clock() - start > self.failover_timeout:
                    raise Overloaded(f"no replica answers: {unavailable}") from unavailable
                await self.retry_delay()
        if error is not None:
            raise ValueError(error)

    async def open(self, request: StreamRequest, id: str | None = None) -> RemoteStream:
        if self.closing:
            raise Overloaded("the server is stopping")
        stream = RemoteStream(self, request, id or uuid.uuid4().hex)
        self._streams[stream.id] = stream
        try:
            first = await stream.first()
            if isinstance(first, Closed) and first.reason == "refused":
                raise ValueError(first.error)
            if isinstance(first, Closed) and first.reason in ("busy", "shutdown", "failed"):
                raise Overloaded(first.error)
        except BaseException:
            self._streams.pop(stream.id, None)
            self.spawn(stream.close())
            raise
        return stream

    def dispatch_event(self, stream: RemoteStream, event: Event) -> None:
        """A stream's consumer gets an event."""
        if isinstance(event, Closed) and self._streams.get(stream.id) is stream:
            del self._streams[stream.id]
        for observer in self.observers:
            try:
                observer(stream, event)
            except Exception:
                logger.exception("an observer failed at %s of %s", type(event).__name__, stream.id)

    def stats(self) -> dict[str, float]:
        """Recent sums over all replicas; `pressure` is the maximum; `replicas` is their number."""
        now = self.clock()
        if now - self._stats_time > STATS_TTL_S:
            self._stats_time = now
            self._loop.call_soon_threadsafe(lambda: self.spawn(self._fetch_stats()))  # metrics are read in a thread
        names = {name for stats in self._stats.values() for name in stats}
        total = {name: sum(stats.get(name, 0) for stats in self._stats.values()) for name in names}
        if "pressure" in names:
            total["pressure"] = max(stats.get("pressure", 0.0) for stats in self._stats.values())
        return total | {"replicas": len(self._stats)}

    def has_slot_beside(self, replica_id: str) -> bool:
        """Another replica has a slot for a live stream, as far as is known."""
        self.stats()
        others = [stats for name, stats in self._stats.items() if name != replica_id]
        return any(stats["live"] < stats["max_sessions"] and not stats["waiting"] for stats in others)

    async def _fetch_stats(self) -> None:
        try:
            self._stats = await self.replicas.stats()
        except ReplicaUnavailable as error:
            logger.warning("the stats of the replicas are not available: %s", error)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something in the background; its errors are only logged."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("background work of a stream failed", exc_info=task.exception())

    async def close(self) -> None:
        """Admit nobody and close every stream with "shutdown". The replicas stay: they are not this backend's own."""
        self.closing = True
        await asyncio.gather(*(stream._notify("close", stream.id) for stream in list(self._streams.values())))
