"""The device that is current, and the streams, in every thread in which a pipeline works."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from dsa_engine import Confidence, Pipeline, ops
from dsa_engine.engine import device as devices
from dsa_engine.engine import session as session_module
from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.models import memory_estimate
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import ChunkReady, Closed, StreamRequest
from dsa_engine.serving.worker.worker import Worker

RED, BLUE = "a red circle moves sideways", "a blue square jumps on navy"


@pytest.fixture
def guarded(monkeypatch):
    """Every op, and every decode, asserts that the device is current in its thread; the threads that were seen."""
    depth, threads = threading.local(), set()

    @contextlib.contextmanager
    def current(device):
        depth.now = getattr(depth, "now", 0) + 1
        try:
            yield
        finally:
            depth.now -= 1

    def checked(function):
        def called(*args, **kwargs):
            threads.add(threading.current_thread().name.split("_")[0])
            assert getattr(depth, "now", 0) > 0, f"{function.__name__} where another device may be current"
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(devices, "current", current)
    for name in ops.__all__:
        if name[0].islower():
            monkeypatch.setattr(ops, name, checked(getattr(ops, name)))
    return SimpleNamespace(checked=checked, threads=threads)


def test_whatever_is_called_runs_with_the_models_device_current(untrained, guarded, monkeypatch):
    """Triton and csrc launch on the current device, and every thread begins with the first."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", max_sessions=2)
    monkeypatch.setattr(pipe.engine.decoder, "decode", guarded.checked(pipe.engine.decoder.decode))
    pipe.warmup()
    pipe([RED, BLUE], num_frames=6, output_type="pt")
    pipe(RED, num_frames=6, callback_on_step_end=lambda *_: None)
    with pipe.session(RED, step_policy=Confidence(0.5), image=torch.zeros(3, 64, 64)) as session:
        session.prefix_frames()
        session.next_chunk()
        snapshot = session.snapshot()
        session.update(BLUE, transition_chunks=2)
        session.next_chunk()
        session.update(RED, recache=False)
        session.restore(snapshot)
        runner = BatchRunner()
        runner.add(session)
        while not runner.forward():
            pass
        session.detach_decode()()
        session.reset()
        session.next_chunk()
    list(pipe.stream(RED, num_frames=6))
    worker = Worker(pipe, WorkerLimits(max_sessions=1, max_jobs=0))
    done, made = threading.Event(), []
    worker.start()

    def heard(event):
        if isinstance(event, ChunkReady):
            made.append(event)
            task.ack()
        elif isinstance(event, Closed):
            done.set()

    task = worker.open(StreamRequest(RED, num_frames=6), heard)
    assert done.wait(60)
    worker.stop()
    assert made and {"MainThread", "dsa-engine-worker", "dsa-engine-decoder", "ThreadPoolExecutor-0"} <= {
        name if not name.startswith("ThreadPool") else "ThreadPoolExecutor-0" for name in guarded.threads
    }


def test_a_cuda_device_of_any_index_is_made_current(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    with devices.current(torch.device("cuda", 1)), devices.current(torch.device("cpu")):
        assert seen == [torch.device("cuda", 1)]


def test_a_streams_thread_goes_on_where_its_caller_was(untrained, monkeypatch):
    """What opened the session was launched on the caller's stream: the thread that denoises follows it there."""
    pipe, local = Pipeline.from_pretrained(untrained, device="cpu", max_sessions=1), threading.local()
    local.stream = "the caller's"
    monkeypatch.setattr(session_module, "stream_of", lambda device: local.stream)
    monkeypatch.setattr(session_module, "follow", lambda stream: setattr(local, "stream", stream))
    session, seen = pipe.session(RED, num_frames=6), []
    denoise = session.rollout.denoise
    monkeypatch.setattr(
        session.rollout,
        "denoise",
        lambda: seen.append((local.stream, threading.current_thread().name)) or denoise(),
    )
    chunks = session.chunks()
    local.stream = "where the loop is"
    list(chunks)
    assert len(seen) == 2 and {stream for stream, _ in seen} == {"the caller's"}
    assert all(name != threading.current_thread().name for _, name in seen)


def test_following_a_stream_is_torchs_own(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    gpu = torch.device("cuda", 1)
    devices.follow(devices.stream_of(gpu))
    devices.follow(devices.stream_of(torch.device("cpu")))
    assert calls == ["current of cuda:1"]


def test_an_engine_has_two_streams_for_its_life(untrained, monkeypatch):
    """Torch hands out 32 in turn: with one a session the 32nd would be that of the graphs."""
    pipe, made = Pipeline.from_pretrained(untrained, device="cpu", max_sessions=1), []
    assert pipe.engine.streams is None
    del pipe.engine.streams
    monkeypatch.setattr(type(pipe.engine), "device", torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    monkeypatch.setattr(devices, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(memory_estimate, "free_bytes", lambda device: 10**12)
    used = set()
    for _ in range(40):
        with pipe.session(RED) as session:
            used.add(session._stream)
    assert used == {pipe.engine.streams.decode} and pipe.engine.streams.capture not in used
    assert made == [torch.device("cuda", 1)] * 2
