"""The request for a stream and the events that it gives. Plain data, the same for every backend.

A request opens a stream. Its events come in this order:

    Queued*  Opened  (UpdateApplied | UpdateRejected | ChunkReady)*  Closed

Queued while all slots are taken. Closed is always the last one, also of a stream that never opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dsa_engine.engine.chunk import Chunk
from dsa_engine.engine.session import Snapshot

CloseReason = Literal["done", "closed", "idle", "lifetime", "shutdown", "busy", "refused", "failed"]


@dataclass(frozen=True)
class StreamRequest:
    """Fields that are None take the worker's or the model's own value."""

    prompt: str
    seed: int = 0
    num_frames: int | None = None  # pixel frames; None for no end
    height: int | None = None
    width: int | None = None
    # "dsa", "relative", "fixed", "budget" (`LoadController`), a preset, or a form such as "fixed:4"
    steps: str | None = None
    threshold: float | None = None  # confidence in [0, 1] at which a chunk stops; the ceiling for "budget"
    min_steps: int | None = None  # of "dsa", "relative" and "budget"
    max_steps: int | None = None
    image: Any = field(default=None, repr=False)  # the first frame, as `Pipeline.session` takes it
    live: bool = True  # paced to the clip's fps, with deadlines; else a job, made as fast as possible
    snapshot: Snapshot | None = field(default=None, repr=False)  # continue from here; of the same model and size
    snapshot_every: int = 0  # chunks between two snapshots, 0 for none


@dataclass(frozen=True)
class Queued:
    """All slots are taken. position: 1 is the next to be admitted."""

    position: int


@dataclass(frozen=True)
class Opened:
    """The stream has a slot."""

    fps: float
    height: int
    width: int
    index: int  # of the next chunk; above 0 after a snapshot
    opening: Any = field(default=None, repr=False)  # the given image after the codec: uint8 [T, H, W, 3]


@dataclass(frozen=True)
class UpdateApplied:
    """An update is in force from chunk `index` on. prompt: the one in force then."""

    event_id: str | None
    prompt: str
    index: int


@dataclass(frozen=True)
class UpdateRejected:
    """An update is not possible; the stream goes on as before."""

    event_id: str | None
    error: str


@dataclass(frozen=True)
class ChunkReady:
    """A chunk is made."""

    chunk: Chunk
    # Seconds since the chunk could start: the slot was given, the player had at most one chunk left, or the consumer
    # acknowledged the previous chunk, whichever came last. Of a job: since the chunk was started.
    latency: float
    deadline: float | None  # latency at which the player runs out; None for a first chunk and for jobs
    threshold: float | None = None  # that the chunk was decided with; None if confidence is not used
    snapshot: Snapshot | None = field(default=None, repr=False)

    @property
    def late(self) -> bool:
        """The player ran out before the chunk was ready."""
        return self.deadline is not None and self.latency > self.deadline


@dataclass(frozen=True)
class Closed:
    """The stream has ended. error: a sentence, for all reasons but "done" and "closed".

    "done": all frames are made; "closed": by its consumer; "idle", "lifetime": a limit of the server; "shutdown": the
    server stops; "busy": no slot, and the queue is full; "refused": the request is not possible; "failed": a fault of
    the engine.
    """

    reason: CloseReason
    error: str | None = None


Event = Queued | Opened | UpdateApplied | UpdateRejected | ChunkReady | Closed


class Overloaded(RuntimeError):
    """No slot is free and the queue is full, or the server is stopping. Trying again later can help."""


@dataclass(frozen=True)
class ModelCard:
    """What a server tells clients about its model."""

    name: str
    height: int
    width: int
    fps: float
    frames: int  # of a clip, if a request does not say
    steps: int  # maximum of a chunk
    threshold: float | None
    presets: dict[str, float]
    prompts: str | None  # the grammar of the prompts that the model knows, None for any prompt
    chunks: tuple[int, int] = (1, 1)  # frames of a clip's first chunk and of a later one


class Stream(Protocol):
    """An open stream, from asyncio. Iterating gives its events. Requesting the next event acknowledges the previous
    one, which lets the next chunk start: a slow consumer slows only its own stream."""

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
        """Set another prompt (`Session.update`), confidence threshold or both from the next chunk on. UpdateApplied or
        UpdateRejected answers."""

    def keepalive(self) -> None:
        """The consumer is still there: restart its idle timeout."""

    async def close(self) -> None:
        """Free the stream's slot; may be called twice. Closed is the last event."""


class Backend(Protocol):
    """Where streams run: an engine in this process (`LocalBackend`) or replicas of it (`RemoteBackend`)."""

    card: ModelCard

    async def check(self, request: StreamRequest) -> None:
        """Raises ValueError if the request is not possible; makes nothing."""

    async def open(self, request: StreamRequest, id: str | None = None) -> Stream:
        """Raises ValueError for a request that is not possible, Overloaded if there is no slot for it."""

    def stats(self) -> dict[str, float]:
        """Values for /metrics: `live`, `jobs`, `waiting`, `max_sessions`, `max_jobs`, `pressure` and others."""

    async def close(self) -> None:
        """Admit nobody, let running chunks finish, close every stream with "shutdown"."""
