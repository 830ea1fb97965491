"""Streams of an engine in this process, from asyncio."""

from __future__ import annotations

import asyncio

from dsa_engine.serving.types import Busy, Closed, Event, Made, Order
from dsa_engine.serving.worker.stream import Task
from dsa_engine.serving.worker.worker import Worker


class LocalStream:
    """A worker's stream as an asynchronous iterator of its events (`streams.Stream`)."""

    def __init__(self, worker: Worker, order: Order, id: str | None):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()  # at most one chunk: the next waits until it is taken
        self._holds = False  # a chunk
        self._ended = False
        self._first: Event | None = None
        self.task: Task = worker.open(order, lambda event: _tell(loop, self._events, event), id)
        self.id = self.task.id

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
        if self._holds:
            self._holds = False
            self.task.taken()
        event, self._first = self._first or await self._events.get(), None
        self._holds = isinstance(event, Made)
        self._ended = isinstance(event, Closed)
        return event

    async def tell(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        self.task.tell(prompt, event_id, recache, threshold, transition_chunks)

    def touch(self) -> None:
        self.task.touch()

    async def close(self) -> None:
        self.task.close()


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:  # the consumer's loop is closed: nobody is left to be told
        pass


class LocalBackend:
    """`streams.Backend` on a worker, which it starts and stops. grace: seconds that running chunks then get."""

    def __init__(self, worker: Worker, grace: float = 3.0):
        self.worker, self.card, self.grace = worker, worker.card, grace

    def start(self) -> None:
        self.worker.start()

    async def check(self, order: Order) -> None:
        await asyncio.wrap_future(self.worker.check(order))

    async def open(self, order: Order, id: str | None = None) -> LocalStream:
        stream = LocalStream(self.worker, order, id)
        try:
            first = await stream.first()
        except asyncio.CancelledError:  # who asked has gone
            await stream.close()
            raise
        if isinstance(first, Closed) and first.reason == "refused":
            raise ValueError(first.error)
        if isinstance(first, Closed) and first.reason in ("busy", "shutdown"):
            raise Busy(first.error)
        return stream

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await asyncio.to_thread(self.worker.stop, self.grace)
