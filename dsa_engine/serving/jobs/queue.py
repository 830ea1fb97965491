"""The runner of jobs: as many at once as the backend takes, the oldest first, from asyncio.

A job's state is what the store says, so a server that starts again goes on where the last one ended: jobs that it was
making are made anew, with their seed. Only the progress of a job that is being made lives here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from dsa_engine.media.mp4 import Mp4Writer
from dsa_engine.serving.jobs.store import Job, Store
from dsa_engine.serving.types import Backend, ChunkReady, Closed, Opened, Overloaded, Stream, StreamRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_QUEUED_JOBS = 1000  # jobs that may be queued
LINGER = 2.0  # seconds in which jobs write down that their streams were closed
PAUSE = 1.0  # seconds after which something that was not possible is tried again
STORED = ("prompt", "seed", "num_frames", "height", "width", "steps", "threshold", "min_steps", "max_steps")


class StreamFailed(Exception):
    """A stream that did not come to its end."""

    def __init__(self, closed: Closed):
        super().__init__(closed.error or closed.reason)
        self.closed = closed


class ActiveJob:
    """A job that is being made."""

    def __init__(self, job: Job):
        self.job = job
        self.frames = 0  # so far
        self.stream: Stream | None = None
        self.deleted = False
        self.steps: list[int] = []
        self.confidence: list[list[float]] = []
        self.task: asyncio.Task[None] | None = None

    @property
    def progress(self) -> int:
        """Percent, 100 only once the file is there."""
        return min(99, 100 * self.frames // self.job.request["num_frames"])


class Jobs:
    """jobs = Jobs(backend, store); await jobs.start(); ...; jobs.stop(); await backend.close(); await jobs.close()."""

    def __init__(self, backend: Backend, store: Store):
        self.backend, self.store = backend, store
        self.stopping = False
        self._running: dict[str, ActiveJob] = {}
        self._wake = asyncio.Event()
        self._transition_lock = asyncio.Lock()  # between a job's row and `_running`
        self._feeder: asyncio.Task[None] | None = None

    async def start(self) -> None:
        again = await asyncio.to_thread(self.store.recover)
        if again:
            logger.info("%d jobs that were being made are queued again", again)
        self._feeder = asyncio.create_task(self._feed())

    def stop(self) -> None:
        """Begin no more jobs."""
        self.stopping = True
        self._wake.set()

    async def close(self) -> None:
        """Wait for the jobs whose streams the backend has closed, and give the store back."""
        self.stop()
        tasks = [running.task for running in self._running.values()]
        if self._feeder is not None:
            await asyncio.wait([self._feeder, *tasks], timeout=LINGER)
        for id in list(self._running):  # they have not ended, and will not any more
            await asyncio.to_thread(self.store.update, id, status="queued")
        await asyncio.to_thread(self.store.close)

    async def add(self, request: StreamRequest) -> Job:
        """Queue a job. Raises Overloaded where too many wait already, ValueError for an request that is not possible."""
        if self.stopping:
            raise Overloaded("the server is stopping")
        await self.backend.check(request)
        waiting = (await asyncio.to_thread(self.store.counts))["queued"]
        if waiting >= MAX_QUEUED_JOBS:
            raise Overloaded(f"{waiting} jobs are queued, the most there may be; try again later")
        fields = {name: getattr(request, name) for name in STORED}
        card = self.backend.card
        job = await asyncio.to_thread(self.store.add, fields, card.name, card.fps, request.image)
        self._wake.set()
        return job

    def progress(self, id: str) -> int:
        return self._running[id].progress if id in self._running else 0

    async def delete(self, id: str) -> bool:
        """The job and its files, also while it is being made. False where there is none."""
        async with self._transition_lock:
            running = self._running.get(id)
            if running is None:
                return await asyncio.to_thread(self.store.delete, id)
        running.deleted = True
        if running.stream is not None:
            await running.stream.close()
        await asyncio.wait([running.task])
        return await asyncio.to_thread(self.store.delete, id)

    async def _feed(self) -> None:
        """Begin the jobs that wait: when one was added or has ended, and now and then, for replicas come and go."""
        while not self.stopping:
            self._wake.clear()
            try:
                while len(self._running) < self.backend.stats().get("max_jobs", 0) and await self._next():
                    pass
            except Exception:
                logger.exception("no job could be begun; trying again in %g s", PAUSE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE):
                    await self._wake.wait()

    async def _next(self) -> bool:
        """Begin the oldest queued job; False where there is none."""
        async with self._transition_lock:
            job = None if self.stopping else await asyncio.to_thread(self.store.claim)
            if job is None:
                return False
            running = self._running[job.id] = ActiveJob(job)
            running.task = asyncio.create_task(self._run(running))
        return True

    async def _run(self, running: ActiveJob) -> None:
        """Make a job and write down how it went."""
        job, start = running.job, time.monotonic()
        try:
            await self._make(running)
            changes: dict[str, Any] = {
                "status": "completed",
                "completed": time.time(),
                "duration_s": round(time.monotonic() - start, 3),
                "steps": running.steps,
                "confidence": running.confidence or None,
            }
        except Exception as error:
            changes = await self._ending(running, error)
        try:
            if not running.deleted:
                await asyncio.to_thread(self.store.update, job.id, **changes)
        except Exception:  # the row still says in progress: the next start makes it again
            logger.exception("how %s went could not be written down: %s", job.id, changes["status"])
        finally:
            del self._running[job.id]
            self._wake.set()

    async def _ending(self, running: ActiveJob, error: Exception) -> dict[str, Any]:
        """What is written down of a job that came to no good end."""
        reason = error.closed.reason if isinstance(error, StreamFailed) else None
        if isinstance(error, Overloaded) and not self.stopping:
            await asyncio.sleep(PAUSE)
        if isinstance(error, Overloaded) or reason in ("busy", "shutdown"):
            return {"status": "queued"}
        if not running.deleted:
            logger.error("%s failed: %s", running.job.id, error, exc_info=None if reason else error)
        return {"status": "failed", "error": str(error) or type(error).__name__, "completed": time.time()}

    async def _make(self, running: ActiveJob) -> None:
        """The video of a job. Its file is opened, written and closed in a thread of its own, one thing after another:
        encoding takes long, and an encoder must not be closed while it is at work."""
        job, loop = running.job, asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "dsa-engine-video") as thread:

            async def do(work: Callable[..., T], *args: Any) -> T:
                return await loop.run_in_executor(thread, work, *args)

            request = StreamRequest(**job.request, live=False)
            if job.picture:
                request = dataclasses.replace(request, image=await do(self.store.read_picture, job.id))
            writer = Mp4Writer(self.store.video(job.id), job.fps, threads=1)
            await do(writer.__enter__)
            try:
                await self._stream(running, request, lambda frames: do(writer.write, frames))
            except BaseException as error:
                await do(writer.__exit__, type(error), error, error.__traceback__)
                raise
            await do(writer.__exit__, None, None, None)

    async def _stream(self, running: ActiveJob, request: StreamRequest, write: Callable[[np.ndarray], Any]) -> None:
        """All frames of the job's stream. Raises StreamFailed where they did not all come."""
        if self.stopping:  # a backend that is closed may never answer
            raise Overloaded("the server is stopping")
        running.stream = stream = await self.backend.open(request, running.job.id)
        try:
            async for event in stream:
                if running.deleted:
                    raise StreamFailed(Closed("closed"))
                if isinstance(event, Opened) and event.opening is not None:
                    running.frames += len(event.opening)
                    await write(event.opening)
                elif isinstance(event, ChunkReady):
                    chunk = event.chunk
                    await write(chunk.frames)
                    running.frames += len(chunk.frames)
                    running.steps.append(chunk.steps)
                    running.confidence += [] if chunk.confidence is None else [chunk.confidence]
                elif isinstance(event, Closed) and event.reason != "done":
                    raise StreamFailed(event)
        finally:
            await stream.close()
