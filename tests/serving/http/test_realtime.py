"""`WS /v1/realtime/video` over real sockets: with the engine behind it, and with streams that do as the test wants."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as ws_connect

from dsa_engine import Pipeline
from dsa_engine.media import stream_encoders
from dsa_engine.serving.http import realtime
from dsa_engine.serving.settings import Settings, WorkerLimits
from dsa_engine.serving.types import Closed, Queued
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker
from tests.support.live_server import PATIENCE, FakeBackend, FakeStream, serving, until

PROMPTS = ["a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"]
FRAMES = 12  # four chunks
SERVER = {
    "session.queued",
    "video.start",
    "video.chunk_metadata",
    "session.interaction.queued",
    "session.pong",
    "error",
    "session.interaction.applied",
    "session.done",
}


class Client:
    """A client that reads everything in order. A chunk's metadata gets its bytes as `data`."""

    def __init__(self, host, path=realtime.PATH, **options):
        # entered by hand: what it gives is the connection, in every version of the library
        self.socket = ws_connect(f"ws://{host}{path}", max_size=2**27, open_timeout=PATIENCE, **options).__enter__()
        self.seen: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def say(self, type, **fields):
        self.socket.send(json.dumps({"type": type} | fields))

    def start(self, prompt=PROMPTS[0], **fields):
        self.say("session.start", **{"prompt": prompt} | fields)
        return self

    def change(self, event_id=None, **event):
        self.say("session.interaction", interaction={"event": event} | ({"event_id": event_id} if event_id else {}))

    def hear(self):
        message = json.loads(self.socket.recv(PATIENCE))
        assert message["type"] in SERVER
        if message["type"] == "video.chunk_metadata":
            message["data"] = self.socket.recv(PATIENCE)
            assert isinstance(message["data"], bytes) and len(message["data"]) == message["byte_length"]
        self.seen.append(message)
        return message

    def until(self, type):
        while True:
            message = self.hear()
            if message["type"] == type:
                return message

    def rest(self):
        """Everything to the end; (messages, close code)."""
        seen = []
        try:
            while True:
                seen.append(self.hear())
        except ConnectionClosed as closed:
            return seen, closed.rcvd.code if closed.rcvd else None

    def abort(self):
        """Vanish without a word: the TCP connection is reset."""
        raw = self.socket.socket
        with suppress(OSError):  # closed already, because the server was quicker
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()


def of(messages, type):
    return [message for message in messages if message["type"] == type]


def raw_frames(messages):
    chunks = of(messages, "video.chunk_metadata")
    return np.concatenate(
        [np.frombuffer(c["data"], np.uint8).reshape(c["num_frames"], c["height"], c["width"], 3) for c in chunks]
    )


@pytest.fixture(scope="module")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, max_sessions=3)


@contextmanager
def engine(pipe, wanted=Settings(), send_timeout=realtime.SEND_TIMEOUT_S, **limits):  # noqa: B008 frozen
    backend = LocalBackend(Worker(pipe, WorkerLimits(**{"max_sessions": 3, "max_jobs": 0, "max_queue": 2} | limits)))
    backend.start()
    try:
        with serving(realtime.router(backend, wanted, send_timeout)) as host:
            yield host, backend
    finally:
        backend.worker.stop()


@contextmanager
def fake(wanted=Settings(), send_timeout=realtime.SEND_TIMEOUT_S, **options):  # noqa: B008 frozen
    backend = FakeBackend(**options)
    with serving(realtime.router(backend, wanted, send_timeout)) as host:
        yield host, backend
        until(lambda: not backend.open_streams)  # whatever a test did: no stream is left behind


def quiet(pipe, prompt=PROMPTS[0], switch=None, then=None, **options):
    """The frames of a run alone."""
    with pipe.session(prompt, num_frames=FRAMES, **{"step_policy": "fixed:2"} | options) as session:
        made = []
        while not session.exhausted:
            if session.index == switch:
                session.update(then)
            made.append(session.next_chunk().frames)
    return np.concatenate(made)


# With the engine.


def test_a_stream_in_each_format(pipe):
    expected = quiet(pipe, seed=3)
    with engine(pipe) as (host, _):
        for format in stream_encoders.FORMATS:
            with Client(host).start(format=format, num_frames=FRAMES, seed=3, step_policy="fixed:2") as client:
                seen, code = client.rest()
            begun, chunks, done = seen[0], of(seen, "video.chunk_metadata"), seen[-1]
            assert begun["type"] == "video.start" and begun["format"] == format and begun["config"]["fps"] == 12
            assert (done["type"], done["reason"], done["stopped"], done["chunks"], code) == (
                "session.done",
                "done",
                False,
                4,
                1000,
            )
            assert [c["chunk_index"] for c in chunks] == [0, 1, 2, 3] and [c["steps"] for c in chunks] == [2] * 4
            assert [c["pts"] for c in chunks] == [0, 0.25, 0.5, 0.75]
            assert all(len(c["confidence"]) == 3 and c["prompt"] == PROMPTS[0] for c in chunks)
            assert all(c["bytes_per_frame"] == 64 * 64 * 3 and c["threshold"] is None for c in chunks)
            assert all(set(c["ms"]) == {"denoise", "kv", "vae", "encode"} and c["ms"]["vae"] > 0 for c in chunks)
            assert chunks[0]["deadline_ms"] is None and chunks[1]["deadline_ms"] > 0
            shown = {"m4s": shown_m4s, "jpeg": shown_jpeg, "rgb24": raw_frames}[format](chunks)
            assert shown.shape == expected.shape
            if format == "rgb24":
                assert np.array_equal(shown, expected)
            assert np.mean((shown.astype(float) - expected) ** 2) < 40  # 32 dB


def shown_m4s(chunks):
    with av.open(io.BytesIO(b"".join(c["data"] for c in chunks))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shown_jpeg(chunks):
    pictures = []
    for chunk in chunks:
        at = 0
        for length in chunk["payload_lengths"]:
            pictures.append(np.asarray(Image.open(io.BytesIO(chunk["data"][at : at + length]))))
            at += length
    return np.stack(pictures)


def test_a_prompt_is_queued_then_applied_and_the_frames_are_those_of_a_quiet_run(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2")
        client.until("video.chunk_metadata")
        client.change("nonsense", prompt="a dog")
        client.change("e1", prompt=PROMPTS[1])
        client.rest()
        seen = client.seen
    queued, applied, (refused,) = (
        of(seen, t) for t in ("session.interaction.queued", "session.interaction.applied", "error")
    )
    assert [m["event_id"] for m in queued] == ["nonsense", "e1"]
    assert refused["event_id"] == "nonsense" and refused["code"] == "invalid_value" and "dog" in refused["message"]
    (applied,) = applied
    k = applied["chunk_index"]
    assert applied["event_id"] == "e1" and 0 < k < 4 and seen.index(queued[1]) < seen.index(applied)
    prompts = [c["prompt"] for c in of(seen, "video.chunk_metadata")]
    assert prompts == [PROMPTS[0]] * k + [PROMPTS[1]] * (4 - k)
    assert np.array_equal(raw_frames(seen), quiet(pipe, switch=k, then=PROMPTS[1]))


def test_a_prompt_may_come_gradually(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2")
        client.until("video.start")
        said = {"event": {"prompt": PROMPTS[1]}, "event_id": "e1", "transition_chunks": 2}
        client.say("session.interaction", interaction=said)
        client.rest()
    (applied,) = of(client.seen, "session.interaction.applied")
    k, made = applied["chunk_index"], {}
    assert 0 < k < 3  # room for two chunks
    for chunks in (0, 2):
        with pipe.session(PROMPTS[0], num_frames=FRAMES, step_policy="fixed:2") as session:
            frames = []
            while not session.exhausted:
                if session.index == k:
                    session.update(PROMPTS[1], transition_chunks=chunks)
                frames.append(session.next_chunk().frames)
        made[chunks] = np.concatenate(frames)
    assert np.array_equal(raw_frames(client.seen), made[2]) and not np.array_equal(made[0], made[2])


def test_refused_changes_do_not_count_among_those_that_wait(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24").until("video.start")
        for _ in range(2):
            for _ in range(realtime.MAX_PENDING_UPDATES):
                client.change(prompt="a dog")
            errors = [client.until("error") for _ in range(realtime.MAX_PENDING_UPDATES)]
            assert {error["code"] for error in errors} == {"invalid_value"}


def test_the_threshold_of_a_running_stream(pipe):
    for policy in ("dsa", "budget"):
        with engine(pipe) as (host, _), Client(host) as client:
            client.start(format="rgb24", num_frames=FRAMES, step_policy=policy, confidence_threshold=0.0)
            client.until("video.chunk_metadata")
            client.change("e1", confidence_threshold=1.0)
            client.rest()
        (applied,) = of(client.seen, "session.interaction.applied")
        assert applied["prompt"] == PROMPTS[0]
        k, chunks = applied["chunk_index"], of(client.seen, "video.chunk_metadata")
        assert {c["steps"] for c in chunks[:k]} == {1} and {c["threshold"] for c in chunks[:k]} == {0.0}
        assert all(c["threshold"] > 0 for c in chunks[k:])
        if policy == "dsa":  # the pressure lowers the other one's
            assert {c["threshold"] for c in chunks[k:]} == {1.0} and {c["steps"] for c in chunks[k:]} == {4}


def test_fixed_steps_have_no_threshold_and_nothing_of_such_a_change_is_done(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2")
        client.until("video.chunk_metadata")
        client.change("e1", confidence_threshold=0.5, prompt=PROMPTS[1])
        client.rest()
    (error,) = of(client.seen, "error")
    assert error["event_id"] == "e1" and "fixed" in error["message"].lower()
    assert np.array_equal(raw_frames(client.seen), quiet(pipe))


def test_nothing_that_is_said_wrongly_ends_or_changes_a_stream(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2")
        client.until("video.start")
        wrong = ["", "{", "null", '{"type": "session.interaction"}', '{"type": "no"}', b"\x00\xff", '{"type": NaN}']
        for said in wrong:
            client.socket.send(said)
        client.start()
        client.change("e1", prompt=" ")
        client.change("e2", confidence_threshold=-1)
        client.say("session.interaction", interaction={"event": {"prompt": PROMPTS[1]}, "transition_chunks": -2})
        client.say("session.ping")
        seen, code = client.rest()
    assert len(of(seen, "error")) == len(wrong) + 4 and len(of(seen, "session.pong")) == 1 and code == 1000
    assert [m["code"] for m in of(seen, "error")][5:8] == ["binary_message", "invalid_json", "already_started"]
    assert {m["event_id"] for m in of(seen, "error")} == {None, "e1", "e2"}
    assert np.array_equal(raw_frames(seen), quiet(pipe))


def test_queue_positions_and_a_full_house(pipe):
    with engine(pipe, max_sessions=1, max_queue=2) as (host, backend):
        first = Client(host).start()
        first.until("video.start")
        second, third = Client(host).start(num_frames=3), Client(host)
        assert second.hear()["position"] == 1
        third.start(num_frames=3)
        assert third.hear()["position"] == 2
        with Client(host).start() as fourth:
            (error,), code = fourth.rest()
        assert (error["code"], error["retryable"], code) == ("busy", True, 1013) and "try again" in error["message"]
        second.abort()  # one who waits may leave too
        assert third.hear()["position"] == 1
        first.say("session.stop")
        seen, code = first.rest()
        assert seen[-1]["reason"] == "stopped" and seen[-1]["stopped"] and code == 1000
        seen, code = third.rest()
        assert [m["type"] for m in seen] == ["video.start", "video.chunk_metadata", "session.done"] and code == 1000
        until(lambda: backend.stats()["live"] == backend.stats()["waiting"] == 0)


@pytest.mark.parametrize("when", ["before", "opened", "running", "told", "stopped"])
def test_a_client_that_vanishes_frees_its_place_at_once(pipe, when):
    with engine(pipe, max_sessions=1, max_queue=0, idle_timeout=3600) as (host, backend):
        client = Client(host)
        if when != "before":
            client.start()
            client.until("video.start" if when == "opened" else "video.chunk_metadata")
        if when == "told":
            client.change(prompt=PROMPTS[1])
        if when == "stopped":
            client.say("session.stop")
        client.abort()
        until(lambda: backend.stats()["live"] == 0)
        assert sum(pool.cache.in_use for pool in pipe.engine._pools.values()) == 0
        with Client(host).start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2") as other:
            seen, _ = other.rest()
        assert np.array_equal(raw_frames(seen), quiet(pipe))


def test_an_order_that_is_not_possible_may_be_said_again(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        for wrong, words in (
            ({"prompt": "a red dog rests"}, "dog"),
            ({"num_frames": 4}, "nearest is 3"),
            ({"fps": 24}, "12.0"),
            ({"max_steps": 9}, "max_steps"),
            ({"step_policy": "quick"}, "'quick'"),
            ({"model": "wan"}, "untrained"),
            ({"format": "gif"}, "m4s"),
        ):
            error = client.start(**wrong).hear()
            assert error["type"] == "error" and words in error["message"]
        client.change("e1", prompt="a")
        error = client.hear()
        assert (error["code"], error["event_id"]) == ("not_started", "e1")
        client.say("session.ping")
        assert client.hear()["type"] == "session.pong"
        seen, code = client.start(num_frames=3, model="untrained", width=64, height=64, fps=12).rest()
        assert len(of(seen, "video.chunk_metadata")) == 1 and code == 1000


# With streams that do as the test wants.


def test_who_says_nothing_is_sent_away():
    with fake(Settings(start_timeout=0.2)) as (host, _), Client(host) as client:
        client.say("session.ping")  # which is not yet what is wanted
        seen, code = client.rest()
    assert [m["type"] for m in seen] == ["session.pong", "error"] and code == 1008
    assert seen[-1]["code"] == "start_timeout"


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("huge", ["x" * 60_000, b"x" * 60_000])
def test_a_message_beyond_all_measure_ends_the_connection(running, huge):
    with fake(Settings(max_prompt=1000)) as (host, _), Client(host) as client:
        if running:
            client.start().until("video.chunk_metadata")
        client.socket.send(huge)
        seen, code = client.rest()
        assert code == 1009 and of(seen, "error")[-1]["code"] == "too_large"


def test_the_longest_prompt_fits_into_a_message():
    with fake(Settings(max_prompt=1000), period=60) as (host, backend), Client(host) as client:
        client.start("\U0001f600" * 1000).until("video.start")  # twelve characters each in JSON
        assert backend.streams[0].request.prompt == "\U0001f600" * 1000


@pytest.mark.parametrize(
    "closed, code, last",
    [
        (Closed("idle", "no sign"), 1008, "idle"),
        (Closed("lifetime", "too long"), 1008, "lifetime"),
        (Closed("shutdown"), 1001, "shutdown"),
        (Closed("failed", "broken"), 1011, "failed"),
        (Closed("refused", "no such"), 1008, "invalid_value"),
        (Closed("busy", "full"), 1013, "busy"),
    ],
)
def test_how_a_stream_may_end(closed, code, last):
    with fake(period=60) as (host, backend), Client(host) as client:
        client.start().until("video.start")
        stream = backend.streams[0]
        stream.events.append(closed)
        stream.backend.period = 0.001
        stream._make = lambda: None
        stream.closed.set()
        (said,), got = client.rest()
    assert got == code and last == said.get("reason", said.get("code")) and said["message"] == closed.error


def test_queued_is_said_before_applied_even_of_a_stream_that_answers_at_once():
    with fake() as (host, _), Client(host) as client:
        client.start().until("video.start")
        for i in range(10):
            client.change(f"e{i}", prompt=f"p{i}")
        while len(of(client.seen, "session.interaction.applied")) < 10:
            client.hear()
    order = [(m["event_id"], m["type"]) for m in client.seen if "interaction" in m["type"]]
    assert all(
        order.index((f"e{i}", "session.interaction.queued")) < order.index((f"e{i}", "session.interaction.applied"))
        for i in range(10)
    )


def test_changes_do_not_pile_up():
    with fake(deaf=True) as (host, backend), Client(host) as client:
        client.start().until("video.start")
        for i in range(realtime.MAX_PENDING_UPDATES + 3):
            client.change(f"e{i}", prompt="p")
        errors = [client.until("error") for _ in range(3)]
        assert [e["event_id"] for e in errors] == [f"e{realtime.MAX_PENDING_UPDATES + i}" for i in range(3)]
        assert all(e["code"] == "too_many_interactions" and e["retryable"] for e in errors)
        assert len(backend.streams[0].changes) == realtime.MAX_PENDING_UPDATES


def test_a_ping_is_a_sign_of_life():
    with fake(period=60) as (host, backend), Client(host) as client:
        client.start().until("video.start")
        before = backend.streams[0].touched
        for _ in range(3):
            client.say("session.ping")
            client.until("session.pong")
        assert backend.streams[0].touched == before + 3


def test_who_waits_in_the_queue_is_not_idle(pipe, monkeypatch):
    monkeypatch.setattr(realtime, "KEEPALIVE_S", 0.1)
    with engine(pipe, max_sessions=1, max_queue=1, idle_timeout=1.5) as (host, backend):
        with Client(host).start() as first, Client(host).start(num_frames=3) as second:
            assert second.until("session.queued")["position"] == 1
            threading.Event().wait(3.5)  # more than twice what idle clients are given
            assert backend.stats()["waiting"] == 1
            first.say("session.stop")
            assert second.until("video.chunk_metadata")["chunk_index"] == 0


def test_a_slow_client_holds_up_nobody_and_gathers_nothing():
    """Half a megabyte a chunk: what is not read stays unmade once the sockets are full."""
    with fake(height=400, width=448, period=0.001) as (host, backend):
        slow = Client(host).start(format="rgb24")
        until(lambda: backend.streams and backend.streams[0].made)
        with Client(host).start(format="rgb24", num_frames=200) as quick:
            seen, code = quick.rest()
        assert len(of(seen, "video.chunk_metadata")) == 200 and code == 1000
        made = backend.streams[0].made
        with Client(host).start(format="rgb24", num_frames=100) as quick:
            quick.rest()
        assert backend.streams[0].made == made < 60
        slow.until("video.chunk_metadata")  # it may come back
        until(lambda: backend.streams[0].made > made or not slow.hear())
        slow.abort()


def test_a_client_that_takes_nothing_loses_its_place():
    with fake(height=400, width=448, send_timeout=0.3) as (host, backend):
        stuck = Client(host).start(format="rgb24")
        until(lambda: backend.streams and not backend.open_streams)
        stuck.abort()


def test_encoding_stands_in_nobodys_way(monkeypatch):
    """One stream's encoder hangs; another connection is served to its end meanwhile."""
    go, hangs = threading.Event(), threading.Event()

    class Hanging(stream_encoders.RawEncoder):
        def _encode(self, frames):
            hangs.set()
            go.wait(PATIENCE)
            return super()._encode(frames)

    monkeypatch.setitem(stream_encoders.FORMATS, "jpeg", Hanging)
    with fake() as (host, _), Client(host).start(format="jpeg", num_frames=1) as held:
        hangs.wait(PATIENCE)
        with Client(host).start(format="rgb24", num_frames=5) as other:
            seen, code = other.rest()
        assert len(of(seen, "video.chunk_metadata")) == 5 and code == 1000 and not go.is_set()
        held.say("session.ping")
        assert held.until("session.pong")
        go.set()
        assert held.rest()[1] == 1000


def test_an_encoder_that_fails_ends_its_stream_with_an_error(monkeypatch, caplog):
    class Broken(stream_encoders.RawEncoder):
        def _encode(self, frames):
            raise RuntimeError("out of ink")

    monkeypatch.setitem(stream_encoders.FORMATS, "jpeg", Broken)
    with fake() as (host, _), Client(host).start(format="jpeg") as client:
        seen, code = client.rest()
    assert seen[-1]["code"] == "failed" and "out of ink" in seen[-1]["message"] and code == 1011
    assert "out of ink" in caplog.text


def test_positions_come_before_the_place():
    class Waiting(FakeStream):
        def __init__(self, *args):
            super().__init__(*args)
            self.events.extendleft([Queued(1), Queued(2)])

    with fake() as (host, backend), Client(host) as client:
        backend.open = lambda order, id=None, own=backend.open: _as(Waiting, own(order, id))
        client.start(num_frames=1)
        seen, _ = client.rest()
    assert [m.get("position") for m in seen[:3]] == [2, 1, None] and seen[2]["type"] == "video.start"


async def _as(kind, opening):
    stream = await opening
    again = kind(stream.backend, stream.request, stream.id)
    stream.backend.open_streams.discard(stream)
    stream.backend.open_streams.add(again)
    return again


@pytest.mark.parametrize(
    "query, headers, status",
    [
        ("", {}, 401),
        ("?token=wrong", {}, 401),
        ("?token=secret", {}, None),
        ("", {"Authorization": "Bearer secret"}, None),
        ("", {"Authorization": "Bearer wrong"}, 401),
        ("", {"Authorization": "Basic secret"}, 401),
        ("?token=%C3%BC%E2%82%AC", {}, 401),
        ("?token=secret", {"Origin": "http://evil.example"}, 403),
        ("?token=secret", {"Origin": "null"}, 403),
        ("?token=secret", {"Origin": "http://["}, 403),
        ("?token=secret", {"Origin": "https://friend.example"}, None),
        ("?token=secret", {"Origin": "http://{host}"}, None),
        ("?token=secret", {"Origin": "http://{host}.evil.example"}, 403),
    ],
)
def test_who_may_come_in(query, headers, status):
    with fake(Settings(token="secret", origins=("https://friend.example",))) as (host, backend):
        headers = {name: value.format(host=host) for name, value in headers.items()}
        if status is None:
            with Client(host, realtime.PATH + query, additional_headers=headers).start(num_frames=1) as client:
                assert client.rest()[1] == 1000
        else:
            with pytest.raises(InvalidStatus) as refused:
                Client(host, realtime.PATH + query, additional_headers=headers)
            assert refused.value.response.status_code == status and not backend.streams


def test_without_a_token_all_of_this_machine_may():
    with fake() as (host, _), Client(host, realtime.PATH + "?token=any").start(num_frames=1) as client:
        assert client.rest()[1] == 1000


def test_the_encoders_threads_end_with_the_app():
    def threads():
        return {t for t in threading.enumerate() if t.name.startswith("dsa-engine-encoder")}

    before = threads()  # of apps that have just ended
    with fake() as (host, _), Client(host).start(num_frames=3) as client:
        client.rest()
        own = threads() - before
        assert own
    until(lambda: not own & threads())


# Any sequence of messages, and a leave at any point.

texts = st.sampled_from(
    [
        '{"type": "session.start", "prompt": "p"}',
        '{"type": "session.start", "prompt": "p", "format": "rgb24", "num_frames": 2}',
        '{"type": "session.start", "prompt": "impossible"}',
        '{"type": "session.start", "prompt": "p", "fps": 3}',
        '{"type": "session.interaction", "interaction": {"event_id": "e", "event": {"prompt": "q"}}}',
        '{"type": "session.interaction", "interaction": {"event": {"confidence_threshold": 0.5}}}',
        '{"type": "session.interaction", "interaction": {"event": {}}}',
        '{"type": "session.ping"}',
        '{"type": "session.stop"}',
        '{"type": "session.start", "prom',
        "[]",
        b"\x00",
    ]
)
LEGAL_CODES = {1000, 1008}


@pytest.fixture(scope="module")
def playground():
    with fake(Settings(start_timeout=60)) as (host, backend):
        yield host, backend


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(said=st.lists(texts | st.text(max_size=20), max_size=10), leave=st.sampled_from(["stop", "abort", "close"]))
def test_any_sequence_of_messages_ends_well(playground, said, leave):
    host, backend = playground
    with Client(host) as client:
        try:
            for text in said:
                client.socket.send(text)
            client.say("session.stop")
        except ConnectionClosed:
            pass  # it was over before
        if leave == "abort":
            client.abort()
        elif leave == "stop":
            seen, code = client.rest()
            assert code in LEGAL_CODES and seen[-1]["type"] == "session.done"
            begun = of(seen, "video.start")
            assert len(begun) <= 1
            indices = [c["chunk_index"] for c in of(seen, "video.chunk_metadata")]
            assert indices == list(range(len(indices))) and seen[-1]["chunks"] == len(indices)
            assert begun or not indices
    until(lambda: not backend.open_streams)
