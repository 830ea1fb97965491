"""A worker without its thread, under a clock of the test's."""

from __future__ import annotations

import numpy as np

from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import ChunkReady, Closed, StreamRequest
from dsa_engine.serving.worker.worker import Worker
from tests.support.serving.sessions import FRAMES, PROMPTS


class Bench:
    """A worker without its thread: `turn` is called by hand, and time passes only when the test says so."""

    def __init__(self, pipe, **limits):
        self.now, self.took = 0.0, 0.0
        self.worker = Worker(
            pipe,
            WorkerLimits(**{"max_sessions": 2, "max_jobs": 2, "max_queue": 1} | limits),
            lambda: self.now,
            overlap=False,
        )
        self.events: dict[str, list] = {}
        self.pipe = pipe

    def open(self, i=0, **order):
        events = []
        options = {"prompt": PROMPTS[i % 3], "seed": i, "num_frames": FRAMES, "live": False, "steps": "fixed:2"}
        stream = self.worker.open(StreamRequest(**options | order), events.append)
        self.events[stream.id] = events
        return stream

    def turn(self):
        self.now += self.took
        return self.worker.turn()

    def run(self, *streams, turns=400):
        """Until they are closed; every chunk is taken at once, and time goes to when something is to be done."""
        for _ in range(turns):
            wait = self.turn()
            for stream in streams:
                if self.events[stream.id] and isinstance(self.events[stream.id][-1], ChunkReady):
                    stream.ack()
            if all(self.of(stream, Closed) for stream in streams):
                return
            self.now += wait or 0.0
        raise AssertionError(f"not closed after {turns} turns")

    def of(self, stream, kind) -> list:
        return [event for event in self.events[stream.id] if isinstance(event, kind)]

    @property
    def slots(self) -> int:
        return sum(pool.cache.in_use for pool in self.pipe.engine._pools.values())


def shown(events) -> np.ndarray:
    return np.concatenate([event.chunk.frames for event in events])
