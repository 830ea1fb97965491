"""A server in a thread, and a backend that is no engine: what a stream does is up to the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from dsa_engine.engine.chunk import Chunk
from dsa_engine.serving.types import ChunkReady, Closed, ModelCard, Opened, Overloaded, UpdateApplied

PATIENCE = 30.0  # seconds; only what hangs gets there


@contextmanager
def serving(*routers, **options):
    """host:port of an app of these routers. `options` of uvicorn."""
    app = FastAPI()
    for routes in routers:
        app.include_router(routes)
    config = uvicorn.Config(app, port=0, log_level="warning", ws_per_message_deflate=False, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


def until(true, patience=PATIENCE):
    """Wait until something is so; fails where it never gets so."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class FakeStream:
    """Chunks of one picture that says which chunk it is, every `period` seconds. `taken`: chunks asked for."""

    def __init__(self, backend, order, id):
        self.backend, self.request, self.id = backend, order, id
        self.events = deque([Opened(backend.card.fps, backend.card.height, backend.card.width, 0)])
        self.changes: list[tuple] = []
        self.made = self.touched = 0
        self.closed = asyncio.Event()
        self.prompt, self.threshold, self.ended = order.prompt, order.threshold, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.ended:
            raise StopAsyncIteration
        if not self.events and not self.closed.is_set():
            try:
                await asyncio.wait_for(self.closed.wait(), self.backend.period)
            except TimeoutError:
                self._make()
        event = self.events.popleft() if self.events else Closed("closed")
        if isinstance(event, Closed):
            self.ended = True
            self.backend.open_streams.discard(self)
        return event

    def _make(self):
        if self.made == self.request.num_frames:
            return self.events.append(Closed("done"))
        card = self.backend.card
        frames = np.full((1, card.height, card.width, 3), self.made % 256, dtype=np.uint8)
        timings = {"commit": 0.0, "denoise": 1.0, "decode": 1.0, "total": 2.0}
        chunk = Chunk(self.made, frames, torch.zeros(1), 1, [0.5], self.made / card.fps, timings, self.prompt)
        self.made += 1
        self.events.append(ChunkReady(chunk, 0.001, None, self.threshold))

    async def update(self, prompt=None, event_id=None, recache=True, threshold=None, transition_chunks=0):
        self.changes.append((prompt, event_id, threshold, transition_chunks))
        if not self.backend.deaf:
            self.prompt, self.threshold = prompt or self.prompt, self.threshold if threshold is None else threshold
            self.events.append(UpdateApplied(event_id, self.prompt, self.made))
            await asyncio.sleep(0.005)  # so that whoever plays the events could be quicker than whoever tells

    def keepalive(self):
        self.touched += 1

    async def close(self):
        self.closed.set()
        self.backend.open_streams.discard(self)


class FakeBackend:
    def __init__(self, height=16, width=16, period=0.001, most=1000, deaf=False):
        self.card = ModelCard("fake", height, width, 12.0, 12, 4, 0.5, {"fast": 0.3}, None)
        self.period, self.most, self.deaf = period, most, deaf
        self.streams: list[FakeStream] = []
        self.open_streams: set[FakeStream] = set()

    async def check(self, order):
        pass

    async def open(self, order, id=None):
        if order.prompt == "impossible":
            raise ValueError("prompt='impossible': the nearest legal prompt is 'possible'")
        if len(self.open_streams) >= self.most:
            raise Overloaded("all places are taken; try again later")
        stream = FakeStream(self, order, id)
        self.streams.append(stream)
        self.open_streams.add(stream)
        return stream

    def stats(self):
        return {"live": len(self.open_streams)}

    async def close(self):
        pass
