"""The serving benchmark: its clients against a server that misbehaves on purpose, its figures against closed forms."""

from __future__ import annotations

import asyncio
import json
import math
import mmap
import os
import threading
from contextlib import asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from websockets.asyncio.server import serve

from benchmarks import serving
from benchmarks.loadgen import client, server_process
from benchmarks.loadgen.client import (
    Arrival,
    ClientRecord,
    ClientScenario,
    figures,
    jain,
    playback,
    run_client,
    scenarios,
)
from benchmarks.loadgen.server_process import Server, ServerUnderTest
from dsa_engine.serving.http import realtime_schemas
from dsa_engine.shapes.world import Caption

PROMPT = "a red circle rests on black"


# The player


def stepped(arrivals, fps, start, stop):
    """The same player, a millisecond at a time: (milliseconds that it stalled, late chunks)."""
    holds, begun, still, late, waits = 0, False, 0, 0, False
    due = {}
    for at, frames in arrivals:
        due.setdefault(at, []).append(frames)
    for now in range(stop):
        for frames in due.get(now, ()):
            late += waits and begun and now >= start
            begun, waits = True, False
            holds += frames * 1000 // fps
        waits = holds == 0
        still += waits and now >= start
        holds = max(0, holds - 1)
    return still, late + (holds == 0)


@given(
    gaps=st.lists(st.integers(0, 900), max_size=12),
    first=st.integers(0, 3000),
    start=st.integers(0, 2000),
    span=st.integers(1, 3000),
)
@settings(max_examples=300, deadline=None)
def test_a_player_stalls_where_one_stepped_by_milliseconds_does(gaps, first, start, span):
    arrivals = [(at, 3) for at in np.cumsum([first, *gaps]).tolist()]
    found = playback([(at / 1000, n) for at, n in arrivals], 12, start / 1000, (start + span) / 1000)
    still, late = stepped(arrivals, 12, start, start + span)
    assert found.stalled * 1000 == pytest.approx(still, abs=1e-6)
    inside = sum(start <= at < start + span for at, _ in arrivals)
    assert inside <= found.chunks <= inside + 1
    assert abs(found.late - late) <= 1  # a chunk in the very millisecond in which the player runs out


@pytest.mark.parametrize(
    "arrivals, expected",
    [
        ([0.0, 0.25, 0.5, 0.75, 1.0], (0.0, 4, 0)),  # each as the previous one ends
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.9], (0.0, 6, 0)),  # ahead
        ([0.0, 0.35, 0.6, 0.85], (0.1, 4, 1)),  # the second one is late, and those after it are not
        ([0.0, 0.25], (0.5, 3, 1)),  # the third one never comes
        ([0.4, 0.6, 0.8], (0.4, 3, 0)),  # the first one comes into the window: that is no late chunk
        ([-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75], (0.0, 4, 0)),  # what was late before counts no more
        ([], (1.0, 1, 1)),
    ],
)
def test_a_player(arrivals, expected):
    found = playback([(at, 3) for at in arrivals], 12.0, 0.0, 1.0)
    assert found == (pytest.approx(expected[0]), *expected[1:])


# Scripts


def test_clients_arrive_and_change_prompts_as_poisson_processes_do():
    found = scenarios(np.random.default_rng(0), 400, 10.0, 60.0, 5.0, {"format": "rgb24"})
    arrives = [scenario.arrives for scenario in found]
    assert arrives == sorted(arrives) and 0 <= arrives[0] and arrives[-1] <= 10
    assert np.mean(arrives) == pytest.approx(5.0, abs=4 * 10 / math.sqrt(12 * 400))
    gaps = [b - a for scenario in found for (a, _), (b, _) in pairwise(scenario.prompts)]
    count = sum(len(scenario.prompts) - 1 for scenario in found)
    expected = sum((60.0 - at) / 5.0 for at in arrives)
    assert count == pytest.approx(expected, abs=4 * math.sqrt(expected))
    assert np.median(gaps) < 0.8 * np.mean(gaps)  # exponential: ln 2 = 0.69, but for the end of the scenario
    assert all(scenario.prompts[0][0] == scenario.arrives and scenario.prompts[-1][0] < 60 for scenario in found)
    assert len({scenario.start["seed"] for scenario in found}) == 400


def test_every_change_of_a_scenario_is_a_change_and_can_be_parsed():
    for scenario in scenarios(np.random.default_rng(1), 20, 1.0, 30.0, 1.0, {}):
        said = [prompt for _, prompt in scenario.prompts]
        assert all(a != b for a, b in pairwise(said))
        assert all(str(Caption.parse(prompt)) == prompt for prompt in said)
    again, other = (scenarios(np.random.default_rng(seed), 3, 1.0, 9.0, 1.0, {}) for seed in (1, 2))
    assert again == scenarios(np.random.default_rng(1), 3, 1.0, 9.0, 1.0, {}) != other


def test_the_messages_are_those_that_the_server_knows():
    start = realtime_schemas.parse(client.start_message(PROMPT, {"seed": 3, "step_policy": "dsa", "format": "rgb24"}))
    assert (start.prompt, start.seed, start.step_policy, start.format) == (PROMPT, 3, "dsa", "rgb24")
    change = realtime_schemas.parse(client.change_message(PROMPT, "seven"))
    assert (change.interaction.event.prompt, change.interaction.event_id) == (PROMPT, "seven")
    realtime_schemas.check_interaction(change.interaction, 4096)


# The search


@given(limit=st.integers(0, 300), guess=st.integers(-5, 500), most=st.integers(1, 300))
def test_the_search_finds_the_largest_number_that_holds(limit, guess, most):
    tried = []

    def holds(n):
        assert 1 <= n <= most and n not in tried
        tried.append(n)
        return n <= limit

    found = serving.search(holds, guess, most)
    truth = min(limit, most)
    assert found <= truth and (found == truth or truth - found <= serving.RESOLUTION * (found + truth))
    assert found == 0 or found in tried


def test_the_search_begins_at_its_guess_and_takes_few_trials():
    tried = []
    assert serving.search(lambda n: tried.append(n) or n <= 21, 20, 64) == 21
    assert tried[0] == 20 and len(tried) <= 4
    tried.clear()
    assert serving.search(lambda n: tried.append(n) or n <= 250, 10, 300) >= 242
    assert len(tried) <= 15


# Figures


def record(fps=12.0, steps=(2, 2), latency=100.0, late=(False, False), period=0.25, chunks=8, **fields):
    arrivals = [
        Arrival(i * period, 3, steps[i % len(steps)], latency + i, None if i == 0 else 250.0, late[i % len(late)])
        for i in range(chunks)
    ]
    return ClientRecord(asked=-0.5, fps=fps, chunks=arrivals, **fields)


def test_figures_of_streams_on_time():
    found = figures([record(steps=(1, 3)), record(steps=(4, 4), latency=200.0)], 0.0, 2.0)
    assert (found["chunks"], found["late"], found["missed"], found["chunks_per_s"]) == (16, 0.0, 0, 8.0)
    assert found["fps"] == {"least": 12.0, "mean": 12.0, "wanted": 12.0}
    assert found["steps_histogram"] == {"1": 4, "3": 4, "4": 8} and found["mean_steps"] == 3.0
    assert found["fairness"] == {"jain": 1.0, "steps_spread": 2.0}
    assert found["interval_ms"]["p50"] == pytest.approx(250) and found["first_frame_ms"]["max"] == pytest.approx(500)
    assert found["latency_ms"]["max"] == 207.0 and found["deadline_ms"]["p50"] == 250.0
    assert found["chunk_ms"] == 250.0
    assert found["errors"] == {} and serving.held(found)


def test_figures_of_a_stream_at_half_its_pace():
    found = figures([record(), record(period=0.5, late=(True,), chunks=4)], 0.0, 2.0)
    assert found["fps"]["least"] == pytest.approx(6.0) and found["fps"]["mean"] == pytest.approx(9.0)
    assert found["late"] == pytest.approx(4 / 13)  # three of its four, and one that never came
    assert found["missed"] == 4 and found["fairness"]["jain"] == pytest.approx(18**2 / (2 * (12**2 + 6**2)))
    assert not serving.held(found)


def test_what_lies_outside_the_window_is_not_counted():
    found = figures([record(chunks=40)], 2.0, 4.0)
    assert found["chunks"] == 8 and found["latency_ms"]["max"] == 115.0


def test_streams_that_got_nothing_have_figures():
    found = figures([ClientRecord(asked=0.0, error="busy: full")], 0.0, 1.0)
    assert (
        found["latency_ms"] is found["chunk_ms"] is None
        and found["errors"] == {"busy: full": 1}
        and not serving.held(found)
    )


@pytest.mark.parametrize(
    "least, late, errors, expected",
    [(11.76, 0.01, {}, True), (11.75, 0.0, {}, False), (12.0, 0.011, {}, False), (12.0, 0.0, {"x": 1}, False)],
)
def test_held(least, late, errors, expected):
    assert serving.held({"fps": {"least": least, "wanted": 12.0}, "late": late, "errors": errors}) is expected


def test_jain():
    assert jain([3.0] * 5) == pytest.approx(1.0) and jain([7.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0, 0.0]) == 1.0  # all get the same


def part(held, rate, cpu):
    return {"held": held, "flood": {"chunks_per_s": rate, "chunks_per_cpu_s": cpu}}


def test_verdict():
    result = {
        "policies": {"fixed": part(10, 40.0, 50.0), "confidence": part(15, 60.0, 100.0)},
        "one_at_a_time": {"policy": "fixed", **part(4, 16.0, None)},
        "deadline_ms": 250.0,
        "overload": {"budget": {"latency_ms": {"p95": 250.0}}},
        "beyond": {"budget": {"latency_ms": {"p95": 250.1}}},
    }
    assert serving.verdict(result) == {
        "confidence_vs_fixed": {"held": 1.5, "s": 1.5, "cpu_s": 2.0},
        "batching_vs_one_at_a_time": {"held": 2.5, "s": 2.5, "cpu_s": None},
        "budget_p95_under_deadline": True,
        "beyond_p95_under_deadline": False,
    }
    result |= {"policies": {"fixed": part(0, 1.0, 1.0)}, "one_at_a_time": None, "overload": {}, "beyond": {}}
    assert set(serving.verdict(result).values()) == {None}


# A client


CHUNK = {
    "type": "video.chunk_metadata",
    "num_frames": 3,
    "steps": 2,
    "latency_ms": 9.0,
    "deadline_ms": None,
    "late": False,
}


@asynccontextmanager
async def server_of(conversation):
    async with serve(conversation, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def watched(conversation, scenario, until=0.6):
    async def go():
        async with server_of(conversation) as url:
            return await run_client(url, scenario, asyncio.get_running_loop().time(), until)

    return asyncio.run(go())


def test_a_client_follows_its_scenario_and_records_what_comes():
    heard = []

    async def conversation(socket):
        heard.append(json.loads(await socket.recv()))
        await socket.send(json.dumps({"type": "video.start", "config": {"fps": 12.0}}))
        await socket.send(json.dumps(CHUNK))
        await socket.send(bytes(10))
        async for message in socket:
            heard.append(said := json.loads(message))
            if said["type"] == "session.stop":
                return await socket.send(json.dumps({"type": "session.done", "reason": "stopped"}))
            event = said["interaction"]["event_id"]
            await socket.send(json.dumps({"type": "session.interaction.applied", "event_id": event, "chunk_index": 1}))
            await socket.send(json.dumps(CHUNK | {"steps": 4, "late": True}))
            await socket.send(bytes(20))

    scenario = ClientScenario(0.1, [(0.1, PROMPT), (0.3, "a blue cross jumps on navy")], {"seed": 5})
    one = watched(conversation, scenario)
    assert [said["type"] for said in heard] == ["session.start", "session.interaction", "session.stop"]
    assert heard[0]["seed"] == 5 and heard[1]["interaction"]["event"]["prompt"] == "a blue cross jumps on navy"
    assert (one.fps, one.bytes, one.changes, one.error) == (12.0, 30, 1, None)
    assert [(c.steps, c.late, c.frames) for c in one.chunks] == [(2, False, 3), (4, True, 3)]
    assert len(one.applied) == 1 and 0 < one.applied[0] < 0.3 and one.asked < one.chunks[0].at < one.chunks[1].at


@pytest.mark.parametrize("how", ["close", "error", "done", "abort"])
def test_a_stream_that_ends_by_itself_is_an_error(how):
    async def conversation(socket):
        await socket.recv()
        if how == "error":
            await socket.send(json.dumps({"type": "error", "code": "busy", "message": "full"}))
        if how == "done":
            await socket.send(json.dumps({"type": "session.done", "reason": "idle"}))
        if how == "abort":
            socket.transport.abort()

    one = watched(conversation, ClientScenario(0.0, [(0.0, PROMPT)], {}))
    assert one.error is not None and (how != "error" or one.error == "busy: full")


def test_nobody_at_the_other_end_is_an_error():
    one = asyncio.run(run_client("http://127.0.0.1:9", ClientScenario(0.0, [(0.0, PROMPT)], {}), 0.0, 0.1))
    assert "refused" in one.error.lower() or "connect" in one.error.lower()


# A server from outside


def test_metrics_are_those_that_were_set(monkeypatch):
    registry = CollectorRegistry()
    Gauge("dsa_pressure", "of\nall", registry=registry).set(0.25)
    counter = Counter("dsa_misses", "x", ["kind", "words"], registry=registry)
    counter.labels("live", 'a "b" {c} 7').inc(3)
    counter.labels("job", "").inc(4)
    text = generate_latest(registry).decode()
    monkeypatch.setattr(ServerUnderTest, "get", lambda self, path: (200, text))
    found = ServerUnderTest("http://x").metrics()
    assert found["dsa_pressure"] == 0.25 and found["dsa_misses_total"] == 7.0
    assert found['dsa_misses_total{kind="job",words=""}'] == 4.0
    monkeypatch.setattr(ServerUnderTest, "get", lambda self, path: (404, ""))
    with pytest.raises(RuntimeError, match="404"):
        ServerUnderTest("http://x").metrics()


def test_what_is_not_a_number_does_not_get_into_the_json(monkeypatch):
    monkeypatch.setattr(
        ServerUnderTest, "metrics", lambda self: {"dsa_threshold": math.nan, "dsa_pressure": 0.5, "other": 1.0}
    )
    assert serving.pressing(ServerUnderTest("http://x")) == {"dsa_pressure": 0.5}


def test_statistics_of_a_process(tmp_path):
    before = server_process.process_stats(os.getpid())
    wait = threading.Event()
    threads = [threading.Thread(target=wait.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    files = [(tmp_path / str(i)).open("w") for i in range(5)]
    pages = mmap.mmap(-1, 2**26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # never memory that was freed before
    block = np.frombuffer(pages, np.uint8)
    while server_process.process_stats(os.getpid()).cpu < before.cpu + 0.05:
        block += 1
    after = server_process.process_stats(os.getpid())
    wait.set()
    for one in (*threads, *files):
        one.join() if isinstance(one, threading.Thread) else one.close()
    assert (after.threads, after.files) == (before.threads + 3, before.files + 5)
    assert after.rss - before.rss > 2**25


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="nonsense"):
        Server(["--model", "nonsense"])


@pytest.mark.slow
def test_the_whole_benchmark(untrained, tmp_path, capsys):
    saved, plot = tmp_path / "serving.json", tmp_path / "serving.png"
    options = ["--quick", "--most", "1", "--measure", "0.8", "--model", str(untrained)]
    options += ["--save", str(saved), "--plot", str(plot)]
    serving.main([*options, "--policies", "fixed", "confidence", "budget"])
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result == json.loads(saved.read_text()) and plot.read_bytes()[:4] == b"\x89PNG"
    assert out[0].split() == " ".join(serving.HEADER).split() and any("one at a time" in line for line in out)
    assert result["deadline_ms"] == 250.0 and set(result["policies"]) == set(serving.DEFAULT_POLICIES)
    for name, found in result["policies"].items():
        flood = found["flood"]
        assert flood["streams"] == 3 and flood["chunks"] > 0 and not flood["errors"]
        assert sum(flood["steps_histogram"].values()) > 0 and flood["cores"]["server"] > 0
        assert name != "fixed" or set(flood["steps_histogram"]) == {"4"}
        assert found["held"] == 0 or found["at"]["held"] is True
    assert result["one_at_a_time"]["policy"] == "fixed"
    assert {found["streams"] for found in result["overload"].values()} == {
        2 * max(1, result["policies"]["fixed"]["held"])
    }
    assert any("pressure" in name for name in result["overload"]["budget"]["pressing"]["during"])
    assert set(result["verdict"]) == {
        "confidence_vs_fixed",
        "batching_vs_one_at_a_time",
        "budget_p95_under_deadline",
        "beyond_p95_under_deadline",
    }


def test_a_target_that_cannot_be_written_is_an_error_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="png"):
        serving.main(["--plot", str(tmp_path / "plot.jpg")])
