"""Streams of an engine in this process, from asyncio."""

from __future__ import annotations

import asyncio

from dsa_engine.serving.types import ChunkReady, Closed, Event, Overloaded, StreamRequest
from dsa_engine.serving.worker.stream import ActiveStream
from dsa_engine.serving.worker.worker import Worker


class LocalStream:
    """A worker's stream as an asynchronous iterator of its events (`types.Stream`)."""

    def __init__(self, worker: Worker, request: StreamRequest, id: str | None):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()  # at most one chunk: the next waits for its ack
        self._unacked = False  # a chunk was given and not acknowledged
        self._ended = False
        self._first: Event | None = None
        self.stream: ActiveStream = worker.open(request, lambda event: _put(loop, self._events, event), id)
        self.id = self.stream.id

    async def first(self) -> Event:
        """Its first event, which the iteration will give too."""
        if self._first is None:
            self._first = await self._events.get()
        return self._first

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        if self._unacked:
            self._unacked = False
            self.stream.ack()
        event, self._first = self._first or await self._events.get(), None
        self._unacked = isinstance(event, ChunkReady)
        self._ended = isinstance(event, Closed)
        return event

    async def update(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        self.stream.update(prompt, event_id, recache, threshold, transition_chunks)

    def keepalive(self) -> None:
        self.stream.keepalive()

    async def close(self) -> None:
        self.stream.close()


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:  # the consumer's loop is closed
        pass


class LocalBackend:
    """`types.Backend` on a worker, which it starts and stops.

    Args:
        worker: not started yet.
        grace: seconds that running chunks get when it stops.
    """

    def __init__(self, worker: Worker, grace: float = 3.0):
        self.worker, self.card, self.grace = worker, worker.card, grace

    def start(self) -> None:
        self.worker.start()

    async def check(self, request: StreamRequest) -> None:
        await asyncio.wrap_future(self.worker.check(request))

    async def open(self, request: StreamRequest, id: str | None = None) -> LocalStream:
        stream = LocalStream(self.worker, request, id)
        try:
            first = await stream.first()
        except asyncio.CancelledError:
            await stream.close()
            raise
        if isinstance(first, Closed) and first.reason == "refused":
            raise ValueError(first.error)
        if isinstance(first, Closed) and first.reason in ("busy", "shutdown"):
            raise Overloaded(first.error)
        return stream

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await asyncio.to_thread(self.worker.stop, self.grace)
