"""Jobs on a backend without a model and, at the end, on the engine."""

from __future__ import annotations

import asyncio
import hashlib
import threading

import numpy as np
import pytest

from dsa_engine import Pipeline
from dsa_engine.media.mp4 import Mp4Writer, read_mp4
from dsa_engine.serving.jobs import queue as module
from dsa_engine.serving.jobs.store import Store
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import Overloaded, StreamRequest
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker
from tests.support.fake_backend import CARD, frames_of
from tests.support.serving.job_bench import PROMPT, Bench, left, until, written


def test_every_frame_of_every_job_is_in_its_file(tmp_path):
    async def run():
        async with Bench(tmp_path / "data", most=1) as bench:
            ids = await bench.add(1, 2, 3, 4, 5)
            await bench.done(ids)
            assert bench.states(ids) == ["completed"] * 5
            for seed, id in enumerate(ids, 1):
                job = bench.store.get(id)
                assert bench.store.video(id).read_bytes() == written(tmp_path, frames_of(seed, 12))
                assert (job.steps, job.confidence) == ([2] * 4, [[0.5, 0.25, 0.75]] * 4)
                assert job.completed >= job.created and job.duration_s >= 0
            assert [stream.request.seed for stream in bench.backend.streams] == [1, 2, 3, 4, 5]
            assert left(bench.store) == sorted(f"{id}.mp4" for id in ids)

    asyncio.run(run())


def test_at_most_so_many_are_made_at_once(tmp_path):
    async def run():
        async with Bench(tmp_path, most=3, go=False) as bench:
            ids = await bench.add(*range(7))
            await until(lambda: len(bench.backend.open_streams) == 3)
            assert bench.states(ids) == ["in_progress"] * 3 + ["queued"] * 4
            bench.backend.go.set()
            await bench.done(ids)
            assert bench.backend.peak == 3

    asyncio.run(run())


def test_progress_rises_to_the_end(tmp_path):
    async def run():
        async with Bench(tmp_path, go=False) as bench:
            (id,) = await bench.add(1, frames=30)
            await until(lambda: bench.backend.open_streams)
            assert bench.jobs.progress(id) == 0
            running = bench.jobs._active[id]
            for frames, percent in ((3, 10), (15, 50), (29, 96), (30, 99)):
                running.frames = frames
                assert bench.jobs.progress(id) == percent
            running.frames = 0
            seen = set()
            bench.backend.go.set()
            await until(lambda: seen.add(bench.jobs.progress(id)) or bench.states([id]) == ["completed"])
            assert seen <= {*range(0, 100, 10), 99}

    asyncio.run(run())


def test_a_picture_is_the_first_frame(tmp_path):
    async def run():
        picture = np.full((CARD.height, CARD.width, 3), 200, np.uint8)
        async with Bench(tmp_path / "data") as bench:
            (id,) = await bench.add(4, frames=13, image=picture)
            await bench.done([id])
            assert bench.store.video(id).read_bytes() == written(tmp_path, frames_of(4, 13, picture))

    asyncio.run(run())


def test_deleting_one_that_waits_or_is_made(tmp_path):
    async def run():
        async with Bench(tmp_path, most=1, go=False) as bench:
            made, waits, last = await bench.add(1, 2, 3)
            await until(lambda: bench.backend.open_streams)
            assert await bench.jobs.delete(waits) and not await bench.jobs.delete(waits)
            assert await bench.jobs.delete(made) and not await bench.jobs.delete(made)
            assert not await bench.jobs.delete("video_" + "0" * 32)
            bench.backend.go.set()
            await bench.done([last])
            assert [stream.request.seed for stream in bench.backend.streams] == [1, 3]
            assert left(bench.store) == [f"{last}.mp4"] and bench.store.counts()["completed"] == 1

    asyncio.run(run())


def test_deleting_twice_at_once_and_in_the_middle_of_a_chunk(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            for _ in range(5):
                (id,) = await bench.add(1, frames=300)
                await until(lambda id=id: bench.jobs.progress(id) > 3)
                found = await asyncio.gather(*(bench.jobs.delete(id) for _ in range(3)))
                assert sorted(found) == [False, False, True]
            assert left(bench.store) == [] and bench.store.page(9) == ([], False)

    asyncio.run(run())


def test_deleting_one_whose_stream_is_being_opened(tmp_path):
    async def run():
        async with Bench(tmp_path, go=False) as bench:
            bench.backend.door.clear()
            (id,) = await bench.add(1)
            await until(lambda: bench.backend.knocks)
            deleting = asyncio.create_task(bench.jobs.delete(id))
            await asyncio.sleep(0.02)
            bench.backend.door.set()
            assert await asyncio.wait_for(deleting, 20) and left(bench.store) == []
            assert not bench.backend.open_streams

    asyncio.run(run())


def test_the_next_begins_when_one_is_added_or_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 1000.0)  # not because time passes

    async def run():
        async with Bench(tmp_path, most=1) as bench:
            await asyncio.sleep(0.05)
            ids = await bench.add(1, 2, 3)
            await bench.done(ids)

    asyncio.run(run())


def test_more_are_made_at_once_when_the_backend_grows(tmp_path):
    async def run():
        async with Bench(tmp_path, most=0, go=False) as bench:
            ids = await bench.add(1, 2, 3)
            await asyncio.sleep(0.05)
            assert bench.states(ids) == ["queued"] * 3
            bench.backend.most = 2
            await until(lambda: len(bench.backend.open_streams) == 2)
            bench.backend.go.set()
            await bench.done(ids)

    asyncio.run(run())


def test_too_many_that_wait_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_QUEUED_JOBS", 2)

    async def run():
        async with Bench(tmp_path, most=1, go=False) as bench:
            await bench.add(1)
            await until(lambda: bench.backend.open_streams)
            await bench.add(2, 3)
            with pytest.raises(Overloaded, match="2 jobs are queued"):
                await bench.add(4)
            assert bench.store.counts()["queued"] == 2

    asyncio.run(run())


def test_an_impossible_order_is_not_stored(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            with pytest.raises(ValueError, match="cannot be made"):
                await bench.jobs.add(StreamRequest("impossible", num_frames=12, live=False))
            assert bench.store.page(9) == ([], False)

    asyncio.run(run())


def test_nothing_that_waits_for_the_disk_runs_in_the_loop(tmp_path, monkeypatch):
    seen: dict[str, set[threading.Thread]] = {}

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **options):
            seen.setdefault(name, set()).add(threading.current_thread())
            return real(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("add", "claim", "update", "counts", "recover", "delete", "close", "read_image"):
        watch(Store, name)
    for name in ("__enter__", "write", "__exit__"):
        watch(Mp4Writer, name)

    async def run():
        async with Bench(tmp_path) as bench:
            ids = await bench.add(1, 2, image=np.zeros((32, 48, 3), np.uint8), frames=13)
            await bench.done(ids)
            await bench.jobs.delete(ids[0])

    asyncio.run(run())
    assert len(seen) == 11 and threading.main_thread() not in set.union(*seen.values())


def test_a_job_on_the_engine_is_what_a_session_makes(tmp_path, untrained):
    """Whatever else runs beside it, and the same file each time."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, max_sessions=3)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    async def run():
        backend = LocalBackend(Worker(pipe, WorkerLimits(max_sessions=1, max_jobs=2, steps=None)))
        backend.worker.controller.pressure = 0.9  # of live streams, which a job has nothing to do with
        backend.start()
        bench = Bench(tmp_path / "data", backend)
        async with bench:
            options = {"height": 64, "width": 64, "live": False}
            orders = [StreamRequest(PROMPT, seed=i, num_frames=12, **options) for i in (1, 2, 1)]
            orders.append(StreamRequest(PROMPT, seed=3, num_frames=7, image=picture, **options))
            ids = [(await bench.jobs.add(order)).id for order in orders]
            await bench.done(ids)
            assert bench.states(ids) == ["completed"] * 4
            return [bench.store.video(id) for id in ids], [bench.store.get(id).steps for id in ids]

    paths, steps = asyncio.run(run())
    assert hashlib.sha256(paths[0].read_bytes()).digest() == hashlib.sha256(paths[2].read_bytes()).digest()
    with Pipeline.from_pretrained(untrained, device="cpu", deterministic=True) as alone:
        for path, taken, seed, given in zip(paths, steps, (1, 2, 1, 3), (None, None, None, picture)):
            expected = tmp_path / f"{path.stem}.mp4"
            frames = 12 if given is None else 7
            with (
                alone.session(PROMPT, seed=seed, num_frames=frames, image=given, step_policy="dsa") as session,
                Mp4Writer(expected, pipe.fps, threads=1) as video,
            ):
                if given is not None:
                    video.write(session.prefix_frames())
                own = []
                while not session.exhausted:
                    chunk = session.next_chunk()
                    own.append(chunk.steps)
                    video.write(chunk.frames)
            assert path.read_bytes() == expected.read_bytes() and taken == own
            assert len(read_mp4(path)[0]) == frames
