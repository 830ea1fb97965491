"""`WS /v1/realtime/video` over real sockets, with streams that do as the test wants."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus

from dsa_engine.media import stream_encoders
from dsa_engine.serving.http import realtime
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import Closed, Queued
from tests.support.fake_backend import FakeStream
from tests.support.live_server import PATIENCE, until
from tests.support.serving.realtime_client import Client, fake, of


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
        backend.streams[0].events.append(closed)
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


def test_a_slow_client_holds_up_nobody_and_gathers_nothing():
    """Half a megabyte a chunk: what is not read stays unmade once the sockets are full."""
    with fake(size=(400, 448), period=0.001) as (host, backend):
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
    with fake(size=(400, 448), send_timeout=0.3) as (host, backend):
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
        backend.kind = Waiting
        client.start(num_frames=1)
        seen, _ = client.rest()
    assert [m.get("position") for m in seen[:3]] == [2, 1, None] and seen[2]["type"] == "video.start"


def test_who_waits_in_the_queue_is_not_idle(monkeypatch):
    """Without a word of its own: the connection keeps its stream alive, until it opens."""
    monkeypatch.setattr(realtime, "KEEPALIVE_S", 0.01)

    class Waiting(FakeStream):
        def __init__(self, *args):
            super().__init__(*args)
            self.opened, self.events[0] = self.events[0], Queued(1)

        def _make(self):
            if self.opened is None:
                super()._make()
            elif self.touched < 3:
                self.events.append(Queued(1))
            else:
                self.events.append(self.opened)
                self.opened = None

    with fake() as (host, backend), Client(host) as client:
        backend.kind = Waiting
        client.start(num_frames=1)
        assert client.until("session.queued")["position"] == 1
        assert client.until("video.start")


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
