"""A stream as its worker knows it, the handle that its caller holds, and the messages between the two."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from torch import Tensor

from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.engine.chunk import Chunk
from dsa_engine.engine.session import Session
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import REDUCE, Budget, ExitRule, Policy
from dsa_engine.serving.types import CloseReason, Event, Opened, StreamRequest, UpdateApplied, UpdateRejected
from dsa_engine.serving.worker.pacing import LoadController, PlaybackPacer
from dsa_engine.serving.worker.step_policy import resolve_policy

Listener = Callable[[Event], None]


class StreamState(Enum):
    NEW = "new"  # its OpenStream message is in the worker's inbox
    QUEUED = "queued"  # waits for a slot
    READY = "ready"  # holds a slot; its next chunk has not started
    DENOISING = "denoising"
    DECODING = "decoding"
    CLOSED = "closed"


@dataclass(frozen=True)
class StreamUpdate:
    """From the next chunk on: another prompt, another threshold, or both. None leaves a value as it is."""

    prompt: str | None = None
    event_id: str | None = None
    recache: bool = True
    threshold: float | None = None
    transition_chunks: int = 0


class ActiveStream:
    """A stream: its state, its session, its caller's handle.

    Args:
        id: name in log lines.
        request: what was asked for.
        listener: called with each event in the worker's thread; must return quickly.
        post: puts a message into the worker's inbox.
        clock: the worker's clock, in seconds.
    """

    def __init__(
        self,
        id: str,
        request: StreamRequest,
        listener: Listener,
        post: Callable[[Message], None],
        clock: Callable[[], float],
    ):
        self.id, self.request, self.listener = id, request, listener
        self._post, self._clock = post, clock
        self.state = StreamState.NEW
        self.session: Session | None = None
        self.policy: Policy | None = None
        self.runner: BatchRunner | None = None  # while DENOISING
        self.pacer: PlaybackPacer | None = None  # of a live stream
        self.pending_updates: deque[StreamUpdate] = deque()
        self.consumer_ready = True  # the last chunk was acknowledged
        self.opened = 0.0  # when it was queued, then when it got its slot
        self.chunk_started = 0.0
        self.last_activity = 0.0  # of the consumer
        self.position = 0  # in the queue, as last sent

    # From any thread; they return at once.

    def update(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        """Set another prompt (`Session.update`), confidence threshold or both from the next chunk on. UpdateApplied or
        UpdateRejected answers."""
        self._post(UpdateStream(self, StreamUpdate(prompt, event_id, recache, threshold, transition_chunks)))

    def ack(self) -> None:
        """The consumer is done with the last chunk; the next one may start."""
        self._post(AckChunk(self, self._clock()))  # the time until the worker reads it is not the consumer's

    def keepalive(self) -> None:
        self.last_activity = self._clock()  # a single float: no need to wake the worker

    def close(self, reason: CloseReason = "closed") -> None:
        """Free its slot at once, also in the middle of a chunk."""
        self._post(CloseStream(self, reason))

    # In the worker's thread.

    @property
    def has_slot(self) -> bool:
        return self.state in (StreamState.READY, StreamState.DENOISING, StreamState.DECODING)

    @property
    def busy(self) -> bool:
        """A chunk is being made."""
        return self.state in (StreamState.DENOISING, StreamState.DECODING)

    def open_session(self, pipe: Pipeline, default_steps: str | None) -> Opened:
        """Raises ValueError for a request that is not possible."""
        request = self.request
        self.policy = resolve_policy(pipe, request, default_steps)
        self.session = pipe.session(
            request.prompt,
            seed=request.seed,
            num_frames=request.num_frames,
            height=request.height,
            width=request.width,
            step_policy=self.policy,
            image=request.image,
        )
        opening = self.session.prefix_frames()
        if request.snapshot is not None:
            self.session.restore(request.snapshot)
        self.opened = self.last_activity = self._clock()
        self.pacer = PlaybackPacer(pipe.fps, self.opened) if request.live else None
        height, width = request.height or pipe.height, request.width or pipe.width
        return Opened(pipe.fps, height, width, self.session.index, opening)

    def apply(self, update: StreamUpdate) -> UpdateApplied | UpdateRejected:
        """Apply all of an update or nothing of it."""
        session, policy = self.session, self.policy
        try:
            if update.threshold is not None:
                policy = policy.with_threshold(update.threshold)
            if update.prompt is not None:
                session.update(update.prompt, update.recache, update.transition_chunks)
        except ValueError as error:
            return UpdateRejected(update.event_id, str(error))
        if policy is not self.policy:
            self.policy = policy
            session.set_threshold(update.threshold)
        return UpdateApplied(update.event_id, session.prompt, session.index)

    def start_chunk(self, runner: BatchRunner, load: LoadController) -> None:
        """Add the next chunk to the runner."""
        if isinstance(self.policy, Budget):
            cast(Budget, self.session.policy).threshold = load.threshold(self.policy.ceiling)
        runner.add(self.session, None if self.pacer is None else self.pacer.runs_out)
        self.state, self.runner = StreamState.DENOISING, runner
        self.consumer_ready, self.chunk_started = False, self._clock()

    def start_decoding(self, max_steps: int) -> Callable[[], ChunkDecoded]:
        """The chunk is denoised. Returns what decodes it, for any thread."""
        session, self.runner, self.state = self.session, None, StreamState.DECODING
        rule, before = session.policy.rule(session.index, max_steps), session.rollout.exit_confidence
        decode = session.detach_decode()

        def run() -> ChunkDecoded:
            try:
                return ChunkDecoded(self, decode(), _threshold(rule, before))
            except Exception as error:
                return ChunkDecoded(self, error)

        return run

    def restart_pacing(self) -> None:
        """The next chunk may start at once, as if the player started with it."""
        if self.pacer is not None:
            self.pacer = PlaybackPacer(self.pacer.fps, self._clock())

    def release(self) -> None:
        """Close the session and leave the runner."""
        if self.runner is not None:
            self.runner.remove(self.session)
            self.runner = None
        if self.session is not None:
            self.session.close()


def _threshold(rule: ExitRule | None, before: Tensor) -> float | None:
    """That a chunk was decided with, None if confidence is not used; before [1, F]: of the chunk before it."""
    if rule is None or (rule.threshold is not None and rule.threshold > 1):
        return None
    return REDUCE[rule.reduce](before[0].tolist()) if rule.threshold is None else rule.threshold


@dataclass(frozen=True)
class OpenStream:
    stream: ActiveStream


@dataclass(frozen=True)
class UpdateStream:
    stream: ActiveStream
    update: StreamUpdate


@dataclass(frozen=True)
class AckChunk:
    """time: when the consumer acknowledged, on the worker's clock."""

    stream: ActiveStream
    time: float


@dataclass(frozen=True)
class CloseStream:
    stream: ActiveStream
    reason: CloseReason


@dataclass(frozen=True)
class ChunkDecoded:
    """From the decoder's thread. outcome: the chunk, or why there is none; threshold: that it was decided with."""

    stream: ActiveStream
    outcome: Chunk | Exception
    threshold: float | None = None


@dataclass(frozen=True)
class Call:
    """A function to run in the worker's thread."""

    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.work())
            except Exception as error:
                self.future.set_exception(error)


Message = OpenStream | UpdateStream | AckChunk | CloseStream | ChunkDecoded | Call
