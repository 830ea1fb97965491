"""The worker: one thread that runs a pipeline for many streams and batches their steps.

Everything that touches the model happens in this thread, so the engine needs no lock. Others post messages to its
inbox; it answers through the listeners of the streams. It knows nothing of asyncio or HTTP.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.engine.chunk import Chunk
from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import ChunkReady, Closed, Event, Queued, StreamRequest
from dsa_engine.serving.worker.model_card import model_card
from dsa_engine.serving.worker.pacing import LoadController
from dsa_engine.serving.worker.step_policy import resolve_policy
from dsa_engine.serving.worker.stream import (
    AckChunk,
    ActiveStream,
    Call,
    ChunkDecoded,
    CloseStream,
    Listener,
    Message,
    OpenStream,
    StreamState,
    UpdateStream,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Runs streams of one pipeline in a thread of its own.

        worker = Worker(pipe)
        worker.start()
        stream = worker.open(StreamRequest("a red circle rests"), listener=print)
        ...
        worker.stop()

    A listener is called in the worker's thread and must return quickly. `observers` are called with (stream, event) for
    the events of all streams, for example metrics.

    Args:
        pipe: needs a decoder and a text encoder, and at least as many cache slots as `limits` asks for.
        limits: what is admitted.
        clock: seconds; replaced by tests.
        overlap: decode chunks in a second thread, beside the forwards of other streams.

    Raises:
        ValueError: the pipeline has too few slots, no decoder or text encoder, or not the steps that `limits` names.
    """

    def __init__(
        self,
        pipe: Pipeline,
        limits: WorkerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = True,
    ):
        self.pipe, self.limits, self.clock = pipe, limits or WorkerLimits(), clock
        self.controller = LoadController()
        self.observers: list[Callable[[ActiveStream, Event], None]] = []
        self.card = model_card(pipe)
        slots = self.limits.slots
        if pipe.engine.max_sessions < slots:
            raise ValueError(
                f"{self.limits.max_sessions} sessions and {self.limits.max_jobs} jobs: the pipeline was made for "
                f"max_sessions={pipe.engine.max_sessions}; make it with {slots}"
            )
        resolve_policy(pipe, StreamRequest(prompt=""), self.limits.steps)
        self.forwards = 0  # run so far
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._streams: list[ActiveStream] = []  # queued or with a slot, in the order of arrival
        self._runners: dict[int, BatchRunner] = {}  # by pool of the engine
        self._ids = itertools.count(1)
        self._stopping = self._ended = False
        self._failures = 0  # consecutive forwards that failed
        self._thread: threading.Thread | None = None
        self._decoder = ThreadPoolExecutor(1, "dsa-engine-decoder", _inherit_torch_threads) if overlap else None

    # From any thread.

    def start(self) -> None:
        """Start the threads. On a CUDA device the decoder's thread warms up first, so that the first frame of a server
        takes no longer than others; an error of that warm-up is raised."""
        if self._thread is not None:
            raise RuntimeError("the worker runs already")
        if self._decoder is not None and self.pipe.device.type == "cuda":
            self._decoder.submit(self.pipe.warm_decoder).result()
        self._thread = threading.Thread(target=self._run, name="dsa-engine-worker", daemon=True)
        self._thread.start()

    def open(self, request: StreamRequest, listener: Listener, id: str | None = None) -> ActiveStream:
        """Request a stream; its events report what becomes of it. An impossible request is closed as "refused"."""
        stream = ActiveStream(id or f"stream-{next(self._ids)}", request, listener, self._post, self.clock)
        self._post(OpenStream(stream))
        return stream

    def check(self, request: StreamRequest) -> Future[None]:
        """A future that raises ValueError if the request is not possible."""
        return self.call(lambda: self._check(request))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run a function in the worker's thread, between two forwards."""
        call = Call(work)
        self._post(call)
        return call.future

    def stats(self) -> dict[str, float]:
        return {
            "live": len(self._live),
            "jobs": len(self._jobs),
            "waiting": len(self._queued),
            "max_sessions": self.limits.max_sessions,
            "max_jobs": self.limits.max_jobs,
            "max_waiting": self.limits.max_queue,
            "pressure": self.controller.pressure,
            "forwards": self.forwards,
            "cache_bytes": self.pipe.engine.cache_bytes,
        }

    def stop(self, grace: float = 3.0) -> None:
        """Admit nobody, finish the running chunks for at most `grace` seconds, and end the thread."""
        self.call(self._stop)
        if self._thread is not None:
            self._thread.join(grace)
            self.call(self._abort)
            self._thread.join(grace)
            self._thread = None

    def _post(self, message: Message) -> None:
        self._inbox.put(message)
        if self._ended:  # no thread is left to answer: the caller's own does
            self._drain()

    # In the worker's thread.

    def _run(self) -> None:
        while not self._done:
            wait = self.turn()
            if (wait is None or wait > 0) and not self._done:
                try:
                    self._handle(self._inbox.get(timeout=wait))
                except queue.Empty:
                    pass
        self._ended = True
        if self._decoder is not None:
            self._decoder.shutdown(wait=False)
        self._drain()  # messages that came late are answered too

    def turn(self) -> float | None:
        """One round: messages, limits, admission, chunks that may start, one forward of each pool. Returns the seconds
        until another round is needed, 0.0 for at once, None for not before the next message."""
        self._drain()
        now = self.clock()
        self._expire(now)
        self._admit()
        wait = self._start_chunks(now)
        runners = [runner for runner in self._runners.values() if len(runner)]
        for runner in runners:
            self._forward(runner)
        return 0.0 if runners else wait

    def _drain(self) -> None:
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._handle(message)

    def _handle(self, message: Message) -> None:
        if isinstance(message, Call):
            return message.run()
        stream = message.stream
        try:
            match message:
                case OpenStream():
                    self._enqueue(stream)
                case UpdateStream(_, update) if stream.state is not StreamState.CLOSED:
                    stream.pending_updates.append(update)
                    stream.last_activity = self.clock()
                case AckChunk(_, time) if stream.state is not StreamState.CLOSED:
                    stream.consumer_ready, stream.last_activity = True, time
                    if stream.pacer is not None:
                        stream.pacer.ack(time)
                case CloseStream(_, reason):
                    self.end(stream, Closed(reason))
                case ChunkDecoded(_, outcome, threshold):
                    self._decoded(stream, outcome, threshold)
        except Exception as error:  # a fault of one stream does not stop the others
            logger.exception("%s of %s failed", type(message).__name__, stream.id)
            self.end(stream, Closed("failed", str(error)))

    @property
    def _live(self) -> list[ActiveStream]:
        return [stream for stream in list(self._streams) if stream.has_slot and stream.request.live]

    @property
    def _jobs(self) -> list[ActiveStream]:
        return [stream for stream in list(self._streams) if stream.has_slot and not stream.request.live]

    @property
    def _queued(self) -> list[ActiveStream]:
        return [stream for stream in list(self._streams) if stream.state is StreamState.QUEUED]

    @property
    def _done(self) -> bool:
        return self._stopping and not self._streams

    def _emit(self, stream: ActiveStream, event: Event) -> None:
        listeners: list[Callable[[Event], object]] = [stream.listener]
        for listener in listeners + [partial(observer, stream) for observer in self.observers]:
            try:
                listener(event)
            except Exception:  # a fault of one consumer does not stop the others
                logger.exception("a listener of %s failed at %s", stream.id, type(event).__name__)

    # Admission.

    def _check(self, request: StreamRequest) -> None:
        """Raises ValueError for everything that a session would refuse."""
        resolve_policy(self.pipe, request, self.limits.steps)
        size = dict(height=request.height, width=request.width)
        self.pipe.check_session(
            request.prompt, num_frames=request.num_frames, seed=request.seed, image=request.image, **size
        )

    def _enqueue(self, stream: ActiveStream) -> None:
        limits, live, queued = self.limits, stream.request.live, len(self._queued)
        if self._stopping:
            return self.end(stream, Closed("shutdown", "the server is stopping"))
        try:
            self._check(stream.request)
        except ValueError as error:
            return self.end(stream, Closed("refused", str(error)))
        if live and len(self._live) + queued >= limits.max_sessions + limits.max_queue:
            words = f"all {limits.max_sessions} places are taken and {queued} streams wait; try again later"
            return self.end(stream, Closed("busy", words))
        if not live and len(self._jobs) >= limits.max_jobs:
            return self.end(stream, Closed("busy", f"all {limits.max_jobs} places for jobs are taken"))
        stream.opened = stream.last_activity = self.clock()
        stream.state = StreamState.QUEUED
        self._streams.append(stream)
        self._admit()
        self._send_positions()

    def _admit(self) -> None:
        """Give free slots to queued streams, first come first served."""
        for stream in [] if self._stopping else self._queued:
            live = stream.request.live
            if len(self._live if live else self._jobs) < (self.limits.max_sessions if live else self.limits.max_jobs):
                stream.state = StreamState.READY
                self._open(stream)
                self._send_positions()

    def _send_positions(self) -> None:
        for position, stream in enumerate(self._queued, 1):
            if stream.position != position:
                stream.position = position
                self._emit(stream, Queued(position))

    def _open(self, stream: ActiveStream) -> None:
        try:
            opened = stream.open_session(self.pipe, self.limits.steps)
        except Exception as error:
            refused = isinstance(error, ValueError)
            if not refused:
                logger.exception("opening %s failed", stream.id)
            return self.end(stream, Closed("refused" if refused else "failed", str(error)))
        self._emit(stream, opened)

    def _expire(self, now: float) -> None:
        limits = self.limits
        for stream in [*self._live, *self._queued]:
            if now >= stream.last_activity + limits.idle_timeout:
                self.end(stream, Closed("idle", f"no sign of the client for {limits.idle_timeout:g} s"))
            elif now >= stream.opened + limits.lifetime and stream.has_slot:
                self.end(stream, Closed("lifetime", f"open for {limits.lifetime:g} s, the longest there is"))

    # Chunks.

    def _start_chunks(self, now: float) -> float | None:
        """Start the chunks that may start now. Returns the seconds until the next one may, or a limit is reached."""
        times = []
        for stream in [*self._live, *self._jobs]:
            if stream.state is StreamState.READY and stream.consumer_ready:
                if stream.session.exhausted:
                    self.end(stream, Closed("done"))
                elif stream.pacer is not None and stream.pacer.start_at > now:
                    times.append(stream.pacer.start_at)
                else:
                    self._start_chunk(stream)
        times += [stream.last_activity + self.limits.idle_timeout for stream in (*self._live, *self._queued)]
        times += [stream.opened + self.limits.lifetime for stream in self._live]
        return max(0.0, min(times) - now) if times else None

    def _start_chunk(self, stream: ActiveStream) -> None:
        session = stream.session
        try:
            while stream.pending_updates:
                self._emit(stream, stream.apply(stream.pending_updates.popleft()))
            runner = self._runners.setdefault(id(session.pool), BatchRunner(self.limits.max_batch_rows))
            stream.start_chunk(runner, self.controller)
        except Exception as error:
            logger.exception("starting chunk %d of %s failed", session.index, stream.id)
            self.end(stream, Closed("failed", str(error)))

    def _forward(self, runner: BatchRunner) -> None:
        streams = {id(stream.session): stream for stream in self._streams if stream.runner is runner}
        try:
            denoised = runner.forward()
        except Exception as error:
            self._failures += 1
            logger.exception("a forward of %d streams failed (%d in a row)", len(streams), self._failures)
            if self._failures > 1:  # the runner has retried the same forward once
                for stream in streams.values():
                    self.end(stream, Closed("failed", str(error)))
            return
        self._failures = 0
        self.forwards += 1
        for session in denoised:
            self._decode(streams[id(session)])

    def _decode(self, stream: ActiveStream) -> None:
        """Decode the stream's denoised chunk, beside the forwards that follow."""
        decode = stream.start_decoding(self.pipe.max_steps)
        if self._decoder is None:
            self._handle(decode())
        else:
            self._decoder.submit(lambda: self._post(decode()))

    def _decoded(self, stream: ActiveStream, outcome: Chunk | Exception, threshold: float | None) -> None:
        if stream.state is not StreamState.DECODING:  # closed meanwhile
            return
        stream.state = StreamState.READY
        every, session, snapshot = stream.request.snapshot_every, stream.session, None
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if every and session.index % every == 0:
                snapshot = session.snapshot()
        except Exception as error:
            logger.exception("decoding a chunk of %s failed", stream.id)
            return self.end(stream, Closed("failed", str(error)))
        now = self.clock()
        latency, deadline = now - stream.chunk_started, None
        if stream.pacer is not None:
            latency, deadline = stream.pacer.delivered(now, len(outcome.frames))
        if deadline is not None:
            self.controller.delivered(latency, deadline, len(self._live))
        self._emit(stream, ChunkReady(outcome, latency, deadline, threshold, snapshot))
        if self._stopping:
            self.end(stream, Closed("shutdown"))

    # The end.

    def end(self, stream: ActiveStream, closed: Closed) -> None:
        """Free the stream's slot; does nothing if it was closed before."""
        if stream.state is StreamState.CLOSED:
            return
        stream.state = StreamState.CLOSED
        self._streams = [other for other in self._streams if other is not stream]
        if not self._live:  # no load, and no chunk that could report it
            self.controller = LoadController()
        stream.release()
        self._runners = {key: runner for key, runner in self._runners.items() if len(runner)}
        self._emit(stream, closed)
        self._send_positions()

    def _stop(self) -> None:
        self._stopping = True
        for stream in list(self._streams):
            if not stream.busy:
                self.end(stream, Closed("shutdown"))

    def _abort(self) -> None:
        for stream in list(self._streams):
            self.end(stream, Closed("shutdown", "the running chunk was given up"))


def _inherit_torch_threads() -> None:
    """A new thread starts with OpenMP's default number of threads; this gives it the one set for torch."""
    torch.set_num_threads(torch.get_num_threads())
