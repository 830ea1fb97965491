"""Runs jobs from asyncio: the oldest first, as many at once as the backend has slots for.

A job's state is in the store, so a server that restarts continues where the last one ended: jobs that were running are
made again, with their seed. Only the progress of a running job is held here.
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
MAX_QUEUED_JOBS = 1000
CLOSE_TIMEOUT_S = 2.0  # for running jobs to store their state when the server stops
MAX_DECODES = 2  # pictures that are in memory at once
RETRY_S = 1.0  # after which something that was not possible is tried again
STORED = ("prompt", "seed", "num_frames", "height", "width", "steps", "threshold", "min_steps", "max_steps")


class StreamFailed(Exception):
    """A job's stream ended before all frames were made."""

    def __init__(self, closed: Closed):
        super().__init__(closed.error or closed.reason)
        self.closed = closed


class ActiveJob:
    """A running job."""

    def __init__(self, job: Job):
        self.job = job
        self.frames = 0  # made so far
        self.stream: Stream | None = None
        self.deleted = False
        self.steps: list[int] = []
        self.confidence: list[list[float]] = []
        self.task: asyncio.Task[None] | None = None

    @property
    def progress(self) -> int:
        """Percent; below 100, since the file is not complete yet."""
        return min(99, 100 * self.frames // self.job.request["num_frames"])


class Jobs:
    """jobs = Jobs(backend, store); await jobs.start(); ...; jobs.stop(); await backend.close(); await jobs.close()."""

    def __init__(self, backend: Backend, store: Store):
        self.backend, self.store = backend, store
        self.stopping = False
        self.decoding = asyncio.Semaphore(MAX_DECODES)
        self._active: dict[str, ActiveJob] = {}
        self._client_of: dict[str, str] = {}  # of queued jobs, since the start
        self._wake = asyncio.Event()
        self._transition_lock = asyncio.Lock()  # keeps a job's row and `_active` consistent
        self._feeder: asyncio.Task[None] | None = None

    async def start(self) -> None:
        requeued = await asyncio.to_thread(self.store.recover)
        if requeued:
            logger.info("%d interrupted jobs are queued again", requeued)
        self._feeder = asyncio.create_task(self._feed())

    def stop(self) -> None:
        """Start no more jobs."""
        self.stopping = True
        self._wake.set()

    async def close(self) -> None:
        """Wait for the jobs whose streams the backend has closed, and release the store."""
        self.stop()
        tasks = [active.task for active in self._active.values()]
        if self._feeder is not None:
            await asyncio.wait([self._feeder, *tasks], timeout=CLOSE_TIMEOUT_S)
        for id in list(self._active):  # they did not end in time
            await asyncio.to_thread(self.store.update, id, status="queued")
        await asyncio.to_thread(self.store.close)

    async def add(self, request: StreamRequest, client: str = "", most: int = MAX_QUEUED_JOBS) -> Job:
        """Queue a job.

        Args:
            request: not live.
            client: its address, and
            most: how many of its jobs may be queued.

        Raises:
            Overloaded: too many are queued.
            ValueError: a request that is not possible.
        """
        if self.stopping:
            raise Overloaded("the server is stopping")
        await self.backend.check(request)
        queued = (await asyncio.to_thread(self.store.counts))["queued"]
        if queued >= MAX_QUEUED_JOBS:
            raise Overloaded(f"{queued} jobs are queued, no more are accepted; try again later")
        own = sum(address == client for address in self._client_of.values())
        if own >= most:
            raise Overloaded(f"{own} jobs of this address are queued, which is the most; try again later")
        fields = {name: getattr(request, name) for name in STORED}
        card = self.backend.card
        job = await asyncio.to_thread(self.store.add, fields, card.name, card.fps, request.image)
        self._client_of[job.id] = client
        self._wake.set()
        return job

    def progress(self, id: str) -> int:
        return self._active[id].progress if id in self._active else 0

    async def delete(self, id: str) -> bool:
        """The job and its files, also while it runs. False if there is none."""
        async with self._transition_lock:
            self._client_of.pop(id, None)
            active = self._active.get(id)
            if active is None:
                return await asyncio.to_thread(self.store.delete, id)
        active.deleted = True
        if active.stream is not None:
            await active.stream.close()
        await asyncio.wait([active.task])
        return await asyncio.to_thread(self.store.delete, id)

    async def _feed(self) -> None:
        """Start queued jobs: when one was added or has ended, and regularly, since replicas come and go."""
        while not self.stopping:
            self._wake.clear()
            try:
                while len(self._active) < self.backend.stats().get("max_jobs", 0) and await self._start_next():
                    pass
            except Exception:
                logger.exception("no job could be started; trying again in %g s", RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._wake.wait()

    async def _start_next(self) -> bool:
        """Start the oldest queued job; False if there is none."""
        async with self._transition_lock:
            job = None if self.stopping else await asyncio.to_thread(self.store.claim)
            if job is None:
                return False
            self._client_of.pop(job.id, None)
            active = self._active[job.id] = ActiveJob(job)
            active.task = asyncio.create_task(self._run(active))
        return True

    async def _run(self, active: ActiveJob) -> None:
        """Make a job and store the outcome."""
        job, start = active.job, time.monotonic()
        try:
            await self._make(active)
            outcome: dict[str, Any] = {
                "status": "completed",
                "completed": time.time(),
                "duration_s": round(time.monotonic() - start, 3),
                "steps": active.steps,
                "confidence": active.confidence or None,
            }
        except Exception as error:
            outcome = await self._failure(active, error)
        try:
            if not active.deleted:
                await asyncio.to_thread(self.store.update, job.id, **outcome)
        except Exception:  # the row still says in progress: the next start makes it again
            logger.exception("the outcome of %s could not be stored: %s", job.id, outcome["status"])
        finally:
            del self._active[job.id]
            self._wake.set()

    async def _failure(self, active: ActiveJob, error: Exception) -> dict[str, Any]:
        """What to store of a job that was not completed."""
        reason = error.closed.reason if isinstance(error, StreamFailed) else None
        if isinstance(error, Overloaded) and not self.stopping:
            await asyncio.sleep(RETRY_S)
        if isinstance(error, Overloaded) or reason in ("busy", "shutdown"):
            return {"status": "queued"}
        if not active.deleted:
            logger.error("%s failed: %s", active.job.id, error, exc_info=None if reason else error)
        return {"status": "failed", "error": str(error) or type(error).__name__, "completed": time.time()}

    async def _make(self, active: ActiveJob) -> None:
        """Make the video. One thread opens, writes and closes the file, one call after another: encoding takes long,
        and an encoder must not be closed while it works."""
        job, loop = active.job, asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "dsa-engine-video") as thread:

            async def in_thread(work: Callable[..., T], *args: Any) -> T:
                return await loop.run_in_executor(thread, work, *args)

            request = StreamRequest(**job.request, live=False)
            if job.picture:
                request = dataclasses.replace(request, image=await in_thread(self.store.read_image, job.id))
            writer = Mp4Writer(self.store.video(job.id), job.fps, threads=1)
            await in_thread(writer.__enter__)
            try:
                await self._stream(active, request, lambda frames: in_thread(writer.write, frames))
            except BaseException as error:
                await in_thread(writer.__exit__, type(error), error, error.__traceback__)
                raise
            await in_thread(writer.__exit__, None, None, None)

    async def _stream(self, active: ActiveJob, request: StreamRequest, write: Callable[[np.ndarray], Any]) -> None:
        """Write all frames of the job's stream. Raises StreamFailed if it ends too early."""
        if self.stopping:  # a closed backend may never answer
            raise Overloaded("the server is stopping")
        active.stream = stream = await self.backend.open(request, active.job.id)
        try:
            async for event in stream:
                if active.deleted:
                    raise StreamFailed(Closed("closed"))
                if isinstance(event, Opened) and event.opening is not None:
                    active.frames += len(event.opening)
                    await write(event.opening)
                elif isinstance(event, ChunkReady):
                    chunk = event.chunk
                    await write(chunk.frames)
                    active.frames += len(chunk.frames)
                    active.steps.append(chunk.steps)
                    active.confidence += [] if chunk.confidence is None else [chunk.confidence]
                elif isinstance(event, Closed) and event.reason != "done":
                    raise StreamFailed(event)
        finally:
            await stream.close()
