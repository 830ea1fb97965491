"""A chunk's timings: what the stages took, by the device's time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsa_engine import Fixed
from dsa_engine.engine import rollout as rollout_module
from dsa_engine.engine import session as session_module
from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.engine.device import Moment

RED = "a red circle moves sideways"


def take(session, n):
    return [session.next_chunk() for _ in range(n)]


def test_chunks_carry_their_time_and_timings(pipe):
    with pipe.session(RED) as session:
        chunks = take(session, 3)
    assert [c.pts for c in chunks] == pytest.approx([0, 3 / 12, 6 / 12])
    for chunk in chunks:
        parts = sum(chunk.timings[k] for k in ("commit", "denoise", "decode", "copy"))
        assert parts == pytest.approx(chunk.timings["total"], rel=1e-6)
        assert chunk.frames.shape == (3, 64, 64, 3) and chunk.frames.dtype == np.uint8
        assert len(chunk.confidence) == 3 and all(0 < c < 1 for c in chunk.confidence)


class Queue:
    """A device whose host is ahead of it: what is launched is done in its own time, `now` when the queue is empty."""

    def __init__(self):
        self.now, self.waited = 0, -1

    def launch(self, function, takes):
        def launched(*args, **kwargs):
            self.now += takes
            return function(*args, **kwargs)

        return launched

    def moment(self, device):
        queue, at = self, self.now

        class Moment:
            def since(self, earlier):
                assert queue.waited >= at >= earlier.at, "read before the device was there"
                return at - earlier.at

            def wait(self):
                queue.waited = max(queue.waited, at)

        Moment.at = at
        return Moment()


@pytest.mark.parametrize("make", ["next_chunk", "finish", "detach_decode", "chunks"])
def test_timings_are_the_devices(pipe, monkeypatch, make):
    """The stages take as long as the device takes for them, though the host has launched all of them at once; they are
    read when the host has waited for the frames, and not before."""
    queue, steps = Queue(), 3
    monkeypatch.setattr(session_module, "Moment", queue.moment)
    monkeypatch.setattr(rollout_module, "Moment", queue.moment)
    monkeypatch.setattr(pipe.engine.dit, "forward_features", queue.launch(pipe.engine.dit.forward_features, 10))
    monkeypatch.setattr(rollout_module, "commit_chunk", queue.launch(rollout_module.commit_chunk, 4))
    monkeypatch.setattr(pipe.engine.decoder, "decode", queue.launch(pipe.engine.decoder.decode, 7))
    monkeypatch.setattr(session_module, "copied", queue.launch(session_module.copied, 1))
    frames = 3 if make == "chunks" else 9  # one chunk, or the next one's forwards run beside the decoding
    with pipe.session(RED, step_policy=Fixed(steps), num_frames=frames, rope="relative", sink=1) as session:
        runner = BatchRunner()

        def one():
            if make == "next_chunk":
                return session.next_chunk()
            runner.add(session)
            while not runner.forward():
                pass
            return session.finish() if make == "finish" else session.detach_decode()()

        made = list(session.chunks()) if make == "chunks" else [one() for _ in range(3)]
    for chunk in made:
        commit = 14e3 * (chunk.index > 0)  # a sink that moves: the commit is a forward of its own
        expected = {"commit": commit, "denoise": steps * 10e3, "decode": 7e3, "copy": 2e3}  # frames and confidences
        assert chunk.timings == expected | {"total": sum(expected.values()), "step": 10e3}


def test_moments_are_events_of_the_current_stream_and_the_clock_elsewhere(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append(f"record on {stream}")

        def elapsed_time(self, later):
            return 2500.0

        def synchronize(self):
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current one of {device}")
    gpu = torch.device("cuda", 1)
    first, second = Moment(gpu), Moment(gpu)
    assert second.since(first) == 2.5 and log == ["record on the current one of cuda:1"] * 2  # no wait
    second.wait()
    assert log[2:] == ["wait"]
    first, second = (Moment(torch.device("cpu")) for _ in range(2))
    assert 0 <= second.since(first) < 60
    second.wait()
    assert len(log) == 3
