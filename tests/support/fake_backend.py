"""A backend without a model: frames are drawn from the seed, at once or when a test lets them go."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace

import numpy as np

from dsa_engine.engine.chunk import Chunk
from dsa_engine.serving.types import ChunkReady, Closed, ModelCard, Opened, Overloaded, StreamRequest, UpdateApplied

CARD = ModelCard("instant", 32, 48, 12.0, 12, 4, 0.5, {"fast": 0.3}, None, (3, 3))
TIMINGS = {"commit": 1.0, "denoise": 20.0, "decode": 4.0, "total": 25.0}


def chunk_frames(card: ModelCard, seed: int, index: int) -> np.ndarray:
    shape = (card.chunks[1], card.height, card.width, 3)
    return np.random.default_rng([seed, index]).integers(0, 256, shape, dtype=np.uint8)


def frames_of(seed: int, count: int, picture: np.ndarray | None = None) -> np.ndarray:
    """All frames of the job with this seed, uint8 [T, H, W, 3]."""
    opening = [] if picture is None else [picture[None]]
    chunks = (count - len(opening)) // CARD.chunks[1]
    return np.concatenate([*opening, *(chunk_frames(CARD, seed, index) for index in range(chunks))])


class FakeStream:
    """made: chunks so far; touched: signs of life; changes: what it was told; events: what it says next; closed: why it
    makes no more."""

    def __init__(self, backend: FakeBackend, request: StreamRequest, id: str | None):
        self.backend, self.request, self.id = backend, request, id
        card, opening = backend.card, None if request.image is None else request.image[None]
        frames = request.num_frames and request.num_frames - (opening is not None)
        self.chunks = frames and frames // card.chunks[1]  # None: without end
        self.events: deque = deque([Opened(card.fps, card.height, card.width, 0, opening)])
        self.changes: list[tuple] = []
        self.made = self.touched = 0
        self.prompt, self.threshold = request.prompt, request.threshold
        self.closed: Closed | None = None
        self.ended = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.ended:
            raise StopAsyncIteration
        backend, asked = self.backend, asyncio.get_running_loop().time()
        while not self.events and self.closed is None:
            if backend.go.is_set() and asyncio.get_running_loop().time() >= asked + backend.period:
                self._make()
            else:
                await asyncio.sleep(0.001)
        event = self.events.popleft() if self.events else self.closed
        backend.observe(self, event)
        if isinstance(event, Closed):
            self.ended = True
            backend.open_streams.discard(self)
        return event

    def _make(self):
        request, index, card = self.request, self.made, self.backend.card
        if (request.seed, index) in self.backend.faults:
            self.closed = Closed("failed", "the engine broke")
        elif index == self.chunks:
            self.closed = Closed("done")
        else:
            frames, start = chunk_frames(card, request.seed, index), index * card.chunks[1] / card.fps
            chunk = Chunk(index, frames, None, 2, [0.5, 0.25, 0.75], start, TIMINGS, self.prompt)
            self.made += 1
            self.events.append(ChunkReady(chunk, 0.1, None, self.threshold))

    async def update(self, prompt=None, event_id=None, recache=True, threshold=None, transition_chunks=0):
        assert self.request.live, "a job is told nothing"
        self.changes.append((prompt, event_id, threshold, transition_chunks))
        if not self.backend.deaf:
            self.prompt, self.threshold = prompt or self.prompt, self.threshold if threshold is None else threshold
            self.events.append(UpdateApplied(event_id, self.prompt, self.made))
            await asyncio.sleep(0.005)  # so that whoever plays the events could be quicker than whoever tells

    def keepalive(self):
        assert self.request.live, "a job has no idle time"
        self.touched += 1

    async def close(self):
        self.closed = self.closed or Closed("closed")
        self.backend.open_streams.discard(self)


class FakeBackend:
    """period: seconds of a chunk; go: chunks are made while it is set; door: streams are opened while it is, knocks:
    how many wanted to be; faults: (seed, chunk) that fail; most: places for jobs; refusals: how often `open` is
    Overloaded before it lets one in; deaf: changes are never applied; streams: all that were opened, of class kind."""

    def __init__(self, card: ModelCard = CARD, period: float = 0.0, most: int = 2, go: bool = True, deaf: bool = False):
        self.card, self.period, self.most, self.deaf, self.kind = card, period, most, deaf, FakeStream
        self.refusals = self.knocks = self.peak = 0
        self.go, self.door = asyncio.Event(), asyncio.Event()
        if go:
            self.go.set()
        self.door.set()
        self.faults: set[tuple[int, int]] = set()
        self.streams: list[FakeStream] = []
        self.open_streams: set[FakeStream] = set()
        self.observers: list = []
        self.stopped = False

    def observe(self, stream: FakeStream, event) -> None:
        for observer in self.observers:
            observer(SimpleNamespace(request=stream.request), event)

    async def check(self, request: StreamRequest) -> None:
        if "impossible" in request.prompt:
            raise ValueError(f"prompt {request.prompt!r}: cannot be made; nearest is 'possible'")

    async def open(self, request: StreamRequest, id: str | None = None) -> FakeStream:
        await FakeBackend.check(self, request)  # whatever a test has put in place of its own
        if self.stopped:
            raise Overloaded("the server is stopping")
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("no place")
        self.knocks += 1
        await self.door.wait()
        stream = self.kind(self, request, id)
        self.streams.append(stream)
        self.open_streams.add(stream)
        self.peak = max(self.peak, len(self.open_streams))
        return stream

    def stats(self) -> dict[str, float]:
        jobs = sum(not stream.request.live for stream in self.open_streams)
        live = len(self.open_streams) - jobs
        return {"live": live, "jobs": jobs, "waiting": 0, "max_jobs": self.most, "pressure": 0.25}

    async def close(self) -> None:
        self.stopped = True
        for stream in self.open_streams:
            stream.closed = stream.closed or Closed("shutdown")
