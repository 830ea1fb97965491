"""The two examples do what they say: frames of an undisturbed session, places given back, nothing global."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import queue
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from dsa_engine import Pipeline
from dsa_engine.serving.examples import asyncio_server, custom_worker
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker
from tests.support.serving.sessions import session_chunks


@pytest.fixture(scope="module")
def exact(untrained):
    return Pipeline.from_pretrained(untrained, device="cpu", max_sessions=4, deterministic=True)


# The asyncio server.


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, line):
        self.writer.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")

    async def next(self):
        """A line, and the frames that follow it."""
        line = json.loads(await self.reader.readline())
        if "shape" not in line:
            return line, None
        size = int(np.prod(line["shape"]))
        return line, np.frombuffer(await self.reader.readexactly(size), np.uint8).reshape(line["shape"])


def served(pipe, scenario, **limits):
    """A scenario(connect, worker) with the server on a port that is free."""

    async def main():
        backend = LocalBackend(
            Worker(pipe, WorkerLimits(**{"max_sessions": 2, "max_jobs": 0, "max_queue": 0, "steps": "fixed"} | limits))
        )
        backend.start()
        server = await asyncio.start_server(lambda *ends: asyncio_server.serve_client(backend, *ends), "127.0.0.1", 0)

        async def connect():
            return Client(*await asyncio.open_connection(*server.sockets[0].getsockname()))

        try:
            async with asyncio.timeout(60), server:
                return await scenario(connect, backend.worker)
        finally:
            await backend.close()

    return asyncio.run(main())


def test_the_server_sends_a_sessions_frames(exact):
    async def scenario(connect, worker):
        client, frames = await connect(), []
        client.send({"prompt": "a red circle rests", "seed": 4, "num_frames": 12})
        while True:
            line, chunk = await client.next()
            if chunk is None:
                return line, frames
            assert line["index"] == len(frames) and line["steps"] == exact.max_steps
            frames.append(chunk)

    last, frames = served(exact, scenario)
    assert last == {"reason": "done", "error": None}
    expected = session_chunks(exact, "a red circle rests", seed=4, step_policy="fixed")
    assert len(frames) == len(expected) and all(map(np.array_equal, frames, expected))


def test_another_prompt_changes_the_video(exact):
    async def scenario(connect, worker):
        client, frames = await connect(), []
        client.send({"prompt": "a red circle rests", "num_frames": 30})
        frames.append((await client.next())[1])
        client.send(b"a blue square jumps")
        client.send(b"nonsense")
        refused = None
        while True:
            line, chunk = await client.next()
            if chunk is not None:
                frames.append(chunk)
            elif "reason" in line:
                return refused, frames
            else:
                refused = line

    refused, frames = served(exact, scenario)
    assert "must read" in refused["error"]
    options = {"num_frames": 30, "step_policy": "fixed"}
    switched = ({i: ["a blue square jumps"]} for i in (1, 2, 3))
    possible = [session_chunks(exact, "a red circle rests", changes, **options) for changes in switched]
    assert any(all(map(np.array_equal, frames, expected)) for expected in possible)


@pytest.mark.parametrize("line", [b"", b"garbage", b"[1]", b'{"prompt": "nonsense"}', b'{"unheard": 1}', b"{}"])
def test_what_is_no_order_is_answered(exact, line):
    async def scenario(connect, worker):
        client = await connect()
        client.send(line)
        answer, _ = await client.next()
        assert await client.reader.read() == b""
        return answer

    assert set(served(exact, scenario)) == {"error"}


def test_clients_that_vanish_give_their_places_back(exact):
    async def scenario(connect, worker):
        for _ in range(4):
            clients = [await connect() for _ in range(2)]
            for client in clients:
                client.send({"prompt": "a red circle rests"})
            for client in clients:
                await client.next()
            full = await connect()
            full.send({"prompt": "a red circle rests"})
            assert "places are taken" in (await full.next())[0]["error"]
            for client in clients:
                client.writer.transport.abort()
            while worker.stats()["live"]:
                await asyncio.sleep(0.01)
        return True

    assert served(exact, scenario)


# The worker with a loop of its own.


def worked(pipe, requests, feed=None):
    wanted, given = queue.Queue(), {}

    def give(name, made):
        given.setdefault(name, []).append(made)
        if feed is not None:
            feed(wanted, name, made)

    for request in requests:
        wanted.put(request)
    custom_worker.work(pipe, wanted, give)
    return given


@pytest.fixture(scope="module")
def default(exact):
    """Options of a session that the worker makes."""
    return {"num_frames": exact.frames, "step_policy": None}


def test_the_worker_makes_sessions_frames(exact, default):
    prompts = {"one": "a red circle rests", "two": "a blue square jumps", "three": "a cyan cross rests"}
    given = worked(exact, [*prompts.items(), custom_worker.END])
    for name, prompt in prompts.items():
        expected = session_chunks(exact, prompt, **default)
        assert [chunk.index for chunk in given[name]] == list(range(len(expected)))
        assert all(np.array_equal(chunk.frames, frames) for chunk, frames in zip(given[name], expected))


def test_it_takes_prompts_while_it_runs(exact, default):
    def feed(wanted, name, made):
        if name == "one" and getattr(made, "index", None) == 1:
            for request in (("one", "a blue square jumps"), ("two", "a green cross rests"), ("three", "nonsense")):
                wanted.put(request)
        if name == "two" and getattr(made, "index", None) == 1:
            wanted.put(("two", "nonsense"))
            wanted.put(custom_worker.END)

    given = worked(exact, [("one", "a red circle rests")], feed)
    frames = [chunk.frames for chunk in given["one"]]
    switched = ({i: ["a blue square jumps"]} for i in (2, 3))
    possible = [session_chunks(exact, "a red circle rests", changes, **default) for changes in switched]
    assert any(all(map(np.array_equal, frames, expected)) for expected in possible)
    chunks = [made for made in given["two"] if not isinstance(made, ValueError)]
    expected = session_chunks(exact, "a green cross rests", **default)
    assert len(given["two"]) == len(expected) + 1
    assert all(np.array_equal(chunk.frames, one) for chunk, one in zip(chunks, expected))
    assert [type(made) for made in given["three"]] == [ValueError]
    sessions = [exact.session("a red circle rests", num_frames=12) for _ in range(4)]  # all slots are free again
    for session in sessions:
        session.close()


# What both promise.


@pytest.mark.parametrize("module", [asyncio_server, custom_worker])
def test_they_are_short_and_keep_nothing_global(module):
    tree = ast.parse(inspect.getsource(module))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Expr)
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    assert all(isinstance(node, (*kinds, ast.Assign)) for node in tree.body)
    assert all(isinstance(node.value, (ast.Constant, ast.Tuple)) for node in constants)
    assert not any(isinstance(node, (ast.Global, ast.Nonlocal)) for node in ast.walk(tree))


def test_the_worker_starts_no_thread_and_takes_no_signal(exact):
    threads, handlers = threading.active_count(), [signal.getsignal(number) for number in signal.valid_signals()]
    worked(exact, [("one", "a red circle rests"), custom_worker.END])
    assert threading.active_count() == threads
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers


@pytest.mark.slow
def test_they_run_as_modules(tmp_path):
    name = "dsa_engine.serving.examples.custom_worker"
    result = subprocess.run(
        [sys.executable, "-m", name, "a red circle rests", "nonsense"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "stream 0: 15\n" in result.stdout and "stream 1: the prompt 'nonsense'" in result.stdout
