"""The worker, turn by turn, and once in its thread."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import Pipeline
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import ChunkReady, Closed, Opened, Queued, StreamRequest, UpdateApplied, UpdateRejected
from dsa_engine.serving.worker.stream import StreamState
from dsa_engine.serving.worker.worker import Worker
from tests.support.serving.sessions import FRAMES, PROMPTS, session_chunks, session_frames
from tests.support.serving.worker_bench import Bench, shown


@pytest.fixture(scope="module")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, max_sessions=4)


@pytest.fixture
def open_bench(pipe):
    """Every test's own; whatever it leaves open is closed, so that a failure stays where it is."""
    made = []

    def make(**limits) -> Bench:
        made.append(Bench(pipe, **limits))
        return made[-1]

    yield make
    for one in made:
        one.worker.call(one.worker._stop)
        one.worker.call(one.worker._abort)
        one.turn()
    assert not made or made[0].slots == 0


@pytest.mark.parametrize("live", [False, True])
def test_streams_together_are_each_the_one_alone(pipe, open_bench, live):
    bench = open_bench()
    streams = [bench.open(i, live=live) for i in range(2)] + [bench.open(2)] * live
    bench.run(*streams)
    for i, stream in enumerate(streams):
        kinds = [type(event) for event in bench.events[stream.id]]
        assert kinds == [Opened, ChunkReady, ChunkReady, ChunkReady, ChunkReady, Closed]
        assert bench.events[stream.id][-1] == Closed("done")
        assert np.array_equal(shown(bench.of(stream, ChunkReady)), session_frames(pipe, PROMPTS[i % 3], seed=i))
    assert bench.slots == 0


def test_a_live_stream_is_at_most_a_chunk_ahead_of_its_player(pipe, open_bench):
    bench = open_bench()
    stream, times = bench.open(live=True, num_frames=None), []
    stream.listener = lambda e: isinstance(e, ChunkReady) and (times.append(bench.now), stream.ack())
    while bench.now < 3.0:
        wait = bench.turn() or 0.0
        bench.now += wait
    frames, fps = 3, pipe.fps
    shown_by = [frames * i / fps for i in range(len(times))]  # the player's time, from the first chunk on
    assert times[0] == 0.0
    assert all(time >= begin - frames / fps - 1e-9 for time, begin in zip(times, shown_by))
    assert len(times) == pytest.approx(3.0 * fps / frames + 1, abs=1)
    stream.close()
    bench.turn()
    assert bench.slots == 0


def test_who_does_not_take_a_chunk_gets_no_other_and_holds_nobody_up(pipe, open_bench):
    bench = open_bench()
    slow, quick = bench.open(0), bench.open(1)
    bench.run(quick)
    assert len(bench.of(slow, ChunkReady)) == 1 and len(bench.of(quick, ChunkReady)) == 4
    slow.ack()
    bench.run(slow)
    assert np.array_equal(shown(bench.of(slow, ChunkReady)), session_frames(pipe, seed=0))


def test_places_queue_and_positions(pipe, open_bench):
    bench = open_bench(max_queue=2)
    streams = [bench.open(i, live=True, num_frames=None) for i in range(5)]
    bench.turn()
    opened = [bool(bench.of(stream, Opened)) for stream in streams]
    assert opened == [True, True, False, False, False]
    assert [bench.events[stream.id] for stream in streams[2:4]] == [[Queued(1)], [Queued(2)]]
    (closed,) = bench.events[streams[4].id]
    assert closed.reason == "busy" and "2 places" in closed.error
    streams[0].close()
    bench.turn()
    assert bench.of(streams[2], Opened) and bench.events[streams[3].id] == [Queued(2), Queued(1)]
    streams[3].close()  # also who waits can leave
    bench.turn()
    assert bench.events[streams[3].id][-1] == Closed("closed")
    for stream in streams:
        stream.close()
    bench.turn()
    assert bench.slots == 0 and bench.worker.stats()["waiting"] == 0


def test_jobs_have_places_of_their_own(pipe, open_bench):
    bench = open_bench()
    live = [bench.open(i, live=True) for i in range(3)]
    job = bench.open(0)
    bench.turn()
    assert bench.of(job, Opened) and not bench.of(live[2], Opened)
    for stream in (*live, job):
        stream.close()
    bench.turn()


def test_a_prompt_is_in_force_from_the_chunk_that_it_says(pipe, open_bench):
    bench = open_bench()
    stream = bench.open()
    while len(bench.of(stream, ChunkReady)) < 2:
        bench.turn()
        if len(bench.of(stream, ChunkReady)) == 1:
            stream.ack()
    stream.update("no such thing", "e1")
    stream.update(PROMPTS[1], "e2")
    stream.ack()
    bench.run(stream)
    (refused,), (applied,) = bench.of(stream, UpdateRejected), bench.of(stream, UpdateApplied)
    assert refused.event_id == "e1" and "nearest" in refused.error
    assert applied == UpdateApplied("e2", PROMPTS[1], 2)
    assert [event.chunk.prompt for event in bench.of(stream, ChunkReady)] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert np.array_equal(shown(bench.of(stream, ChunkReady)), session_frames(pipe, changes={2: [PROMPTS[1]]}, seed=0))


def test_a_relative_stream_says_what_each_chunk_was_compared_with(pipe, open_bench):
    """The least confidence of the chunk before, 1 for the first; it has no threshold to be changed."""
    bench = open_bench()
    stream = bench.open(steps="relative", live=True)
    stream.update(threshold=0.5, event_id="e1")
    bench.run(stream)
    made = bench.of(stream, ChunkReady)
    assert np.array_equal(shown(made), session_frames(pipe, seed=0, step_policy="relative"))
    assert [event.threshold for event in made] == [1.0, *(min(event.chunk.confidence) for event in made[:-1])]
    (refused,) = bench.of(stream, UpdateRejected)
    assert "no confidence threshold" in refused.error


def test_who_leaves_in_the_middle_of_a_chunk_changes_nothing_for_others(pipe, open_bench):
    bench = open_bench()
    leaver, stayer = bench.open(0), bench.open(1)
    bench.turn()  # one forward of two: both chunks are half made
    assert leaver.state is StreamState.DENOISING and bench.slots == 2
    leaver.close()
    bench.turn()
    assert bench.events[leaver.id][-1] == Closed("closed") and bench.slots == 1
    bench.run(stayer)
    assert np.array_equal(shown(bench.of(stayer, ChunkReady)), session_frames(pipe, PROMPTS[1], seed=1))


@pytest.mark.parametrize(
    "order, words",
    [
        ({"prompt": "rubbish"}, "must read"),
        ({"prompt": " "}, "not empty"),
        ({"seed": -1}, "seed"),
        ({"num_frames": 7}, "nearest is"),
        ({"steps": "fixed:9"}, "nearest is 4"),
        ({"steps": "best"}, "must be one of"),
        ({"threshold": float("nan"), "steps": "budget"}, "within"),
        ({"steps": "relative", "threshold": 0.5}, "use 'dsa'"),
        ({"steps": "relative", "min_steps": 9}, "nearest is 4"),
        ({"steps": "budget", "min_steps": 9}, "nearest"),
        ({"steps": "budget", "min_steps": 0}, "nearest is 1"),
        ({"height": 65}, "nearest"),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_place_is_given(pipe, open_bench, order, words):
    bench = open_bench()
    stream, checked = bench.open(**order), bench.worker.check(StreamRequest(**{"prompt": PROMPTS[0]} | order))
    bench.turn()
    (closed,) = bench.events[stream.id]
    assert closed.reason == "refused" and words in closed.error
    with pytest.raises(ValueError, match=words):
        checked.result(0)
    assert bench.slots == 0


def test_a_fault_of_one_stream_is_not_the_others(pipe, open_bench, monkeypatch):
    bench = open_bench()
    bad, good = bench.open(0), bench.open(1)
    bench.turn()
    monkeypatch.setattr(bad.session, "detach_decode", lambda: lambda: 1 / 0)
    bench.run(bad, good)
    assert bench.events[bad.id][-1].reason == "failed" and bench.events[good.id][-1] == Closed("done")
    assert np.array_equal(shown(bench.of(good, ChunkReady)), session_frames(pipe, PROMPTS[1], seed=1))
    assert bench.slots == 0


def test_a_forward_that_fails_is_tried_again_once(pipe, open_bench, monkeypatch):
    bench = open_bench()
    stream = bench.open()
    bench.turn()
    run, faults = stream.session.rollout.inputs.run, []

    def fails(*args):
        if len(faults) < count:
            faults.append(1)
            raise RuntimeError("out of memory")
        run(*args)

    monkeypatch.setattr(stream.session.rollout.inputs, "run", fails)
    count = 1
    bench.run(stream)
    assert faults and np.array_equal(shown(bench.of(stream, ChunkReady)), session_frames(pipe, seed=0))
    faults, count, again = [], 2, bench.open()
    bench.run(again)
    assert bench.events[again.id][-1] == Closed("failed", "out of memory") and bench.slots == 0
    after = bench.open()
    bench.run(after)
    assert np.array_equal(shown(bench.of(after, ChunkReady)), session_frames(pipe, seed=0))


def test_a_listener_that_fails_does_not_stop_the_worker(pipe, open_bench):
    bench = open_bench()
    rude, good = bench.open(0), bench.open(1)
    rude.listener = lambda event: 1 / 0
    bench.run(good)
    assert bench.events[good.id][-1] == Closed("done")
    rude.close()
    bench.turn()
    assert bench.slots == 0


def test_idle_and_lifetime(pipe, open_bench):
    bench = open_bench(idle_timeout=5.0, lifetime=20.0)
    silent, alive, waits = (bench.open(i, live=True, num_frames=None) for i in range(3))
    alive.listener = lambda e: (bench.events[alive.id].append(e), isinstance(e, ChunkReady) and alive.ack())
    while bench.now < 30.0:
        wait = bench.turn()
        bench.now += 0.05 if wait is None else min(wait, 0.05)
        if bench.now < 12:
            waits.keepalive()
    assert bench.events[silent.id][-1].reason == "idle"
    assert bench.events[alive.id][-1].reason == "lifetime"
    assert bench.of(waits, Opened) and bench.events[waits.id][-1].reason == "idle"
    assert bench.slots == 0


def test_a_stop_finishes_the_chunks_that_are_being_made(pipe, open_bench):
    bench = open_bench()
    running, slow = bench.open(0), bench.open(1)
    while not bench.of(slow, ChunkReady):
        bench.turn()
    running.ack()
    bench.turn()  # running is in the middle of its second chunk, slow has not taken its first
    assert running.state is StreamState.DENOISING
    bench.worker.call(bench.worker._stop)
    late = bench.open(2)
    bench.turn()
    bench.turn()
    assert [type(e) for e in bench.events[running.id]] == [Opened, ChunkReady, ChunkReady, Closed]
    assert [bench.events[stream.id][-1].reason for stream in (running, slow, late)] == ["shutdown"] * 3
    assert bench.slots == 0


def test_under_load_budget_takes_fewer_steps_and_sure_chunks_go_first(pipe, open_bench):
    bench = open_bench()
    streams = [bench.open(i, live=True, num_frames=None, steps="budget", threshold=1.0) for i in range(2)]
    for stream in streams:
        events = bench.events[stream.id]
        stream.listener = lambda e, t=stream, events=events: (events.append(e), isinstance(e, ChunkReady) and t.ack())
    bench.took = 0.12  # a forward: four a chunk of 0.25 s are too many
    while bench.now < 30:
        wait = bench.turn() or 0.0
        bench.now += wait
    made = [event for stream in streams for event in bench.of(stream, ChunkReady)]
    early, late = ([e for e in made if (e.chunk.index < 2) == first] for first in (True, False))
    assert np.mean([e.chunk.steps for e in early]) == 4 > 2.6 > np.mean([e.chunk.steps for e in late])
    assert 0 < bench.worker.controller.pressure <= 1
    for event in late:  # one rule for all: who stopped early had reached the threshold
        assert event.chunk.steps == 4 or min(event.chunk.confidence) >= event.threshold
    streams[0].close()
    bench.turn()
    assert bench.worker.controller.pressure > 0
    streams[1].close()
    bench.turn()
    assert bench.worker.controller.pressure == 0  # whoever comes next finds no load


def test_a_stream_goes_on_from_a_snapshot(pipe, open_bench):
    bench = open_bench()
    first = bench.open(snapshot_every=1)
    while not bench.of(first, ChunkReady):
        bench.turn()
    snapshot = bench.of(first, ChunkReady)[0].snapshot
    first.close()
    again = bench.open(snapshot=snapshot)
    bench.run(again)
    assert bench.of(again, Opened)[0].index == 1
    assert np.array_equal(shown(bench.of(again, ChunkReady)), np.concatenate(session_chunks(pipe, seed=0)[1:]))


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "live", "turn", "turn", "take", "update", "close", "wait"]), st.integers(0, 5)),
    max_size=40,
)


@settings(max_examples=25)
@given(ACTIONS)
def test_whatever_happens_every_stream_closes_once_and_every_place_is_free(pipe, actions):
    bench, streams = Bench(pipe), []
    for action, i in actions:
        if action in ("open", "live"):
            streams.append(bench.open(i, live=action == "live", steps="budget"))
        elif action == "turn":
            bench.turn()
        elif action == "wait":
            bench.now += i
        elif streams:
            stream = streams[i % len(streams)]
            {"take": stream.ack, "update": partial(stream.update, PROMPTS[i % 3]), "close": stream.close}[action]()
    bench.worker.call(bench.worker._stop)
    bench.worker.call(bench.worker._abort)
    bench.turn()
    for stream in streams:
        assert [isinstance(event, Closed) for event in bench.events[stream.id]].count(True) == 1
        assert isinstance(bench.events[stream.id][-1], Closed)
        chunks = [event.chunk.index for event in bench.of(stream, ChunkReady)]
        assert chunks == list(range(len(chunks)))
    assert bench.slots == 0 and not bench.worker._streams


def test_in_its_thread(pipe):
    worker, events, closed = Worker(pipe, WorkerLimits(max_sessions=2, max_jobs=2)), [], threading.Event()
    worker.start()
    with pytest.raises(RuntimeError, match="runs already"):
        worker.start()

    def listener(event):
        events.append(event)
        if isinstance(event, ChunkReady):
            assert threading.current_thread().name == "dsa-engine-worker"
            stream.ack()
        if isinstance(event, Closed):
            closed.set()

    stream = worker.open(StreamRequest(PROMPTS[0], num_frames=FRAMES, live=False, steps="fixed:2"), listener)
    assert closed.wait(30)
    assert np.array_equal(shown([e for e in events if isinstance(e, ChunkReady)]), session_frames(pipe, seed=0))
    worker.stop()
    late = []
    worker.open(StreamRequest(PROMPTS[0]), late.append)  # the thread has gone; who asks is told at once all the same
    assert late[0].reason == "shutdown"


def test_a_pipeline_with_too_few_places_is_refused(pipe):
    with pytest.raises(ValueError, match="make it with 9"):
        Worker(pipe, WorkerLimits(max_sessions=5, max_jobs=4))


def test_the_thread_that_decodes_warms_up_before_anybody_is_served(pipe, monkeypatch):
    """What cuDNN chooses is each thread's own: the pipeline's warm-up in another thread does not serve it."""
    decoded, decode = [], pipe.engine.decoder.decode

    def seen(x, state):
        decoded.append((threading.current_thread().name, tuple(x.shape)))
        return decode(x, state)

    monkeypatch.setattr(pipe.engine.decoder, "decode", seen)
    worker = Worker(pipe, WorkerLimits(max_sessions=1, max_jobs=0))
    worker.start()
    assert not decoded  # there is nothing to choose on a CPU
    worker.stop()
    monkeypatch.setattr(Pipeline, "device", torch.device("cuda", 1))
    worker = Worker(pipe, WorkerLimits(max_sessions=1, max_jobs=0))
    worker.start()
    worker.stop()
    assert decoded == [("dsa-engine-decoder_0", (1, 3, 16, 8, 8))] * 2  # a clip's first chunk and the next
