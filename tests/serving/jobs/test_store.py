"""The jobs on disk: against a plain list, from many threads, on folders that cannot be used and disks that are full."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.serving.jobs.store import STATES, StorageError, Store

ORDER = {"prompt": "é☃\0 'x'", "seed": 2**64 - 1, "num_frames": 12, "height": 32, "width": 48, "threshold": 0.1}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "a" / "data")
    yield store
    store.close()


def add(store: Store, **order):
    return store.add({**ORDER, **order}, "shapes", 12.0)


def test_a_job_comes_back_as_it_was(store):
    job = add(store)
    store.update(job.id, status="completed", steps=[2, 1], confidence=[[0.1, 0.7]], duration_s=1.5)
    found = store.get(job.id)
    assert found.request == ORDER and (found.model, found.fps, found.status) == ("shapes", 12.0, "completed")
    assert (found.steps, found.confidence, found.duration_s, found.error) == ([2, 1], [[0.1, 0.7]], 1.5, None)


def test_the_columns_of_the_file_keep_their_names(store):
    with store._transaction() as session:
        columns = {row[1] for row in session.connection().exec_driver_sql("PRAGMA table_info(job)")}
    assert {"number", "id", "status", "model", "fps", "order", "picture", "created", "completed", "took"} < columns


def test_it_comes_back_after_a_restart(store):
    ids = [add(store, seed=i).id for i in range(3)]
    store.close()
    again = Store(store.folder)
    assert [again.get(id).request["seed"] for id in ids] == [0, 1, 2]
    again.close()


def test_the_oldest_is_claimed_first_and_only_once(store):
    ids = [add(store).id for _ in range(3)]
    assert [store.claim().id for _ in range(2)] == ids[:2]
    assert store.get(ids[0]).status == "in_progress"
    assert store.claim().id == ids[2] and store.claim() is None
    assert store.counts() == {"queued": 0, "in_progress": 3, "completed": 0, "failed": 0}


def test_many_threads_claim_every_job_once(store):
    with ThreadPoolExecutor(8) as threads:
        ids = {job.id for job in threads.map(lambda i: add(store, seed=i), range(40))}
        claimed = [job.id for job in threads.map(lambda _: store.claim(), range(40))]
    assert sorted(claimed) == sorted(ids) and store.claim() is None


def test_recovery_queues_what_was_in_progress_and_nothing_else(store):
    ids = [add(store).id for _ in range(4)]
    for id, status in zip(ids, STATES):
        store.update(id, status=status)
    assert store.recover() == 1
    assert [store.get(id).status for id in ids] == ["queued", "queued", "completed", "failed"]


def test_recovery_removes_what_nobody_will_finish(store):
    job = store.add(ORDER, "shapes", 12.0, np.zeros((4, 4, 3), np.uint8))
    kept = store.video(job.id)
    kept.write_bytes(b"whole")
    other = "video_" + "0" * 32
    stray = [store.videos / f".{job.id}.mp4.77.part", store.video(other), store.pictures / f"{other}.png"]
    for path in stray:
        path.write_bytes(b"half")
    own = store.videos / "notes.txt"
    own.write_text("not ours")
    store.recover()
    assert not any(path.exists() for path in stray)
    assert kept.exists() and own.exists() and store.read_image(job.id).shape == (4, 4, 3)


def test_a_picture_keeps_every_bit(store):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    job = store.add(ORDER, "shapes", 12.0, picture)
    assert job.picture and (store.read_image(job.id) == picture).all()


def test_deleting_takes_the_files_along(store):
    job = store.add(ORDER, "shapes", 12.0, np.zeros((4, 4, 3), np.uint8))
    store.video(job.id).write_bytes(b"x")
    other = add(store)
    assert store.delete(job.id) and not store.delete(job.id)
    assert store.get(job.id) is None and store.get(other.id) is not None
    assert list(store.videos.iterdir()) == list(store.pictures.iterdir()) == []


@given(
    states=st.lists(st.sampled_from(STATES), max_size=12),
    limit=st.integers(1, 5),
    newest=st.booleans(),
)
def test_pages_are_slices_of_a_list(tmp_path_factory, states, limit, newest):
    store = Store(tmp_path_factory.mktemp("pages"))
    ids = [add(store).id for _ in states]
    for id, status in zip(ids, states):
        store.update(id, status=status)
    expected = ids[::-1] if newest else ids
    found, after = [], None
    while True:
        jobs, more = store.page(limit, after, newest)
        found += [job.id for job in jobs]
        assert len(jobs) <= limit and more == (len(found) < len(expected))
        if not more:
            break
        after = found[-1]
    assert found == expected
    assert store.counts() == {state: states.count(state) for state in STATES}
    store.close()
    shutil.rmtree(store.folder)


def test_a_page_after_no_job_is_none(store):
    assert store.page(5, "video_" + "f" * 32) is None


@pytest.mark.parametrize(
    "id", ["../jobs", "video_" + "0" * 31, "video_" + "0" * 32 + "\n", "video_" + "A" * 32, "video_../" + "0" * 29, ""]
)
def test_an_id_never_names_another_file(store, id):
    for use in (store.video, store.read_image):
        with pytest.raises(ValueError, match="not one of a video"):
            use(id)


def test_ids_are_made_here_and_cannot_be_guessed(store):
    ids = {add(store).id for _ in range(20)}
    assert len(ids) == 20 and len({id[:14] for id in ids}) == 20


def test_a_folder_has_one_server(store):
    with pytest.raises(ValueError, match="another server uses it"):
        Store(store.folder)
    code = f"from dsa_engine.serving.jobs.store import Store; Store({str(store.folder)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "another server uses it" in other.stderr
    add(store)  # and the first one is none the worse for it


@pytest.mark.parametrize("where", ["/proc/dsa", "{tmp}/file", "{tmp}/file/data"])
def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to .*give another folder"):
        Store(where.format(tmp=tmp_path))


def test_what_is_no_database_of_ours_is_left_as_it_is(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"something else, and long enough" * 99)
    with pytest.raises(ValueError, match="cannot be opened .file is not a database"):
        Store(tmp_path)
    assert path.read_bytes().startswith(b"something else")
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="is of format 9, this version writes 1"):
        Store(tmp_path)


def test_a_full_disk_is_said_and_leaves_nothing_half(store):
    first = add(store)
    with store._transaction() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite's own words for a disk that is full
    with pytest.raises(StorageError, match="jobs.sqlite: database or disk is full"):
        for _ in range(200):
            add(store, prompt="x" * 4000)
    with store._transaction() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1000000")
    jobs, _ = store.page(100, newest=False)
    assert jobs[0].id == first.id and all(job.request["num_frames"] == 12 for job in jobs)
    assert add(store).number == len(jobs) + 1


def test_a_picture_that_does_not_fit_leaves_no_job(store):
    shutil.rmtree(store.pictures)
    store.pictures.write_text("a file where the folder was")
    with pytest.raises(StorageError, match="pictures"):
        store.add(ORDER, "shapes", 12.0, np.zeros((4, 4, 3), np.uint8))
    assert store.page(5) == ([], False)


def test_a_closed_store_stays_closed(store):
    store.close()
    with pytest.raises(StorageError, match="is closed"):
        store.counts()
    assert os.listdir(store.folder) and not (store.folder / "jobs.sqlite-wal").exists()
