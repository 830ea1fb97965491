"""The worker: one thread that runs a pipeline for many streams, their steps batched.

Everything that touches the model happens in this thread, so the engine needs no lock. Others talk to it through an
inbox, it talks to them through the listeners that they gave; it knows nothing of asyncio or HTTP.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from dsa_engine import pipeline_inputs
from dsa_engine.engine.batch_runner import Runner
from dsa_engine.engine.session import Chunk
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.noise import check_seed
from dsa_engine.sampling.policy import Budget
from dsa_engine.serving.limits import Limits
from dsa_engine.serving.types import (
    Applied,
    Busy,
    Card,
    Closed,
    Event,
    Made,
    Opened,
    Order,
    Queued,
    Refused,
)
from dsa_engine.serving.worker.pacing import Governor, Pace
from dsa_engine.serving.worker.step_policy import THRESHOLD_OF, policy_of, with_threshold
from dsa_engine.serving.worker.stream import Change, Listener, Task
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.shapes.world import GRAMMAR

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Runs streams of one pipeline in a thread of its own.

        worker = Worker(pipe)
        worker.start()
        task = worker.open(Order("a red circle rests"), listener=print)
        ...
        worker.stop()

    A listener is called in the worker's thread and must return quickly. observers: called as (task, event) for the
    events of all streams, such as metrics.
    """

    def __init__(
        self,
        pipe: Pipeline,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = True,
    ):
        """overlap: chunks are decoded in a second thread, beside the forwards of others.

        Raises ValueError where the pipeline has fewer cache slots than the limits ask for, no decoder, or no such
        steps as the limits name.
        """
        self.pipe, self.limits, self.clock = pipe, limits or Limits(), clock
        self.governor = Governor()
        self.observers: list[Callable[[Task, Event], None]] = []
        self.card = card(pipe)
        wanted = self.limits.sessions + self.limits.jobs
        if pipe.engine.max_sessions < wanted:
            raise ValueError(
                f"{self.limits.sessions} sessions and {self.limits.jobs} jobs: the pipeline was made for "
                f"max_sessions={pipe.engine.max_sessions}; make it with {wanted}"
            )
        policy_of(pipe, Order(prompt=""), self.limits.steps)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: dict[str, Task] = {}
        self._jobs: dict[str, Task] = {}
        self._waiting: dict[str, Task] = {}
        self._runners: dict[int, Runner] = {}  # one for each pool of the engine
        self._ids = itertools.count(1)
        self._stopping = self._ended = False
        self._failures = 0  # forwards that failed one after another
        self._thread: threading.Thread | None = None
        self._decoders = ThreadPoolExecutor(1, "dsa-engine-decoder", _same_threads) if overlap else None
        self.forwards = 0  # run so far

    # From any thread.

    def start(self) -> None:
        """Start the threads. On a CUDA device the one that decodes warms up first, so that the first frame of a server
        is a usual one; an error of that is raised."""
        if self._thread is not None:
            raise RuntimeError("the worker runs already")
        if self._decoders is not None and self.pipe.device.type == "cuda":
            self._decoders.submit(self.pipe.warm_decoder).result()
        self._thread = threading.Thread(target=self._run, name="dsa-engine-worker", daemon=True)
        self._thread.start()

    def open(self, order: Order, listener: Listener, id: str | None = None) -> Task:
        """Ask for a stream; its events say how it goes on. An order that is not possible is "refused" there."""
        task = Task(self, id or f"stream-{next(self._ids)}", order, listener)
        self.call(lambda: self._ask(task))
        return task

    def check(self, order: Order) -> Future[None]:
        """Whether the order is possible: a future that raises its ValueError."""
        return self.call(lambda: self._check(order))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something in the worker's thread, between two forwards."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        if self._ended:  # its thread has gone: who asks now is answered in his own
            self._drain()
        return future

    def stats(self) -> dict[str, float]:
        return {
            "live": len(self._live),
            "jobs": len(self._jobs),
            "waiting": len(self._waiting),
            "max_sessions": self.limits.sessions,
            "max_jobs": self.limits.jobs,
            "max_waiting": self.limits.waiting,
            "pressure": self.governor.pressure,
            "forwards": self.forwards,
            "cache_bytes": self.pipe.engine.cache_bytes,
        }

    def stop(self, grace: float = 3.0) -> None:
        """Admit nobody, finish the chunks that are being made, for at most `grace` seconds, and end the thread."""
        self.call(self._stop)
        if self._thread is not None:
            self._thread.join(grace)
            self.call(self._abort)
            self._thread.join(grace)
            self._thread = None

    # In the worker's thread.

    def _run(self) -> None:
        while not self._over:
            wait = self.turn()
            if (wait is None or wait > 0) and not self._over:
                try:
                    self._inbox.get(timeout=wait)()
                except queue.Empty:
                    pass
        self._ended = True
        if self._decoders is not None:
            self._decoders.shutdown(wait=False)
        self._drain()  # nobody who asks late waits for ever

    def turn(self) -> float | None:
        """One round: what was asked for, who may begin, one forward of each pool. Returns the seconds after which
        another is worth while, 0.0 at once, None not before somebody asks for something."""
        self._drain()
        now = self.clock()
        self._expire(now)
        self._admit()
        wait = self._begin(now)
        busy = [runner for runner in self._runners.values() if len(runner)]
        for runner in busy:
            self._forward(runner)
        return 0.0 if busy else wait

    def _drain(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    @property
    def _over(self) -> bool:
        return self._stopping and not self._tasks()

    def _tasks(self) -> list[Task]:
        return [*self._live.values(), *self._jobs.values(), *self._waiting.values()]

    def _emit(self, task: Task, event: Event) -> None:
        for listener in (task.listener, *(lambda e, o=o: o(task, e) for o in self.observers)):
            try:
                listener(event)
            except Exception:  # a consumer's fault is not the other streams'
                logger.exception("a listener of %s failed at %s", task.id, type(event).__name__)

    def _check(self, order: Order) -> None:
        """Everything that a session would refuse."""
        pipe = self.pipe
        check_seed(order.seed)
        pipe.engine.encode([order.prompt])
        policy_of(pipe, order, self.limits.steps)
        pipeline_inputs.clip(
            pipe.engine, 1, pipe._size(order.height, order.width), order.num_frames, order.image, None, None, None
        )

    def _ask(self, task: Task) -> None:
        try:
            if self._stopping:
                raise Busy("the server is stopping")
            self._check(task.order)
        except (ValueError, Busy) as error:
            return self._emit(task, Closed("shutdown" if self._stopping else "refused", str(error)))
        task.opened = task.seen = self.clock()
        if task.order.live and len(self._live) + len(self._waiting) >= self.limits.sessions + self.limits.waiting:
            return self._emit(task, Closed("busy", self._full()))
        if not task.order.live and len(self._jobs) >= self.limits.jobs:
            return self._emit(task, Closed("busy", f"all {self.limits.jobs} places for jobs are taken"))
        self._waiting[task.id] = task
        self._admit()
        self._positions()

    def _full(self) -> str:
        return f"all {self.limits.sessions} places are taken and {len(self._waiting)} streams wait; try again later"

    def _admit(self) -> None:
        """Places go to those who wait, in the order in which they came."""
        for task in list(self._waiting.values()):
            places, most = (self._live, self.limits.sessions) if task.order.live else (self._jobs, self.limits.jobs)
            if len(places) < most and not self._stopping:
                del self._waiting[task.id]
                places[task.id] = task
                self._open(task)
                self._positions()

    def _positions(self) -> None:
        for position, task in enumerate(self._waiting.values(), 1):
            if task.position != position:
                task.position = position
                self._emit(task, Queued(position))

    def _open(self, task: Task) -> None:
        order, pipe = task.order, self.pipe
        try:
            task.policy = policy_of(pipe, order, self.limits.steps)
            task.session = pipe.session(
                order.prompt,
                seed=order.seed,
                num_frames=order.num_frames,
                height=order.height,
                width=order.width,
                step_policy=task.policy,
                image=order.image,
            )
            opening = task.session.opening()
            if order.snapshot is not None:
                task.session.restore(order.snapshot)
        except Exception as error:
            refused = isinstance(error, ValueError)
            if not refused:
                logger.exception("opening %s failed", task.id)
            return self.end(task, Closed("refused" if refused else "failed", str(error)))
        task.opened = task.seen = self.clock()
        task.pace = Pace(pipe.fps, task.opened) if order.live else None
        height, width = order.height or pipe.height, order.width or pipe.width
        self._emit(task, Opened(pipe.fps, height, width, task.session.index, opening))

    def told(self, task: Task, change: Change) -> None:
        if task.session is not None or task.id in self._waiting:
            task.changes.append(change)
            task.seen = self.clock()

    def taken(self, task: Task, now: float) -> None:
        task.room, task.seen = True, now
        if task.pace is not None:
            task.pace.taken(now)

    def _expire(self, now: float) -> None:
        for task in [*self._live.values(), *self._waiting.values()]:
            if now >= task.seen + self.limits.idle:
                self.end(task, Closed("idle", f"no sign of the client for {self.limits.idle:g} s"))
            elif now >= task.opened + self.limits.lifetime and task.id in self._live:
                self.end(task, Closed("lifetime", f"open for {self.limits.lifetime:g} s, the longest there is"))

    def _begin(self, now: float) -> float | None:
        """Begin the chunks that are wanted now; seconds until the next one is, or a limit is reached."""
        times = []
        for task in [*self._live.values(), *self._jobs.values()]:
            if task.runner is not None or task.decoding:
                continue
            if task.session.exhausted and task.room:
                self.end(task, Closed("done"))
            elif task.room and task.order.live and task.pace.wanted > now:
                times.append(task.pace.wanted)
            elif task.room:
                self._begin_chunk(task)
        times += [task.seen + self.limits.idle for task in (*self._live.values(), *self._waiting.values())]
        times += [task.opened + self.limits.lifetime for task in self._live.values()]
        return max(0.0, min(times) - now) if times else None

    def _begin_chunk(self, task: Task) -> None:
        session = task.session
        try:
            while task.changes:
                self._apply(task, task.changes.popleft())
            if isinstance(task.policy, Budget):
                for policy in session.rollout.policies:  # the session's own copy of it
                    policy.threshold = self.governor.threshold(task.policy.ceiling)
            runner = self._runners.setdefault(id(session.rollout.inputs), Runner(self.limits.rows))
            runner.add(session, task.pace.due if task.order.live else None)
        except Exception as error:
            logger.exception("beginning chunk %d of %s failed", session.index, task.id)
            return self.end(task, Closed("failed", str(error)))
        task.runner, task.room, task.begun = runner, False, self.clock()

    def _apply(self, task: Task, change: Change) -> None:
        """All of a change or nothing of it."""
        session = task.session
        try:
            policy = task.policy
            if change.threshold is not None:
                policy = with_threshold(policy, change.threshold, self.pipe.max_steps)
            if change.prompt is not None:
                session.update(change.prompt, change.recache, change.transition_chunks)
        except ValueError as error:
            return self._emit(task, Refused(change.event_id, str(error)))
        if policy is not task.policy:
            task.policy = policy
            for own in session.rollout.policies:  # the session's copy of it
                setattr(own, THRESHOLD_OF[type(policy)], change.threshold)
        self._emit(task, Applied(change.event_id, session.prompt, session.index))

    def _forward(self, runner: Runner) -> None:
        tasks = {id(task.session): task for task in self._tasks() if task.runner is runner}
        try:
            done = runner.forward()
        except Exception as error:
            self._failures += 1
            logger.exception("a forward of %d streams failed (%d in a row)", len(tasks), self._failures)
            if self._failures > 1:  # once may have been bad luck: the runner tries the same forward again
                for task in tasks.values():
                    self.end(task, Closed("failed", str(error)))
            return
        self._failures = 0
        self.forwards += 1
        for session in done:
            self._finish(tasks[id(session)])

    def _finish(self, task: Task) -> None:
        """The task's chunk is denoised. It is decoded beside the forwards that follow."""
        session, task.runner = task.session, None
        rule = session.rollout.policies[0].rule(session.index, self.pipe.max_steps)
        threshold = rule.threshold if rule is not None and rule.threshold <= 1 else None
        task.decoding = True
        if self._decoders is None:
            return self._decoded(task, threshold, _outcome(session.hand_over()))
        done = self._decoders.submit(_outcome, session.hand_over())
        done.add_done_callback(lambda done: self.call(lambda: self._decoded(task, threshold, done.result())))

    def _decoded(self, task: Task, threshold: float | None, chunk: Chunk | Exception) -> None:
        task.decoding = False
        if self._place(task) is None:  # closed meanwhile
            return
        every, session, snapshot = task.order.snapshot_every, task.session, None
        try:
            if isinstance(chunk, Exception):
                raise chunk
            if every and session.index % every == 0:
                snapshot = session.snapshot()
        except Exception as error:
            logger.exception("decoding a chunk of %s failed", task.id)
            return self.end(task, Closed("failed", str(error)))
        latency, deadline = self.clock() - task.begun, None
        if task.pace is not None:
            latency, deadline = task.pace.delivered(self.clock(), len(chunk.frames))
        if deadline is not None:
            self.governor.delivered(latency, deadline, len(self._live))
        self._emit(task, Made(chunk, latency, deadline, threshold, snapshot))
        if self._stopping:
            self.end(task, Closed("shutdown"))

    def _place(self, task: Task) -> dict[str, Task] | None:
        return next((p for p in (self._live, self._jobs, self._waiting) if p.get(task.id) is task), None)

    def end(self, task: Task, closed: Closed) -> None:
        """Give the stream's place back; nothing happens where that was done before."""
        places = self._place(task)
        if places is None:
            return
        del places[task.id]
        if not self._live:  # with nobody there is no load, and no chunk that could say so
            self.governor = Governor()
        if task.session is not None:
            if task.runner is not None:
                task.runner.remove(task.session)
                task.runner = None
            task.session.close()
        self._runners = {key: runner for key, runner in self._runners.items() if len(runner)}
        self._emit(task, closed)
        self._positions()

    def _stop(self) -> None:
        self._stopping = True
        for task in self._tasks():
            if task.runner is None and not task.decoding:
                self.end(task, Closed("shutdown"))

    def _abort(self) -> None:
        for task in self._tasks():
            self.end(task, Closed("shutdown", "the chunk that was being made was given up"))


def _outcome(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _same_threads() -> None:
    """A new thread begins with OpenMP's own number of threads; this gives it the one that torch was told."""
    torch.set_num_threads(torch.get_num_threads())


def card(pipe: Pipeline) -> Card:
    """What a server says of a pipeline. Raises ValueError for one without a decoder, a text encoder or a size."""
    engine = pipe.engine
    missing = [
        name
        for name, part in (("VAE", engine.decoder), ("text encoder", engine.text), ("size", pipe.height))
        if part is None
    ]
    if missing:
        raise ValueError(
            f"model {pipe.name!r} has no {', no '.join(missing)}: it cannot be served; load it with vae=, text="
        )
    known = GRAMMAR if isinstance(engine.text, SlotTextEncoder) else None
    chunks = tuple(engine.decoder.frames_of(pipe.config.chunk_frames, first) for first in (True, False))
    return Card(
        pipe.name,
        pipe.height,
        pipe.width,
        pipe.fps,
        pipe.frames,
        pipe.max_steps,
        engine.config.threshold,
        dict(engine.config.presets),
        known,
        chunks,
    )
