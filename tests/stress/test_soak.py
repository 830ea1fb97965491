"""Clients, most of them hostile, and a server that is as it was when they are gone (`tests/stress/soak.py`).

DSA_SOAK_SECONDS makes the storm longer than it is here; then it is one of 200 clients, who hold on for as long as in
the program, against a server that keeps idle threads as long as ever."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from random import Random

import pytest
from websockets.exceptions import ProtocolError
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from dsa_engine import Pipeline
from tests.stress import attacks, soak
from tests.stress.attacks import ResponseLog, framed, repeat
from tests.stress.soak import HonestStream, first_mismatch, honest, tracebacks, wait_until_idle

PROMPT, OTHER = "a red circle rests on black", "a blue cross jumps on navy"
CLIENTS, SECONDS = 100, 6.0  # 80 are hostile, and make every attack
BRIEF_THREADS = """
from anyio._backends._asyncio import WorkerThread
assert WorkerThread.MAX_IDLE_TIME == 10
WorkerThread.MAX_IDLE_TIME = 1
from dsa_engine.cli import main
raise SystemExit(main())
"""  # the server whose idle threads are gone soon
GROWTH = 48.0  # MiB: what an allocator keeps of the large bodies


@pytest.fixture
def storm(monkeypatch):
    """(clients, seconds) of the storm; every wait is short unless a long one is asked for."""
    if "DSA_SOAK_SECONDS" in os.environ:
        return 200, float(os.environ["DSA_SOAK_SECONDS"])
    monkeypatch.setattr(soak, "COMMAND", (sys.executable, "-c", BRIEF_THREADS, "serve"))
    for name, seconds in {"QUIET": 2.0, "IDLE": 4.0, "WARM": 1.0}.items():
        monkeypatch.setattr(soak, name, seconds)
    monkeypatch.setattr(attacks, "HOLD", 0.3)
    return CLIENTS, SECONDS


@pytest.mark.slow
def test_a_storm_leaves_nothing_behind(untrained, storm):
    found = soak.soak(str(untrained), *storm, GROWTH)
    assert found["failed"] == [], {
        name: found[name] for name in ("failed", "faults", "honest", "left", "process", "log")
    }
    assert set(found["visits"]) == {attack.__name__ for attack in attacks.ATTACKS}
    assert found["honest"]["ended"]["done"] >= CLIENTS / 10 and found["honest"]["switches"] > 0
    assert found["honest"]["chunks_compared"] >= 3 * CLIENTS / 10 and len(found["honest"]["steps"]) > 1
    assert {"rest 200", "rest 413", "rest 422", "upgrade 101", "upgrade 400"} <= set(found["statuses"])
    assert {"huge 1009", "garbage 1002", "garbage 1007"} <= set(found["closes"])


# The judge: it must notice.


@pytest.fixture(scope="module")
def alone(untrained):
    return Pipeline.from_pretrained(untrained, device="cpu", max_sessions=1, deterministic=True)


def recorded(pipe, steps, prompt_at=2, thresholds=None):
    """A stream as a client would have recorded it."""
    one = HonestStream(
        {"seed": 7, "step_policy": steps, "num_frames": 12, "format": "rgb24"}, PROMPT, {prompt_at: [OTHER]}
    )
    policy = soak.Budget(pipe.fps) if steps == "budget" else steps
    with pipe.session(PROMPT, seed=7, num_frames=12, step_policy=policy) as session:
        for index in range(4):
            if index == prompt_at:
                session.update(OTHER)
            threshold = None if thresholds is None else thresholds[index]
            if thresholds is not None:
                session.rollout.policies[0].threshold = threshold
            chunk = session.next_chunk()
            one.digests.append(soak.sha256(chunk.frames.tobytes()).hexdigest())
            one.steps.append(chunk.steps)
            one.thresholds.append(threshold)
    return one


@pytest.mark.parametrize("steps, thresholds", [("fixed", None), ("dsa", None), ("budget", [0.9, 0.0, 1.0, 0.3])])
def test_a_stream_recorded_rightly_is_equal(alone, steps, thresholds):
    assert first_mismatch(alone, recorded(alone, steps, thresholds=thresholds)) is None


CHANGES = {
    "seed": lambda one: one.start.update(seed=8),
    "switch late": lambda one: setattr(one, "changes", {3: [OTHER]}),
    "switch lost": lambda one: one.changes.clear(),
    "chunk lost": lambda one: one.digests.pop(),
    "steps": lambda one: one.start.update(step_policy="fixed"),
    "bit": lambda one: setattr(one, "digests", [*one.digests[:3], one.digests[2]]),
    "threshold": lambda one: setattr(one, "thresholds", [0.0, 0.0, 0.0, 1.0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stream_recorded_wrongly_is_not(alone, change):
    one = recorded(alone, "budget", thresholds=[0.0, 1.0, 0.0, 1.0])
    assert len(set(one.steps)) > 1
    CHANGES[change](one)
    assert first_mismatch(alone, one) is not None


def test_an_honest_client_keeps_what_the_server_says():
    async def messages():
        yield '{"type": "video.chunk_metadata", "threshold": 0.25, "steps": 3}'
        yield b"frames"
        yield '{"type": "session.interaction.applied", "chunk_index": 1, "prompt": "x"}'
        yield '{"type": "session.interaction.applied", "chunk_index": 1, "prompt": "y"}'
        yield '{"type": "error", "code": "failed"}'
        yield '{"type": "session.done", "reason": "done"}'

    one = HonestStream({}, PROMPT)
    asyncio.run(one.listen(messages()))
    assert one.changes == {1: ["x", "y"]} and one.thresholds == [0.25] and one.steps == [3]
    assert one.digests == [soak.sha256(b"frames").hexdigest()] and one.ended == "failed"


def test_an_honest_client_that_cannot_connect_says_so():
    streams: list[HonestStream] = []

    async def go():
        await honest("http://127.0.0.1:9", Random(0), asyncio.get_running_loop().time() + 0.01, 3, streams)

    asyncio.run(go())
    assert len(streams) == 1 and streams[0].ended not in ("", "done", "busy")


def test_tracebacks_but_for_the_one_that_is_right():
    right = 'Traceback (most recent call last):\n  File "x/uvicorn/protocols/y.py"\n    data\nUnicodeDecodeError: bad\n'
    wrong = 'Traceback (most recent call last):\n  File "x/serving/app.py"\n    data\nKeyError: 3\n'
    assert tracebacks(f"a line\n{right}another\n{wrong}INFO\n{right}") == [wrong.rstrip("\n")]


def test_the_server_is_waited_for_and_what_is_left_returned(monkeypatch):
    class Server:
        def __init__(self, *left):
            self.left, self.looks = list(left), 0

        def metrics(self):
            sessions = self.left.pop(0) if len(self.left) > 1 else self.left[0]
            jobs = {f'dsa_jobs{{state="{state}"}}': 0.0 for state in ("queued", "in_progress")}
            return {
                "dsa_sessions": sessions,
                "dsa_queue_depth": 0.0,
                "dsa_jobs_running": 0.0,
                "dsa_forwards": 5.0,
                **jobs,
            }

        def get(self, path):
            return 200, ""

        def stats(self):
            self.looks += 1
            return soak.ProcessStats(1, 2, 3, 4.0)

    monkeypatch.setattr(soak, "SETTLE", 1.0)
    monkeypatch.setattr(soak, "QUIET", 0.0)
    assert wait_until_idle(Server(2.0, 1.0, 0.0), soak.ProcessStats(0, 2, 3, 0.0))[0] == {}
    assert wait_until_idle(Server(2.0), None)[0] == {"dsa_sessions": 2.0}
    for before, enough in (((2, 3), True), ((1, 3), False), ((2, 2), False)):  # threads and files
        server = Server(0.0)
        wait_until_idle(server, soak.ProcessStats(0, *before, 0.0))
        assert (server.looks == 1) is enough  # else it waited, in vain


# The attacks are what they say they are.


def parsed(data):
    """What another implementation of the protocol reads in the bytes of a frame."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    steps = Frame.parse(reader.read_exact, mask=True)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
@pytest.mark.parametrize("opcode", [attacks.TEXT, attacks.BINARY])
def test_frames(size, opcode):
    data = Random(size).randbytes(size)
    frame = parsed(framed(data, opcode))
    assert (frame.opcode, frame.data, frame.fin) == (Opcode(opcode), data, True)
    assert parsed(framed(data, fin=False)).fin is False


def test_frames_that_lie():
    with pytest.raises(EOFError):
        parsed(framed(b"{", length=1000))
    with pytest.raises(ProtocolError, match="mask"):
        parsed(framed(b"{", mask=False))


def test_an_attack_is_repeated_until_the_end_and_noted():
    """Against nobody: every connection is refused, which no attack may fall over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        log = ResponseLog(f"http://127.0.0.1:{free.getsockname()[1]}")

    async def go():
        until = asyncio.get_running_loop().time() + 0.2
        await asyncio.gather(*(repeat(attack, log, Random(1), until, 0.02) for attack in attacks.ATTACKS))

    asyncio.run(go())
    assert set(log.visits) == {attack.__name__ for attack in attacks.ATTACKS} and not log.statuses
    assert all(visits > 1 for visits in log.visits.values())


def test_the_shares_of_the_attacks():
    assert sum(attacks.ATTACKS.values()) == 100
