"""The FPS benchmark as a whole: its flags, its JSON object, what a limit leaves."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import fps
from benchmarks.common.limit import UNFINISHED, Limit
from benchmarks.e2e import protocol


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
