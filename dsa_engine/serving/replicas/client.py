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

from dsa_engine.serving.replicas.replica import REFUSED, NumberedUpdate, PollResponse
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

FAILOVER_TIMEOUT_S = 60.0  # seconds without a place on any replica after which a stream is given up
STATS_TTL_S = 1.0  # seconds after which numbers are asked for again


class ReplicaUnavailable(Exception):
    """A question found no replica, or no answer. It can be asked again."""


class Replicas(Protocol):
    """The way to replicas (`replica.Replica`)."""

    async def call(self, method: str, *args: Any, home: str | None = None, avoid: frozenset[str] = frozenset()) -> Any:
        """Call a method of replica `home`; where there is none of that name, or home is None, of the one that has least
        to do, but rather not of one to avoid. Raises ReplicaUnavailable."""

    async def stats(self) -> dict[str, dict[str, float]]:
        """The workers' numbers, by replica. Raises ReplicaUnavailable."""


class RemoteStream:
    """A stream on some replica (`types.Stream`).

    It holds all that the stream was told, and how far it has come, so what a replica says counts only where it is new:
    chunks by their index, changes by their number.
    """

    def __init__(self, backend: RemoteBackend, request: StreamRequest, id: str):
        self.id, self.request = id, request
        self.home: str | None = None
        self._closed: str | None = None  # the last replica that was told to close it
        self.moves = 0  # replicas that it has had to leave
        self._backend = backend
        self._run: str | None = None
        self._after = 0
        self._avoid: frozenset[str] = frozenset()
        self._have = 0 if request.snapshot is None else request.snapshot.rollout["index"]
        self._told: dict[int, NumberedUpdate] = {}  # without those that the stream's snapshot has
        self._names: dict[int, str | None] = {}  # event ids of the changes that are neither applied nor refused
        self._numbered = 0
        self._opened = self._closing = self._ended = False
        self._queued = False  # where it is
        self._events: deque[Event] = deque()
        self._heard = backend.clock()  # from a replica that it has a place on
        self._touched = 0.0

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
        """Its next event, which the iteration will give too. Giving up on it loses nothing."""
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
        self._told[self._numbered] = NumberedUpdate(prompt, recache, threshold, transition_chunks)
        self._names[self._numbered] = event_id
        self._numbered += 1
        await self._notify("update", self.id, dict(self._told))

    def keepalive(self) -> None:
        now = self._backend.clock()
        if now - self._touched >= STATS_TTL_S:
            self._touched = now
            self._backend.spawn(self._notify("keepalive", self.id))

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            await self._notify("close", self.id)

    async def _notify(self, method: str, *args: Any) -> None:
        """To lose it does no harm: the next question says the same, or the replica is no more."""
        if self.home is not None and not self._ended:
            self._closed = self.home if method == "close" else self._closed
            try:
                await self._backend.replicas.call(method, *args, home=self.home)
            except ReplicaUnavailable as error:
                logger.info("%s of stream %s was lost: %s", method, self.id, error)

    async def _poll(self) -> None:
        """Ask for the next events. Nothing changes before the answer is there, and then all at once."""
        if self._closing or self._backend.closing:
            if self.home != self._closed:  # its place was on its way when that was said
                await self._notify("close", self.id)
            return self._events.append(Closed("closed" if self._closing else "shutdown"))
        request = self.request if self.home is None else None
        question = (self.id, self._have, dict(self._told), self._run, self._after, request)
        try:
            answer = await self._backend.replicas.call("poll", *question, home=self.home, avoid=self._avoid)
        except ReplicaUnavailable as error:
            logger.warning("stream %s loses replica %s at chunk %d: %s", self.id, self.home, self._have, error)
            if self.home is None:  # any would have done
                return await self._wait(Closed("failed", f"no replica answers: {error}"))
            self._avoid |= {self.home}
            return self._leave()
        if answer is None:  # not the replica that was asked: that one is no more
            return self._leave()
        away = self._merge_response(answer)
        if away is not None:
            await self._wait(away)
        elif self._queued and not answer.events and self._backend.has_room_beside(self.home):
            await self._notify("close", self.id)  # a replica that was started since, or has become free
            self._avoid = frozenset({self.home})
            self._leave()

    async def _wait(self, closed: Closed) -> None:
        """Before all replicas are tried again; the end, where that has gone on for too long."""
        if not self._opened and closed.reason != "failed":
            self._events.append(closed)
        elif self._backend.clock() - self._heard > self._backend.patience:
            self._events.append(Closed("failed", closed.error))
        else:
            await asyncio.sleep(min(0.5, self._backend.patience / 10))

    def _leave(self) -> None:
        self.moves += self.home is not None
        self.home, self._run, self._after, self._queued = None, None, 0, False

    def _merge_response(self, answer: PollResponse) -> Closed | None:
        """Take in an answer. Returns why it has no place anywhere, where that is so."""
        self.home, self._run, self._after = answer.home, answer.run, answer.after
        self._told = {number: told for number, told in self._told.items() if number >= answer.kept}
        for event in answer.events:
            if isinstance(event, Closed) and event.reason in ("busy", "shutdown"):
                everywhere = self.home in self._avoid  # there was no other
                self._avoid = frozenset() if everywhere else self._avoid | {self.home}
                self._leave()
                return event if everywhere else None
            event = self._new(event)
            if event is not None:
                self._events.append(event)
        self._heard, self._avoid = self._backend.clock(), frozenset()
        return None

    def _new(self, event: Event) -> Event | None:
        """The event as the consumer knows it; None where it has come before, from this replica or another."""
        if isinstance(event, (Queued, Opened)):
            self._queued = isinstance(event, Queued)
            known, self._opened = self._opened, self._opened or isinstance(event, Opened)
            return None if known else event
        if isinstance(event, (UpdateApplied, UpdateRejected)):
            number = int(event.event_id)
            if number not in self._names:
                return None
            index = event.index if isinstance(event, UpdateApplied) else REFUSED
            self._told[number] = replace(self._told[number], index=index)
            return replace(event, event_id=self._names.pop(number))
        if isinstance(event, ChunkReady):
            if event.chunk.index < self._have:
                return None
            self._have = event.chunk.index + 1
        if isinstance(event, Closed) and self._backend.closing and not self._closing:
            return Closed("shutdown")
        return event


class RemoteBackend:
    """`types.Backend` on replicas. Make one with `connect`. observers: called as (stream, event) for all events that
    its streams give, such as metrics."""

    def __init__(
        self,
        replicas: Replicas,
        card: ModelCard,
        patience: float = FAILOVER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.replicas, self.card, self.patience, self.clock = replicas, card, patience, clock
        self.observers: list[Callable[[RemoteStream, Event], None]] = []
        self.closing = False
        self._streams: dict[str, RemoteStream] = {}
        self._stats: dict[str, dict[str, float]] = {}
        self._asked = clock()
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, replicas: Replicas, least: int = 1, patience: float = FAILOVER_TIMEOUT_S) -> RemoteBackend:
        """Waits for the first replica, and a while for `least`. Raises ReplicaUnavailable."""
        backend = cls(replicas, await replicas.call("card"), patience)
        await backend._refresh()
        while len(backend._stats) < least and backend.clock() - backend._asked < patience:
            await asyncio.sleep(0.2)
            await backend._refresh()
        return backend

    async def check(self, request: StreamRequest) -> None:
        start = self.clock()
        while True:
            try:
                error = await self.replicas.call("check", request)
                break
            except ReplicaUnavailable as lost:
                if self.clock() - start > self.patience:
                    raise Overloaded(f"no replica answers: {lost}") from lost
                await asyncio.sleep(min(0.5, self.patience / 10))
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
        """A stream's consumer has an event."""
        if isinstance(event, Closed) and self._streams.get(stream.id) is stream:
            del self._streams[stream.id]
        for observer in self.observers:
            try:
                observer(stream, event)
            except Exception:
                logger.exception("an observer failed at %s of %s", type(event).__name__, stream.id)

    def stats(self) -> dict[str, float]:
        """Of all replicas together, as they were a moment ago; `pressure`: of the one with the most; `replicas`."""
        now = self.clock()
        if now - self._asked > STATS_TTL_S:
            self._asked = now
            self._loop.call_soon_threadsafe(lambda: self.spawn(self._refresh()))  # metrics are read in a thread
        names = {name for stats in self._stats.values() for name in stats}
        total = {name: sum(stats.get(name, 0) for stats in self._stats.values()) for name in names}
        if "pressure" in names:
            total["pressure"] = max(stats.get("pressure", 0.0) for stats in self._stats.values())
        return total | {"replicas": len(self._stats)}

    def has_room_beside(self, home: str) -> bool:
        """Whether another replica has a place for a live stream, as far as is known."""
        self.stats()
        others = [stats for name, stats in self._stats.items() if name != home]
        return any(stats["live"] < stats["max_sessions"] and not stats["waiting"] for stats in others)

    async def _refresh(self) -> None:
        try:
            self._stats = await self.replicas.stats()
        except ReplicaUnavailable as error:
            logger.warning("the numbers of the replicas cannot be had: %s", error)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something beside; what fails is only logged."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("work beside a stream failed", exc_info=task.exception())

    async def close(self) -> None:
        """Admit nobody and close every stream with "shutdown". The replicas stay: they are not this backend's own."""
        self.closing = True
        await asyncio.gather(*(stream._notify("close", stream.id) for stream in list(self._streams.values())))
