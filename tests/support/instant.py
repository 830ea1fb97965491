"""A backend without a model: frames are drawn from the seed, at once or when a test lets them go."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from dsa_engine.engine.chunk import Chunk
from dsa_engine.serving.types import ChunkReady, Closed, ModelCard, Opened, Overloaded, StreamRequest

CARD = ModelCard("instant", 32, 48, 12.0, 12, 4, 0.5, {"fast": 0.3}, None, (3, 3))
TIMINGS = {"commit": 1.0, "denoise": 20.0, "decode": 4.0, "total": 25.0}


def frames_of(seed: int, count: int, picture: np.ndarray | None = None) -> np.ndarray:
    """All frames of the job with this seed, uint8 [T, H, W, 3]."""
    made = count - (picture is not None)
    frames = np.random.default_rng(seed).integers(0, 256, (made, CARD.height, CARD.width, 3), dtype=np.uint8)
    return frames if picture is None else np.concatenate([picture[None], frames])


class InstantStream:
    def __init__(self, backend: Instant, request: StreamRequest, id: str):
        self.backend, self.request, self.id = backend, request, id
        self.closed: Closed | None = None
        self._events = self._all()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._events)

    async def _all(self):
        request, backend = self.request, self.backend
        opening = None if request.image is None else request.image[None]
        yield Opened(CARD.fps, CARD.height, CARD.width, 0, opening)
        made = frames_of(request.seed, request.num_frames, request.image)[0 if opening is None else 1 :]
        for index in range(len(made) // 3):
            await self._wait(backend.go)
            if self.closed is None and (request.seed, index) in backend.faults:
                self.closed = Closed("failed", "the engine broke")
            if self.closed is not None:
                break
            part = made[3 * index : 3 * index + 3]
            event = ChunkReady(
                Chunk(index, part, None, 2, [0.5, 0.25, 0.75], index / 4, TIMINGS, request.prompt), 0.1, None
            )
            backend.observe(self, event)
            yield event
        closed = self.closed or Closed("done")
        backend.observe(self, closed)
        await self.close()
        yield closed

    async def _wait(self, go: asyncio.Event) -> None:
        while not go.is_set() and self.closed is None:
            await asyncio.sleep(0.001)

    async def update(self, prompt, event_id=None, recache=True, threshold=None):
        raise AssertionError("a job is told nothing")

    def keepalive(self):
        raise AssertionError("a job has no idle time")

    async def close(self):
        self.closed = self.closed or Closed("closed")
        self.backend.open_streams.pop(self.id, None)


class Instant:
    """go: chunks are made while it is set; door: streams are opened while it is, knocks: how many wanted to be; faults:
    (seed, chunk) that fail; most: places for jobs; refusals: how often `open` is Overloaded before it lets one in;
    seen: what happened, in order."""

    card = CARD

    def __init__(self, most: int = 2, go: bool = True):
        self.most, self.refusals = most, 0
        self.go = asyncio.Event()
        if go:
            self.go.set()
        self.door, self.knocks = asyncio.Event(), 0
        self.door.set()
        self.faults: set[tuple[int, int]] = set()
        self.open_streams: dict[str, InstantStream] = {}
        self.seen: list[tuple[str, int]] = []
        self.peak = 0
        self.observers = []
        self.stopped = False

    def observe(self, stream: InstantStream, event) -> None:
        for observer in self.observers:
            observer(SimpleNamespace(request=stream.request), event)

    async def check(self, request: StreamRequest) -> None:
        if "impossible" in request.prompt:
            raise ValueError(f"prompt {request.prompt!r}: cannot be made; nearest is 'possible'")

    async def open(self, request: StreamRequest, id: str | None = None) -> InstantStream:
        if self.stopped:
            raise Overloaded("the server is stopping")
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("no place")
        self.knocks += 1
        await self.door.wait()
        stream = self.open_streams[id] = InstantStream(self, request, id)
        self.peak = max(self.peak, len(self.open_streams))
        self.seen.append(("open", request.seed))
        return stream

    def stats(self) -> dict[str, float]:
        return {"live": 0, "jobs": len(self.open_streams), "waiting": 0, "max_jobs": self.most, "pressure": 0.25}

    async def close(self) -> None:
        self.stopped = True
        for stream in list(self.open_streams.values()):
            stream.closed = stream.closed or Closed("shutdown")
