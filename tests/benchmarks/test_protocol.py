"""What is generated, by whom and in which order: streams, scenarios, drawn step counts, random models, FLOP."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.limit import Limit
from benchmarks.e2e import breakdown, concurrency, protocol
from benchmarks.e2e.protocol import (
    Bench,
    format_histogram,
    histogram_policy,
    parse_histogram,
    random_pipeline,
    sample_step_counts,
)
from benchmarks.e2e.timeline import Chunk, EngineStream, Run, play
from benchmarks.micro import roofline
from dsa_engine import Fixed, PerChunk, Pipeline
from dsa_engine.engine.session import Session

PROMPT = "a red circle jumps"


@pytest.fixture
def embeds(pipe):
    return pipe.engine.encode([PROMPT])


@pytest.mark.parametrize("window", [9, -1])
def test_the_pools_of_both_scenarios_are_captured(untrained, monkeypatch, window):
    """On a GPU: the shapes that are captured are those that the streams then have."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", window=window)
    embeds = pipe.engine.encode([PROMPT])
    bench = Bench(pipe, [embeds], lambda scenario, clip: Fixed(2), 0)
    scenarios = bench.clip(4, 1), bench.steady(2, 1)
    assert [bench.capture(scenario) for scenario in scenarios] == [0.0, 0.0]  # nothing to capture here
    shapes = []

    def capture(**given):
        shapes.append(pipe.engine._pool_shape(**given))
        return 1.0

    monkeypatch.setattr(pipe.engine, "capture", capture)
    monkeypatch.setattr(type(pipe.engine.dit), "device", torch.device("cuda"))
    assert [bench.capture(scenario) for scenario in scenarios] == [1.0, 1.0]
    monkeypatch.undo()
    assert len(set(shapes)) == (1 if window == 9 else 2)
    for scenario, shape in zip(scenarios, shapes, strict=True):
        pipe.engine.close()
        bench.session(scenario, 0, Fixed(2)).close()
        assert [*pipe.engine._pools] == [shape]


@pytest.mark.parametrize("commit", ["clean", "exit_step"])
def test_a_stream_is_the_session(pipe, embeds, monkeypatch, commit):
    """Its steps, its stages, and as many rows through the model as its chunks say."""
    counts = [3, 1, 4, 2, 2]
    bench = Bench(pipe, [embeds], lambda scenario, clip: PerChunk(counts), seed=5)
    rows, forward, made = [], pipe.engine.dit.forward_features, []
    next_chunk = Session.next_chunk
    monkeypatch.setattr(Session, "next_chunk", lambda self: made.append(next_chunk(self)) or made[-1])
    monkeypatch.setattr(pipe.engine.dit, "forward_features", lambda x, *args: rows.append(len(x)) or forward(x, *args))
    session = bench.session(bench.clip(5, 1), 0, PerChunk(counts), commit)
    run = play(lambda: EngineStream(session), 5)
    assert [c.steps for c in run.chunks] == counts and sum(rows) == sum(len(c.forwards) for c in run.chunks)
    commits, keys = [[], [3], [6], [9], [9]] if commit == "clean" else [[]] * 5, [3, 6, 9, 9, 9]
    assert [c.forwards for c in run.chunks] == [before + [k] * n for before, k, n in zip(commits, keys, counts)]
    for chunk, expected in zip(run.chunks, made, strict=True):
        copy = chunk.ms["copy"]
        assert chunk.ms == {s: expected.timings[s] for s in ("denoise", "commit", "decode")} | {"copy": copy}
        assert chunk.frames == 3 and copy > 0
    assert sum(c.total for c in run.chunks) <= run.wall and session.closed


def test_the_second_pass_takes_the_same_steps(pipe, embeds):
    counts = [2, 4, 1, 3, 2, 1]
    bench = Bench(pipe, [embeds], lambda scenario, clip: PerChunk([4, 4, 4, *counts]), 0)
    scenario = bench.steady(6, 1)
    run = bench.engine(bench.policy)(scenario, 0)
    assert scenario.skip == 3 and len(run.chunks) == 6
    assert [c.steps for c in run.chunks] == [c.steps for c in run.dit.chunks] == counts
    assert all(set(c.forwards) == {9} for c in run.chunks + run.dit.chunks)  # the window is full
    assert [len(c.forwards) - c.steps for c in run.chunks + run.dit.chunks] == [1] * 6 + [0] * 6
    assert run.frames == run.dit.frames == 18 and run.first_frame > 0
    assert pipe.engine._pools and all(pool.cache.in_use == 0 for pool in pipe.engine._pools.values())


def test_subjects_take_turns():
    order = []

    def subject(name):
        return lambda scenario, clip: order.append((name, clip)) or (name, clip)

    scenario = protocol.Scenario("clip", 2, 2, 1, 0, 9, 3)
    seen = []
    runs, whole = protocol.interleaved(
        {"a": subject("a"), "b": subject("b")}, scenario, report=lambda runs: seen.append(sum(runs["b"], []))
    )
    assert whole and len(seen) == 8 and seen[1] == [("b", 0)] and seen[-1] == [("b", 0), ("b", 1)] * 2
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 2
    assert runs["b"] == [[("b", 0), ("b", 1)]] * 2


def test_no_run_is_begun_that_would_end_after_the_limit(monkeypatch):
    """The slow one's second run does not fit any more, the quick one's does; what was made is kept."""
    now, took = [0.0], {"slow": 6.0, "quick": 1.0}

    def subject(name):
        def made(scenario, clip):
            now[0] += took[name]
            return name, clip

        return made

    monkeypatch.setattr(Limit, "left", lambda self: 10.0 - now[0])
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    scenario = protocol.Scenario("clip", 3, 1, 1, 0, 9, 3)
    runs, whole = protocol.interleaved({name: subject(name) for name in took}, scenario, Limit())
    assert not whole and runs == {"slow": [[("slow", 0)]], "quick": [[("quick", 0), ("quick", 1), ("quick", 2)]]}


def test_a_share_of_a_limit_begins_with_it():
    assert Limit().share(0.5).left() == float("inf")
    whole = Limit(1000.0)
    assert whole.until - whole.share(0.25).until == pytest.approx(750.0)


@pytest.mark.parametrize("histogram", [(0.2, 0.3, 0.3, 0.2), (0.1, 0.15, 0.55, 0.2), (0, 1), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("count", [1, 7, 35, 1000])
def test_drawn_steps_have_their_shares(histogram, count):
    steps = sample_step_counts(histogram, count, seed=3)
    taken = Counter(steps)
    assert len(steps) == count and set(taken) <= {n for n, share in enumerate(histogram, 1) if share}
    assert all(abs(taken[n] - share * count) < 1 for n, share in enumerate(histogram, 1))
    assert steps == sample_step_counts(histogram, count, seed=3)
    if count == 1000 and len(set(steps)) > 1:
        assert steps != sorted(steps) and steps != sample_step_counts(histogram, count, seed=4)
        first = Counter(steps[:500])  # not in order: half of them is much like all
        assert all(abs(first[n] - share * 500) < 70 for n, share in enumerate(histogram, 1))


def test_a_scenario_has_the_histogram_and_its_clips_the_rest():
    policy = histogram_policy((0.2, 0.3, 0.3, 0.2), 4, seed=0)
    scenario = protocol.Scenario("steady", 5, 1, 8, 3, 9, None)
    counts = [policy(scenario, clip).counts for clip in range(5)]
    assert all(c[:3] == [4, 4, 4] and len(c) == 11 for c in counts)
    assert Counter(n for c in counts for n in c[3:]) == {1: 8, 2: 12, 3: 12, 4: 8}
    assert len({tuple(c) for c in counts}) > 1


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.2, 0.2, 0.2, 0.2, 0.2), (1.5, -0.5)])
def test_histograms_that_are_none(shares):
    with pytest.raises(ValueError, match="shares of at least 0 whose sum is 1, of chunks with 1 to 4 steps"):
        histogram_policy(shares, 4, 0)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_a_histogram_is_read_as_it_is_written(shares, gone):
    shares = [round(share, 3) * (n not in gone) for n, share in enumerate(shares[:-1])] + [round(shares[-1], 3)]
    assert parse_histogram(format_histogram(shares)) == pytest.approx(shares)
    backwards = ",".join(reversed(format_histogram(shares).removeprefix("histogram:").split(",")))
    assert parse_histogram(f"histogram:{backwards}") == pytest.approx(shares)
    assert parse_histogram(",".join(map(str, shares))) == pytest.approx(shares)


def test_what_does_not_come_out_even_takes_rather_more_steps():
    assert sorted(sample_step_counts((0.2, 0.3, 0.3, 0.2), 7, 0)) == [1, 2, 2, 3, 3, 4, 4]
    assert np.mean(sample_step_counts((0.2, 0.3, 0.3, 0.2), 14, 0)) == 2.5  # the two clips of the GPU suite
    assert sample_step_counts((0.5, 0.5), 1, 0) == [2]


@pytest.mark.parametrize("frames", roofline.KEY_FRAMES)
def test_flop_of_a_run_are_those_of_its_forwards(pipe, frames):
    sizes = roofline.Sizes(pipe.engine.dit.config, 64, 64)
    rows = roofline.rows(sizes)
    forward = sum(roofline.total(roofline.forward(rows, "bf16", frames), "bf16", {}).flop.values())
    step = sum(r.flop for r in rows if r.op == "epilogue")
    counted = breakdown.Work(pipe)
    ms = {"denoise": 10.0, "commit": 10.0, "decode": 980.0}
    run = Run([Chunk(2, 3, [frames] * 3, ms)], 1000.0, 1000.0, 0.0)
    assert counted(run) == pytest.approx(3 * forward + 2 * step)
    rate = counted.rate([[run]], peak=2e-6)
    assert rate["tflops"] == pytest.approx(counted(run) / 0.02 / 1e12)
    assert rate["of_product"] == pytest.approx(rate["tflops"] / 2e-6) and rate["of_sheet"] is None


@pytest.mark.parametrize("vae", list(protocol.VAES))
def test_random_models_are_whole_on_their_device(vae):
    """With every buffer: the Wan VAE's mean and deviation once stayed on the CPU, which no GPU can multiply with."""
    engine = random_pipeline("wan2.1-t2v-1.3b", "meta", vae).engine
    tensors = [x for part in (engine.dit, engine.head, engine.decoder) for x in (*part.parameters(), *part.buffers())]
    assert len(tensors) > 800 and {x.device.type for x in tensors} == {"meta"}


def test_streams_at_a_time_are_those_of_a_runner(pipe, embeds, monkeypatch):
    """All stay until the slowest is done; only chunks after every window is full are counted."""
    made, closed = [], []
    real = Session.finish
    monkeypatch.setattr(Session, "finish", lambda self: made.append(real(self)) or made[-1])
    monkeypatch.setattr(Session, "close", lambda self, close=Session.close: closed.append(self) or close(self))
    bench = Bench(pipe, [embeds], lambda scenario, clip: Fixed(1 + clip), 0)
    scenario = bench.steady(3, 2)
    found = concurrency.concurrent(bench, scenario)
    counts = Counter(chunk.steps for chunk in made)
    assert scenario.skip == 3 and counts[2] == 3 + 3 < counts[1]  # the one of two steps is the slower one
    assert found["chunks"] < len(made) and found["sessions"] == 2 == len(closed)
    assert all(pool.cache.in_use == 0 for pool in pipe.engine._pools.values())


def test_figures_of_streams():
    found = concurrency.figures([(100.0, 3), (200.0, 3), (300.0, 3), (190.0, 3)], wall=2.0, sessions=2)
    assert (found["fps"], found["a_stream"], found["chunks"]) == (6.0, 3.0, 4)
    assert found["chunk_ms"] == {"p50": 195.0, "p95": pytest.approx(285), "p99": pytest.approx(297), "max": 300.0}
    assert found["missed"] == {"16": 3, "24": 3, "30": 3}  # 187.5, 125 and 100 ms


def test_a_random_pipeline_is_that_of_its_family():
    pipe = random_pipeline("shapes", "cpu", None)
    assert pipe.engine.head is not None and pipe.engine.text is None and not pipe.engine.dit.training
    assert pipe.engine.dit.dtype == torch.float32 and pipe.config.window == 9


def test_the_public_model_has_its_true_sizes():
    """Nothing is allocated: 81 frames are 7 chunks, 4 steps and the commit of one at a full window 5 x 40.4 TFLOP."""
    pipe = random_pipeline("wan2.1-t2v-1.3b", "meta", None)
    assert protocol.clip_chunks(pipe) == 7 and type(pipe.engine.decoder).__name__ == "WanVAE"
    assert sum(p.numel() for p in pipe.engine.dit.parameters()) == pytest.approx(1.419e9, rel=1e-3)
    full = Run([Chunk(4, 12, [21] * 5, {})], 0.0, 0.0, 0.0)
    assert breakdown.Work(pipe)(full) / 1e12 == pytest.approx(5 * 40.4, rel=2e-3)
    assert Bench(pipe, [], None, 0).steady(40, 1).window == 21
