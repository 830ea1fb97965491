"""The FPS benchmark: its baseline against the engine, its counts against closed forms, its output whole."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fps
from benchmarks.common.limit import UNFINISHED, Limit
from benchmarks.e2e import breakdown, concurrency, protocol
from benchmarks.e2e.eager_baseline import Baseline, BaselineStream, ShiftedCache, difference, errors, fidelity
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

SIZE = (8, 8)
PROMPT = "a red circle jumps"


@pytest.fixture
def embeds(pipe):
    return pipe.engine.encode([PROMPT])


# The baseline


@pytest.mark.parametrize(
    "window, sink", [(9, 0), (8, 0), (3, 0), (9, 3), (8, 1), (-1, 0)], ids=lambda value: str(value)
)
def test_the_baseline_is_the_engine(untrained, window, sink):
    """Every window but the last rolls, by whole chunks and by parts of one; the prompt is padded."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", window=window, sink=sink)
    found = difference(pipe, Baseline(pipe), pipe.engine.encode([PROMPT])[:, :2], SIZE, 6)
    assert found["chunks"] == 6 and found["relative"] < 1e-4 and found["psnr_db"] > 90


@pytest.mark.parametrize("change", ["window", "noise", "commit", "prompt", "level"])
def test_a_baseline_that_does_something_else_shows(pipe, embeds, monkeypatch, change):
    baseline, other = Baseline(pipe), embeds
    if change == "window":
        monkeypatch.setattr(ShiftedCache, "roll", rolled_too_far)
    elif change == "noise":
        baseline.sigmas = (*baseline.sigmas[:-1], baseline.sigmas[-1] * 1.01)
    elif change == "commit":
        real = BaselineStream.forward
        monkeypatch.setattr(BaselineStream, "forward", lambda self, x, sigma: real(self, x, sigma) if sigma else None)
    elif change == "prompt":
        other = embeds[:, :3]
        theirs = baseline.model.text
        monkeypatch.setattr(baseline.model, "text", lambda _: theirs(embeds))
    else:
        monkeypatch.setattr(baseline.model, "_sinusoid", lambda t, real=baseline.model._sinusoid: real(t * 1.01))
    assert difference(pipe, baseline, other, SIZE, 6)["relative"] > 1e-3


def test_fidelity_is_measured_against_float32(untrained):
    """A bfloat16 model is some way from it, plain PyTorch in bfloat16 about as far; one that is wrong is far away."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", dtype=torch.bfloat16)
    embeds = pipe.engine.encode([PROMPT])
    found = fidelity(pipe, embeds, SIZE, 2)
    assert pipe.engine.dit.dtype == torch.bfloat16  # as before
    assert 25 < found["psnr_db"] < 80 and abs(found["psnr_db"] - found["eager"]["psnr_db"]) < 10
    ours = pipe.generate_latents

    def off(*args, **options):
        return ours(*args, **options) * 1.05

    pipe.generate_latents = off
    assert fidelity(pipe, embeds, SIZE, 2)["psnr_db"] < found["psnr_db"] - 3


def test_errors():
    found = errors(torch.tensor([4.0, 1.0, -1.0, 0.0]), torch.tensor([4.0, 0.0, 0.0, 0.0]))
    assert (found["max_abs"], found["relative"]) == (1.0, 0.25)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(16 / 0.5))
    assert errors(torch.ones(2), torch.ones(2))["psnr_db"] is None


@pytest.mark.parametrize("window", [9, -1])
def test_the_pools_of_both_regimes_are_captured(untrained, monkeypatch, window):
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


def rolled_too_far(self):
    """One frame of the past is lost."""
    evicted = max(0, self.filled + self.frames - self.window)
    for x in (x for kv in self.layers for x in kv):
        x[:] = x.roll(-(evicted + bool(evicted)) * self.tokens, dims=1)
    self.filled += self.frames - evicted


def test_a_difference_in_float32_ends_the_run(pipe, embeds):
    bench = Bench(pipe, [embeds], lambda scenario, clip: Fixed(2), 0)
    baseline = Baseline(pipe)
    assert fps.compared_chunks(bench, False) == 4 and fps.compared_chunks(bench, True) == 2  # of the model's clips
    assert fps.compared(bench, baseline, 4)["chunks"] == 4
    baseline.sigmas = baseline.sigmas[:-1]
    with pytest.raises(RuntimeError, match="not the baseline's"):
        fps.compared(bench, baseline, 2)


def test_the_baseline_has_no_sink_that_moves(untrained):
    pipe = Pipeline.from_pretrained(untrained, device="cpu", sink=3, rope="relative")
    with pytest.raises(ValueError, match="never moves"):
        Baseline(pipe)


def test_a_baseline_stream_ends_with_no_commit(pipe, embeds):
    stream = BaselineStream(Baseline(pipe), embeds, 9, SIZE, chunks=4)
    chunks = play(lambda: stream, 4).chunks
    assert [c.forwards for c in chunks] == [[3] * 5, [6] * 5, [9] * 5, [9] * 4]
    assert all(list(c.ms) == ["denoise", "commit", "decode", "copy"] and c.frames == 3 for c in chunks)


# What is recorded


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


# Steps that are drawn


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


def test_a_regime_has_the_histogram_and_its_clips_the_rest():
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


# The whole


def output(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


FIELDS = """model device quantization vae policy regime fps first_frame_ms chunk_ms mean_steps steps_histogram
    decision_us fixed steady baseline ops memory machine versions commit threshold rate cold warmup_s timeline missed
    real_time product histogram fidelity""".split()


def check_row(row: dict) -> None:
    assert list(row["fps"]) == ["dit", "dit_commit", "decode", "delivered"] and min(row["fps"].values()) > 0
    assert list(row["chunk_ms"]) == ["p50", "p95", "p99", "max"]
    assert all(low <= high for low, high in pairwise(row["chunk_ms"].values())) and row["chunk_ms"]["p50"] > 0
    assert sum(row["steps_histogram"].values()) == row["chunks"]
    assert row["mean_steps"] == pytest.approx(
        sum(int(n) * count for n, count in row["steps_histogram"].items()) / row["chunks"], rel=1e-4
    )
    assert all(0 <= missed <= row["deadlines"] for missed in row["missed"].values())
    assert 0.5 < row["clock"]["stages_over_wall"] <= 1.0001  # the same clock, between whose marks nothing else is done


def test_the_benchmark_says_everything(untrained, tmp_path, capsys):
    save, plot = tmp_path / "new" / "fps.json", tmp_path / "fps.png"
    argv = "--quick --frames 12 --steady-chunks 4 --policy confidence:0.5".split()
    fps.main(["--model", str(untrained), *argv, "--save", str(save), "--plot", str(plot)])
    result = output(capsys)
    assert result.keys() >= set(FIELDS) and json.loads(save.read_text()) == result
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and plot.stat().st_size > 10_000
    assert (result["model"], result["weights"], result["device"]) == ("untrained", "trained", "cpu")
    assert (result["vae"], result["policy"], result["threshold"]) == ("PixelCodec", "confidence:0.5", 0.5)
    assert result["clips"] == {"frames": 12, "chunks": 4, "clips": 1, "rounds": 1} and result["chunks"] == 4
    steady, eager = result["steady"], result["baseline"]["eager"]
    for row in (result, steady, eager, *result["fixed"].values(), steady["fixed"]["4"], steady["baseline"]["eager"]):
        check_row(row)
    assert list(result["fixed"]) == ["1", "2", "3", "4"] and list(steady["fixed"]) == ["4"]
    assert all(row["steps_histogram"] == {n: 4} for n, row in result["fixed"].items())
    assert eager["steps_histogram"] == {"4": 4} and eager["same"]["relative"] < 1e-4
    assert eager["ratio"].keys() == steady["baseline"]["eager"]["ratio"].keys() == {"policy", "fixed"}
    assert result["decision_us"] > 0 and result["first_frame_ms"] > 0 and result["cold"] is None
    assert result["histogram"] is None and result["fidelity"]["chunks"] == 2 and result["fidelity"]["psnr_db"] > 90
    assert result["warmup_s"]["capture"] == 0
    assert result["timeline"]["clip"]["policy"]["kv_frames"] == [3, 6, 9, 9]
    assert result["timeline"]["steady"]["eager"]["kv_frames"] == [9] * 4 and steady["kv_frames"] == 9
    assert set(result["ops"]) == {"attention", "products", "elementwise", "vae"} and min(result["ops"].values()) > 0
    assert min(result["memory"].values()) > 0 and result["machine"]["threads"] == 1


def test_what_the_limit_leaves_is_saved_and_said(untrained, tmp_path, capsys, monkeypatch):
    """Stopped ever later it has ever more; killed, what it had is in the file."""
    argv = ["--model", str(untrained), *"--quick --frames 6 --steady-chunks 2 --policy fixed:2 --counts 2".split()]
    path, questions, before = tmp_path / "fps.json", [0], set()
    argv += ["--save", str(path)]
    monkeypatch.setattr(Limit, "left", lambda self: questions.append(questions.pop() - 1) or float(questions[0]))
    for asked in (0, 3, 5, 8, 99):  # how often there is time left
        questions[0] = asked
        code = fps.main(argv)
        result = output(capsys)
        assert (code == UNFINISHED) == result["unfinished"] == (asked < 99)
        assert json.loads(path.read_text()) == result and result.keys() >= before
        before = set(result)
    assert list(result["fixed"]) == ["2", "4"] and set(result["backends"].values()) == {"torch"}

    def dies(*_):
        raise KeyboardInterrupt

    questions[0] = 99
    monkeypatch.setattr(fps, "decision_us", dies)
    with pytest.raises(KeyboardInterrupt):
        fps.main(argv)
    half = json.loads(path.read_text())
    assert half["unfinished"] and half["steady"]["baseline"]["eager"]["fps"]["decode"] > 0 and "fidelity" not in half


def test_a_backend_that_was_not_asked_for_is_not_timed(untrained, monkeypatch):
    monkeypatch.setenv("DSA_BACKEND", "triton")
    with pytest.raises(SystemExit, match="asked for triton, got torch"):
        fps.main(["--model", str(untrained), "--quick"])


def test_random_weights_and_a_histogram(capsys, monkeypatch):
    """Without a compiler there is no compiled baseline, and it is said why."""

    def uncompiled(function, dynamic):
        def fails(*_):
            raise RuntimeError("no compiler here\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setitem(protocol.PRESETS, "shapes", replace(protocol.PRESETS["shapes"], num_layers=1))
    argv = "--model shapes --random-weights --quick --frames 6 --clips 5 --steady-chunks 2 --baseline eager compile"
    fps.main(argv.split())
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["policy"] == "histogram:1=0.2,2=0.3,3=0.3,4=0.2" and result["threshold"] is None
    assert result["steps_histogram"] == {"1": 2, "2": 3, "3": 3, "4": 2} and result["mean_steps"] == 2.5
    assert result["histogram"] == [0.2, 0.3, 0.3, 0.2]
    assert (result["weights"], result["prompts"]) == ("random", "random")
    assert result["baseline"]["compile"] == {"skipped": "RuntimeError: no compiler here"}
    assert "no baseline compile: RuntimeError: no compiler here" in out
    assert list(result["steady"]["baseline"]) == ["eager"]


def test_fp8_beside_a_baseline_of_the_plain_weights(untrained, capsys):
    """The baseline is not quantised, so their latents differ, by rounding; and three streams at a time."""
    argv = "--quick --frames 6 --steady-chunks 2 --policy fixed:2 --quantization fp8 --sessions 3".split()
    fps.main(["--model", str(untrained), *argv])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    same = result["baseline"]["eager"]["same"]
    assert result["fidelity"]["eager"]["relative"] < 1e-5 < 1e-4 < result["fidelity"]["relative"] < 0.3
    assert result["quantization"] == "fp8" and 1e-4 < same["relative"] < 0.3 and "\nconcurrent: {" in out
    found = result["concurrent"]
    assert (found["sessions"], found["kv_frames"], found["chunks"]) == (3, 9, found["chunks"]) and found["chunks"] >= 6
    assert found["fps"] == pytest.approx(3 * found["a_stream"], rel=1e-4)


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


def test_a_failure_of_any_other_subject_is_one():
    def fails(scenario, clip):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        fps.warm_up({"policy": fails}, None)


def test_the_fresh_process(untrained, capsys, monkeypatch):
    argv = ["--model", str(untrained), "--frames", "12", "--policy", "fixed:2"]
    fps.main([*argv, "--cold-child"])
    child = output(capsys)
    assert child.keys() == {"load_s", "first_frame_ms"} and min(child.values()) > 0

    def run(command, **options):
        assert command[1].endswith("fps.py") and command[2:] == [*argv, "--cold-child"]
        return subprocess.CompletedProcess(command, 0, "noise\n" + json.dumps(child))

    monkeypatch.setattr(subprocess, "run", run)
    found = fps.cold(argv)
    assert found.pop("process_s") > 0 and found == child


def test_defaults():
    usual, quick = fps.parsed([]), fps.parsed(["--quick"])
    assert (usual.model, usual.clips, usual.steady_chunks, usual.cold) == ("shapes", 5, 40, True)
    assert (quick.clips, quick.steady_chunks, quick.cold) == (1, 8, False)
    assert fps.parsed(["--quick", "--cold", "--clips", "2"]).cold and fps.parsed(["--baseline"]).baseline == []


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--random-weights", "--model", "nothing"], "must be one of"),
        (["--random-weights", "--vae", "nothing"], "must be one of wan, taehv"),
        (["--plot", "timeline.jpg"], "must end in .png"),
        (["--steps", "histogram:0.5,0.4"], "whose sum"),
        (["--steps", "histogram:1=0.5,1=0.5"], "name each number of steps once"),
        (["--steps", "histogram:1=0.5,2"], "must be STEPS=SHARE"),
        (["--steps", "histogram:5=1"], "with 1 to 4 steps"),
    ],
)
def test_wrong_arguments(argv, said):
    with pytest.raises(ValueError, match=said):
        fps.main([*argv, "--quick"])


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
