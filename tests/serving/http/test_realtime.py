"""`WS /v1/realtime/video` over real sockets, with the engine behind it."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from dsa_engine import Relative
from dsa_engine.media import stream_encoders
from dsa_engine.serving.http import realtime
from tests.support.live_server import until
from tests.support.serving.realtime_client import Client, engine, of, raw_frames
from tests.support.serving.sessions import FRAMES, PROMPTS, session_frames


def test_a_stream_in_each_format(pipe):
    expected = session_frames(pipe, seed=3)
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
    assert np.array_equal(raw_frames(seen), session_frames(pipe, changes={k: [PROMPTS[1]]}))


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


def test_relative_steps_over_the_socket(pipe):
    """As many as a session takes; `threshold` is what a chunk was compared with, and none can be set."""
    with engine(pipe) as (host, _), Client(host) as client:
        refused = client.start(step_policy="relative", confidence_threshold=0.5).hear()
        assert refused["type"] == "error" and "use 'dsa'" in refused["message"]
        client.start(format="rgb24", num_frames=FRAMES, step_policy="relative:max")
        client.until("video.chunk_metadata")
        client.change("e1", confidence_threshold=0.5)
        client.rest()
    chunks = of(client.seen, "video.chunk_metadata")
    with pipe.session(PROMPTS[0], num_frames=FRAMES, step_policy=Relative(frame_reduce="max")) as session:
        assert [c["steps"] for c in chunks] == [session.next_chunk().steps for _ in chunks]
    assert [c["threshold"] for c in chunks] == [1.0, *(max(c["confidence"]) for c in chunks[:-1])]
    (error,) = (e for e in of(client.seen, "error") if e["event_id"] == "e1")
    assert "no confidence threshold" in error["message"]


def test_fixed_steps_have_no_threshold_and_nothing_of_such_a_change_is_done(pipe):
    with engine(pipe) as (host, _), Client(host) as client:
        client.start(format="rgb24", num_frames=FRAMES, step_policy="fixed:2")
        client.until("video.chunk_metadata")
        client.change("e1", confidence_threshold=0.5, prompt=PROMPTS[1])
        client.rest()
    (error,) = of(client.seen, "error")
    assert error["event_id"] == "e1" and "fixed" in error["message"].lower()
    assert np.array_equal(raw_frames(client.seen), session_frames(pipe))


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
    assert np.array_equal(raw_frames(seen), session_frames(pipe))


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
        assert np.array_equal(raw_frames(seen), session_frames(pipe))


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
