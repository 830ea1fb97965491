"""Jobs whose backend, disk or server fails or stops."""

from __future__ import annotations

import asyncio
import errno
import threading

import pytest

from dsa_engine.media.mp4 import Mp4Writer
from dsa_engine.serving.jobs import queue as module
from dsa_engine.serving.jobs.store import Store
from dsa_engine.serving.types import Overloaded
from tests.support.fake_backend import frames_of
from tests.support.serving.job_bench import Bench, left, order, until, written


def test_a_fault_fails_its_own_job_alone(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            bench.backend.faults = {(2, 1)}
            ids = await bench.add(1, 2, 3)
            await bench.done(ids)
            assert bench.states(ids) == ["completed", "failed", "completed"]
            assert bench.store.get(ids[1]).error == "the engine broke"
            assert left(bench.store) == sorted(f"{ids[i]}.mp4" for i in (0, 2))

    asyncio.run(run())


def test_a_busy_backend_is_asked_again(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            bench.backend.refusals = 3
            ids = await bench.add(1, 2)
            await bench.done(ids)
            assert bench.states(ids) == ["completed"] * 2 and bench.backend.refusals == 0

    asyncio.run(run())


def test_a_server_that_stops_leaves_its_jobs_to_the_next(tmp_path):
    async def run():
        async with Bench(tmp_path / "data", most=2, go=False) as bench:
            done, *ids = await bench.add(9, 1, 2, 3)
            await until(lambda: len(bench.backend.open_streams) == 2)
            await bench.jobs.delete(done)
            await until(lambda: len(bench.backend.open_streams) == 2)
        store = Store(tmp_path / "data")
        assert [store.get(id).status for id in ids] == ["queued"] * 3 and left(store) == []
        store.close()
        async with Bench(tmp_path / "data") as again:
            await again.done(ids)
            for seed, id in zip((1, 2, 3), ids):
                assert again.store.video(id).read_bytes() == written(tmp_path, frames_of(seed, 12))

    asyncio.run(run())


def test_one_that_was_being_made_when_the_server_died_is_made_again(tmp_path):
    async def run():
        store = Store(tmp_path / "data")
        fields = {name: getattr(order(7), name) for name in module.STORED}
        id = store.add(fields, "instant", 12.0).id
        assert store.claim().id == id
        (store.videos / f".{id}.mp4.1.part").write_bytes(b"half")
        store.close()
        async with Bench(tmp_path / "data") as bench:
            await bench.done([id])
            assert bench.store.video(id).read_bytes() == written(tmp_path, frames_of(7, 12))
            assert left(bench.store) == [f"{id}.mp4"]

    asyncio.run(run())


def test_a_job_that_is_begun_while_the_server_stops(tmp_path, monkeypatch):
    """It has its row and its file, and no stream yet; a backend that is closed would never give it one."""
    real, there, on = Mp4Writer.__enter__, threading.Event(), threading.Event()

    def enter(self):
        there.set()
        on.wait(20)
        return real(self)

    monkeypatch.setattr(Mp4Writer, "__enter__", enter)

    async def run():
        bench = Bench(tmp_path)
        async with bench:
            (id,) = await bench.add(1)
            await until(there.is_set)
            bench.backend.door.clear()
            bench.jobs.stop()
            on.set()
            await until(lambda: bench.states([id]) == ["queued"])
            assert not bench.backend.knocks and left(bench.store) == []

    asyncio.run(run())


def test_a_stream_that_never_ends_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.05)

    async def run():
        async with Bench(tmp_path) as bench:
            bench.backend.door.clear()
            (id,) = await bench.add(1)
            await until(lambda: bench.backend.knocks)
        store = Store(tmp_path)
        assert store.get(id).status == "queued"
        store.close()

    asyncio.run(run())


def test_a_stopping_runner_takes_no_orders(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            bench.jobs.stop()
            with pytest.raises(Overloaded, match="stopping"):
                await bench.add(1)

    asyncio.run(run())


def test_a_full_disk_fails_the_job_and_leaves_no_half_file(tmp_path, monkeypatch):
    whole = Mp4Writer.write

    def write(self, frames):
        if self.path.stem == broken and self.count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.count += 1
        whole(self, frames)

    monkeypatch.setattr(Mp4Writer, "write", write)
    monkeypatch.setattr(Mp4Writer, "count", 0, raising=False)

    async def run():
        nonlocal broken
        async with Bench(tmp_path, go=False) as bench:
            ids = await bench.add(1, 2)
            broken = ids[0]
            bench.backend.go.set()
            await bench.done(ids)
            assert bench.states(ids) == ["failed", "completed"]
            assert "No space left on device" in bench.store.get(broken).error
            assert left(bench.store) == [f"{ids[1]}.mp4"]

    broken = ""
    asyncio.run(run())


def test_a_folder_that_is_gone_fails_the_job(tmp_path):
    async def run():
        async with Bench(tmp_path) as bench:
            bench.store.videos.rmdir()
            bench.store.videos.write_text("a file where the folder was")
            ids = await bench.add(1)
            await bench.done(ids)
            assert "videos" in bench.store.get(ids[0]).error
            bench.store.videos.unlink()
            ids = await bench.add(2)
            await bench.done(ids)
            assert bench.states(ids) == ["completed"]

    asyncio.run(run())


def test_a_database_that_fails_for_a_while_stops_nothing(tmp_path, monkeypatch):
    real, failures = Store.claim, [OSError("the disk is away")] * 3

    def claim(self):
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(Store, "claim", claim)

    async def run():
        async with Bench(tmp_path) as bench:
            ids = await bench.add(1)
            await bench.done(ids)
            assert bench.states(ids) == ["completed"] and not failures

    asyncio.run(run())
