"""The kernel benchmark's command: its plan, its verdicts on kernels that are known to be bad, limits and resuming."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import kernels
from benchmarks.common.isolation import WorkerDied
from benchmarks.common.limit import UNFINISHED, Limit, age
from benchmarks.micro import backends, measure, roofline
from dsa_engine.config import ModelConfig
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import dispatch, reference

SIZES = roofline.Sizes(ModelConfig.preset("wan2.1-t2v-1.3b"), 480, 832)
ROWS = roofline.rows(SIZES)
SMALL_SIZES = roofline.Sizes(ModelConfig.preset("shapes"), 64, 64)
SMALL_ROWS = roofline.rows(SMALL_SIZES)
MODULATE = next(row for row in SMALL_ROWS if row.name == "modulate")


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_plan(capsys, tmp_path):
    assert kernels.main(["--plan", "--save", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((tmp_path / "plan.json").read_text()) and "no GPU" not in out
    assert {"benchmark", "mode", "model", "height", "width", "date", "commit", "machine"} <= found.keys()
    assert found["mode"] == "plan" and found["not_timed"] == roofline.NOT_TIMED
    fields = {"op", "row", "precision", "flop", "read", "written", "calls", "bound", "floor_us", "expect_us"}
    assert all(fields == row.keys() and row["floor_us"].keys() == roofline.GPUS.keys() for row in found["plan"])
    forwards = {(f["precision"], f["kv"]): f for f in found["forward"]}
    assert len(forwards) == 6
    mean, full = forwards["bf16", 18720], forwards["bf16", 32760]
    assert mean["tflop"] == pytest.approx(28.3, abs=0.05) and full["tflop"] == pytest.approx(40.4, abs=0.05)
    # Without 120 ms for the VAE, these are the planned 385 and 493 ms a chunk of 4 steps, which had GELU by itself.
    gelu = 5 * 30 * 2 * 4680 * 8960 * 2 / roofline.PRACTICAL["H100 SXM"].memory * 1e3
    expected = [f["chunk_expect_ms"]["4"]["H100 SXM"] + gelu for f in (mean, full)]
    assert expected == pytest.approx([385 - 120, 493 - 120], rel=0.02)
    step = sum(row["floor_us"]["H200"] for row in found["plan"] if row["op"] in ("epilogue", "gaussian")) / 1e3
    assert mean["chunk_floor_ms"]["2"]["H200"] == pytest.approx(3 * mean["floor_ms"]["H200"] + 2 * step, rel=1e-4)


def test_sizes_of_other_models_and_videos(capsys):
    kernels.main(["--plan", "--model", "wan2.1-t2v-14b", "--height", "720", "--width", "1280"])
    found = last_line(capsys)
    qkv = next(row for row in found["plan"] if row["row"] == "linear qkv")
    assert qkv["flop"] == 2 * (3 * 45 * 80) * 5120 * 3 * 5120 and qkv["calls"]["bf16"] == 40
    with pytest.raises(ValueError, match="484x832"):
        kernels.main(["--plan", "--height", "484"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_plans_and_says_so(capsys):
    assert kernels.main(["--model", "shapes"]) == 0
    out = capsys.readouterr().out
    assert "no GPU here: this is the plan" in out and json.loads(out.splitlines()[-1])["mode"] == "plan"
    with pytest.raises(SystemExit, match="4680 tokens"):
        kernels.main(["--time"])


def test_wrong_arguments(capsys):
    for argv, said in ((["--ops", "nothing"], "must be of attention"), (["--backends", "magic"], "invalid choice")):
        with pytest.raises(SystemExit):
            kernels.main(argv)
        assert said in capsys.readouterr().err


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_whole_timing_path(on_cpu, monkeypatch, capsys):
    monkeypatch.setitem(backends.FLASH, "flash3", "no_such_package")
    argv = (
        "--time --model shapes --quick --ops modulate attention linear --backends torch sdpa cudnn triton cuda flash3"
    )
    assert kernels.main(argv.split()) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    results = {(r["row"], r["backend"]): r for r in found["results"]}
    assert {row for row, _ in results} >= {"attention kv 192", "modulate fp8", "linear qkv"} and found["mode"] == "time"
    assert "attention kv 48" not in {row for row, _ in results}  # --quick
    one = results["attention kv 192", "sdpa"]
    assert one["status"] == "ok" and one["clock"] == "cpu" and one["low"] <= one["us"] <= one["high"]
    assert one["tflops"] == pytest.approx(4 * 48 * 192 * 128 / one["us"] / 1e6, rel=1e-3)
    assert found["absent"]["triton"] == ["needs a CUDA device"] and ("modulate", "triton") not in results
    assert found["absent"]["flash3"][-1] == "no_such_package is not installed" and "no flash3: bfloat16" in out
    assert set(found["choice"]["cpu"]) == {"modulate", "modulate fp8", "attention", "attention fp8"}
    assert found["choice"]["cpu"]["attention"]["backend"] == "torch"  # what cannot be dispatched is only a bar
    assert found["ceilings"]["copy_gbs"] > 0 and "torch*" in out


def test_plain_torch_is_right_on_every_row(on_cpu, capsys):
    """Also that no row's poisoned inputs reach a right output."""
    assert kernels.main(["--check", "--model", "shapes", "--backends", "torch", "--seed", "3"]) == 0
    found = last_line(capsys)
    assert {r["row"] for r in found["results"]} == {r.name for r in SMALL_ROWS if r.op != "vae_decode"}
    assert all(r["status"] == "ok" and r["moved"] == 0 for r in found["results"]) and found["ceilings"] is None


def unwritten(x, shift, scale, eps, fp8):
    """As the reference but for the last row."""
    out = torch.empty_like(x)
    out[:, :-1] = reference.modulate(x, shift, scale, eps)[:, :-1]
    return out


def off(x, shift, scale, eps, fp8):
    return reference.modulate(x, shift, scale, eps) * 1.01


class Racing:
    """Right at first."""

    calls = 0

    def __call__(self, x, shift, scale, eps, fp8):
        self.calls += 1
        return reference.modulate(x, shift, scale, eps) * (1 if self.calls % 2 else 1.01)


def raising(*_):
    raise RuntimeError("no such kernel image\nand more")


@pytest.mark.parametrize(
    "kernel, status", [(unwritten, "wrong"), (off, "wrong"), (Racing(), "wrong"), (raising, "failed")]
)
def test_bad_kernels(kernel, status, on_cpu, monkeypatch, capsys):
    real = backends.resolve
    bad = {"triton": lambda row, device: kernel}
    monkeypatch.setattr(measure, "resolve", lambda n, row, d: bad[n](row, d) if n in bad else real(n, row, d))
    argv = "--time --model shapes --quick --ops modulate --backends triton torch".split()
    assert kernels.main(argv) == (status == "wrong")
    found = {(r["row"], r["backend"]): r for r in last_line(capsys)["results"]}
    assert found["modulate", "triton"]["status"] == status and "us" not in found["modulate", "triton"]
    assert found["modulate", "torch"]["status"] == "ok"  # it went on
    if status == "failed":
        assert found["modulate", "triton"]["why"] == "RuntimeError: no such kernel image"


QUICK = "--time --model shapes --quick --ops modulate --backends torch sdpa".split()


def test_a_limit_ends_the_run(on_cpu, capsys):
    assert kernels.main([*QUICK, "--limit", "1e-9"]) == UNFINISHED
    result = last_line(capsys)
    assert {r["status"] for r in result["results"]} == {"skipped"} and result["unfinished"]
    assert result["ceilings"]["status"] == "skipped" and result["choice"]["cpu"] == {}


def test_a_limit_counts_from_when_the_process_began():
    """Imports are in it."""
    code = "import time; time.sleep(0.5); from benchmarks.common.limit import Limit; print(Limit(100).left())"
    left = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert left < 99.6 and Limit().left() == float("inf") and not Limit().over(1e9)


def test_what_is_cut_off_by_the_limit_is_not_a_failure_of_the_backend():
    class Slow:
        def call(self, *_, seconds):
            time.sleep(seconds)
            raise WorkerDied("no answer")

    known = kernels.Progress()
    kernels.run(
        [measure.OpCase(MODULATE, SMALL_SIZES, "torch", "cpu", 0, None)],
        "cpu",
        Limit(0.1 + age()),
        Slow(),
        known,
    )
    assert known.results[0]["status"] == "skipped"


def test_every_result_is_saved_at_once_and_taken_up_again(on_cpu, monkeypatch, capsys, tmp_path):
    """Stopped in the middle, by no fault of its own; then only what was not there is timed."""
    path, judged, real = tmp_path / "kernels.json", [], measure.measure_op

    def dying(job):
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append((job.row.name, job.backend))
        return real(job)

    monkeypatch.setattr(kernels, "measure_op", dying)
    argv = [*QUICK[:4], "--backends", "torch", "--ops", "modulate", "gate_residual", "linear", "--save", str(path)]
    with pytest.raises(KeyboardInterrupt):
        kernels.main(argv)
    half = json.loads(path.read_text())
    assert half["unfinished"] and [(r["row"], r["backend"]) for r in half["results"]] == judged
    judged.clear()
    monkeypatch.setattr(kernels, "measure_op", lambda job: judged.append((job.row.name, job.backend)) or real(job))
    assert kernels.main([*argv, "--resume"]) == 0
    whole = json.loads(path.read_text())
    assert whole["results"][:3] == half["results"] and whole["ceilings"] == half["ceilings"] and not whole["unfinished"]
    assert judged and not set(judged) & {(r["row"], r["backend"]) for r in half["results"]}
    judged.clear()
    assert kernels.main([*argv, "--resume", "--seed", "1"]) == 0  # another question
    assert len(judged) == len(whole["results"]) and "of something else" in capsys.readouterr().err


def test_what_heavy_rows_take_is_known_first():
    args = kernels.parse_args(["--time", "--quick", "--backends", "torch"])
    order = [job.row for job in kernels.cases(args, ROWS, SIZES, "cuda")]
    assert order[0].name == "attention kv 18720" and {r.name for r in order} == {
        r.name for r in kernels.chosen(args, ROWS)
    }


@pytest.mark.parametrize("argv, refused", [("", True), ("--backends torch cudnn", False), ("--backends cuda", True)])
def test_kernels_are_not_timed_where_dispatch_could_not_run_them(argv, refused, monkeypatch):
    """As where the package was not built: a file of plain torch's figures would look like all others."""
    monkeypatch.setattr(dispatch, "choice", lambda op, device="cuda": dispatch.Choice("torch", "the reason"))
    args = kernels.parse_args(argv.split())
    with pytest.raises(SystemExit, match="nothing is timed") if refused else nullcontext():
        kernels.refuse(args, ROWS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "refuse", lambda *_: sys.exit("refused"))
    with pytest.raises(SystemExit, match="refused"):
        kernels.main(["--time"])


def test_a_run_survives_a_lost_worker(monkeypatch):
    todo = [measure.OpCase(MODULATE, SMALL_SIZES, backend, "cpu", 0, None) for backend in ("cuda", "torch")]

    class Weak:
        ended = 0

        def call(self, function, job, seconds):
            if job.backend == "cuda":
                raise WorkerDied("no answer in 90 s")
            return function(job) | {"broken": True}

        def end(self):
            self.ended += 1

    worker, known = Weak(), kernels.Progress()
    kernels.run(todo, "cpu", Limit(), worker, known)
    found = known.results
    assert [(r["status"], r.get("why")) for r in found] == [("failed", "no answer in 90 s"), ("ok", None)]
    assert worker.ended == 1 and "broken" not in found[1]


def test_the_ways_to_decode_are_judged_by_float32(on_cpu, monkeypatch, capsys):
    """Of the third chunk of a stream; on a CPU the graph's way runs eagerly. A wrong one is seen."""
    argv = "--model shapes --height 16 --width 16 --quick --ops vae_decode".split()
    assert kernels.main([*argv, "--time"]) == 0
    results = last_line(capsys)["results"]
    assert [r["backend"] for r in results] == ["torch", "channels_last", "graphed"]
    assert all(r["status"] == "ok" and 0 < r["error"] <= r["limit"] and r["us"] > 0 for r in results)
    decode = WanVAE.decode
    monkeypatch.setattr(WanVAE, "decode", lambda *args: (1.1 * decode(*args)[0], decode(*args)[1]))
    assert kernels.main([*argv, "--check"]) == 1
    assert [r["status"] for r in last_line(capsys)["results"]] == ["ok", "wrong", "wrong"]
