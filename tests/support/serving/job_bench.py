"""A job queue on a store, for tests."""

from __future__ import annotations

import asyncio

import numpy as np

from dsa_engine.media.mp4 import Mp4Writer
from dsa_engine.serving.jobs.queue import Jobs
from dsa_engine.serving.jobs.store import Store
from dsa_engine.serving.types import StreamRequest
from tests.support.fake_backend import CARD, FakeBackend

PROMPT = "a red circle jumps"


def order(seed: int, frames: int = 12, **options) -> StreamRequest:
    size = {"height": CARD.height, "width": CARD.width}
    return StreamRequest(PROMPT, seed=seed, num_frames=frames, live=False, **size, **options)


async def until(condition, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


class Bench:
    """A runner on a store, which a test may leave and take up again."""

    def __init__(self, folder, backend=None, **options):
        self.backend = backend or FakeBackend(**options)
        self.store = Store(folder)
        self.jobs = Jobs(self.backend, self.store)

    async def __aenter__(self):
        await self.jobs.start()
        return self

    async def __aexit__(self, *_):
        self.jobs.stop()
        await self.backend.close()
        await self.jobs.close()

    async def add(self, *seeds, **options) -> list[str]:
        return [(await self.jobs.add(order(seed, **options))).id for seed in seeds]

    def states(self, ids) -> list[str]:
        return [self.store.get(id).status for id in ids]

    async def done(self, ids) -> None:
        await until(lambda: set(self.states(ids)) <= {"completed", "failed"})


def written(tmp_path, frames: np.ndarray) -> bytes:
    """The file that these frames make, all at once."""
    path = tmp_path / "expected.mp4"
    with Mp4Writer(path, CARD.fps, threads=1) as video:
        video.write(frames)
    return path.read_bytes()


def left(store: Store) -> list[str]:
    return sorted(path.name for path in store.videos.iterdir())
