"""What a stream is asked for, and what it tells while it runs. Plain data, the same for every backend.

An order opens a stream; its events are, in this order,

    Queued*  Opened  (UpdateApplied | UpdateRejected | ChunkReady)*  Closed

with Queued while all places are taken, and Closed always the last, also of a stream that never opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dsa_engine.engine.session import Chunk, Snapshot


@dataclass(frozen=True)
class StreamRequest:
    """A stream as it is wanted.

    steps: "dsa", "fixed", a preset of the model, "budget" (steps fall under load, `LoadController`), or a policy's form on
    the command line such as "fixed:4"; None is the worker's own. threshold: confidence in [0, 1] at which a chunk is
    done; of "budget": the ceiling. min_steps, max_steps: of "dsa" and "budget". num_frames: pixel frames, None for no
    end. image: a picture to begin with (`given_frames.pixels`). live: it keeps the clip's pace and has deadlines; else
    it is a job, made as fast as room is. snapshot: go on from there (of a stream of the same model and size);
    snapshot_every: a snapshot comes with every so many chunks, 0 for never.
    """

    prompt: str
    seed: int = 0
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: str | None = None
    threshold: float | None = None
    min_steps: int | None = None
    max_steps: int | None = None
    image: Any = field(default=None, repr=False)
    live: bool = True
    snapshot: Snapshot | None = field(default=None, repr=False)
    snapshot_every: int = 0


@dataclass(frozen=True)
class Queued:
    """All places are taken. position: 1 is the next to be let in."""

    position: int


@dataclass(frozen=True)
class Opened:
    """The stream has its place. fps: of the clip; index: of the chunk that comes next, above 0 after a snapshot;
    opening: the picture that it was given to begin with, as the codec gives it back: uint8 [T, H, W, 3]."""

    fps: float
    height: int
    width: int
    index: int
    opening: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class UpdateApplied:
    """A change is in force from chunk `index` on; prompt: the one in force then."""

    event_id: str | None
    prompt: str
    index: int


@dataclass(frozen=True)
class UpdateRejected:
    """A change cannot be had; the stream goes on as before."""

    event_id: str | None
    error: str


@dataclass(frozen=True)
class ChunkReady:
    """A chunk. latency: seconds since it was wanted: the place was given, the player came within a chunk of running
    out, or the consumer took the chunk before, whichever was last; of a job since it was begun. deadline: seconds it
    may take before the player runs out, None for a first chunk and for jobs. threshold: that it was decided with, None
    where confidence does not count.
    """

    chunk: Chunk
    latency: float
    deadline: float | None
    threshold: float | None = None
    snapshot: Snapshot | None = field(default=None, repr=False)

    @property
    def late(self) -> bool:
        """The player ran out before the chunk was there."""
        return self.deadline is not None and self.latency > self.deadline


@dataclass(frozen=True)
class Closed:
    """No more comes. "done": all frames are made; "closed": by its consumer; "idle", "lifetime": a limit of the server;
    "shutdown": the server stops; "busy": no place, and nobody more may wait; "refused": the order is not possible;
    "failed": the engine's fault. error: in words, for all but the first two."""

    reason: Literal["done", "closed", "idle", "lifetime", "shutdown", "busy", "refused", "failed"]
    error: str | None = None


Event = Queued | Opened | UpdateApplied | UpdateRejected | ChunkReady | Closed


class Overloaded(RuntimeError):
    """No place is free and nobody more may wait, or the server is stopping. Trying again later can help."""


@dataclass(frozen=True)
class ModelCard:
    """What a server says of its model. steps: the most a chunk can take; frames: of a clip where an order does not say;
    prompts: the prompts that the model knows, in words, None for any; chunks: frames of a clip's first chunk and of a
    later one."""

    name: str
    height: int
    width: int
    fps: float
    frames: int
    steps: int
    threshold: float | None
    presets: dict[str, float]
    prompts: str | None
    chunks: tuple[int, int] = (1, 1)


class Stream(Protocol):
    """An open stream, from asyncio. Iterating gives its events; asking for the next event takes the one before, which
    lets the next chunk begin: a slow consumer slows its own stream and nobody else's."""

    id: str

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def update(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        """Another prompt (`Session.update`), confidence threshold or both from the next chunk on; UpdateApplied or UpdateRejected
        answers."""

    def keepalive(self) -> None:
        """The consumer is there: its idle time starts anew."""

    async def close(self) -> None:
        """Free the stream's place; harmless when done twice. Closed is the last event."""


class Backend(Protocol):
    """Where streams run: an engine in this process (`local.LocalBackend`) or replicas of it (`ray_app`)."""

    card: ModelCard

    async def check(self, request: StreamRequest) -> None:
        """Raises ValueError where the order is not possible, before anything is made."""

    async def open(self, request: StreamRequest, id: str | None = None) -> Stream:
        """Raises ValueError for an order that is not possible, Overloaded where there is no room for it."""

    def stats(self) -> dict[str, float]:
        """Numbers for /metrics: `live`, `jobs`, `waiting`, `max_sessions`, `max_jobs`, `pressure` and others."""

    async def close(self) -> None:
        """Admit nobody, let running chunks finish, close every stream with "shutdown"."""
