"""The kernel benchmark: its counts against torch's own, its verdicts on kernels that are known to be bad."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernels
from benchmarks.common.isolation import WorkerDied
from benchmarks.common.limit import UNFINISHED, Limit, age
from benchmarks.micro import backends, inputs, measure, roofline
from dsa_engine import ops
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.ops import RowwiseFP8, dispatch, reference

WAN, SMALL = ModelConfig.preset("wan2.1-t2v-1.3b"), ModelConfig.preset("shapes")
WAN_ROWS = roofline.rows(roofline.Sizes(WAN, 480, 832))
SMALL_SIZES = roofline.Sizes(SMALL, 64, 64)
SMALL_ROWS = roofline.rows(SMALL_SIZES)


def row_of(name: str, rows=SMALL_ROWS) -> roofline.Row:
    return next(r for r in rows if r.name == name)


def nbytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, tuple) else 0


# What must be done


class Keys:
    """A past of `tokens` keys, for one forward on the meta device."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def attend(self, layer, q, k, v, gains, rope, eps):
        q, _ = ops.norm_rope(q, k, *gains, *rope, eps)
        keys = q.new_empty(1, q.shape[2], self.tokens, q.shape[3])
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, keys).transpose(1, 2).flatten(2)


def counted_forward(tokens: int) -> dict[str, float]:
    """TFLOP of Wan's forward over so many keys, as torch counts what the model's own code calls."""
    with torch.device("meta"), torch.no_grad():
        model = CausalDiT(dataclasses.replace(WAN, num_layers=1)).to(torch.bfloat16)
        text = model.text_kv(torch.empty(1, WAN.text_len, WAN.text_dim))
        latents, frames = torch.empty(1, 3, 16, 60, 104), torch.empty(1, 3, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(latents, torch.empty(1, 3), frames, text, Keys(tokens))
    found = counter.get_flop_counts()

    def of(module: str, *kinds: str) -> float:
        return sum(n for op, n in found[module].items() if str(op).endswith(kinds)) / 1e12

    inside, outside = "CausalDiT.blocks.0", WAN.num_layers - 1
    products = of("Global", "addmm", ".mm") + outside * of(inside, "addmm", ".mm")
    both = WAN.num_layers * of(inside, "bmm", "attention")
    cross = WAN.num_layers * of(f"{inside}.cross_attn", "bmm", "attention")
    return {"products": products, "attention": both - cross, "cross_attention": cross}


@pytest.mark.parametrize("frames, attention, all_of_it", [(3, 4.0, 16.2), (12, 16.2, 28.3), (21, 28.3, 40.4)])
def test_a_forward_does_what_the_model_calls(frames, attention, all_of_it):
    """The last two numbers are those that this project is planned with; clip mean and full window are 12 and 21."""
    for precision in roofline.PRECISIONS:
        found = roofline.total(roofline.forward(WAN_ROWS, precision, frames), precision, roofline.GPUS).flop
        tera = {name: flop / 1e12 for name, flop in found.items()}
        # the model's products hold the embeddings and the last layer, which the plan leaves out or counts apart
        assert tera == pytest.approx(counted_forward(frames * 1560), rel=1e-3)
        assert tera["products"] == pytest.approx(11.7, abs=0.05) and tera["attention"] == pytest.approx(
            attention, abs=0.06
        )
        assert sum(tera.values()) == pytest.approx(all_of_it, abs=0.06)


@pytest.mark.parametrize("row", WAN_ROWS, ids=lambda row: row.name)
def test_flop_of_a_row_are_what_torch_counts(row):
    s = roofline.Sizes(WAN, 480, 832)
    args = inputs.inputs(row, s, "meta", 0)
    call = backends.plain(row)
    if row.op in ("attention", "cross_attention"):  # the valid keys alone
        keys = torch.empty(1, row.keys or row.frames * s.S, s.H, s.config.head_dim, device="meta")
        args, call = (keys.new_empty(args[0].shape), keys, keys), backends.fused(None)
    if row.op == "gaussian":
        assert row.flop == 0  # its words come from numpy, which torch cannot count
        return
    with FlopCounterMode(display=False) as counter:
        call(*args)
    assert row.flop == counter.get_total_flops()


@pytest.mark.parametrize("row", WAN_ROWS, ids=lambda row: row.name)
def test_bytes_of_a_row_are_those_of_its_tensors(row):
    s = roofline.Sizes(WAN, 480, 832)
    args = inputs.inputs(row, s, "meta", 0)
    made = 4 * math.prod(args[3]) if row.op == "gaussian" else nbytes(backends.plain(row)(*args))
    if row.op == "norm_rope_append":  # the caches are written, not read
        caches = nbytes(args[8:10])
        assert caches == 2 * s.T * s.C * (1 if row.precision == "fp8" else 2)
        assert (row.read, row.written) == (nbytes(args) - caches, made + caches)
        return
    if row.op == "attention":
        q, k, v, slot, keys, scales = args
        scales = None if scales is None else scales[:2]  # the shift is not read
        args = (q, k[:, : row.frames], v[:, : row.frames], slot, keys, *(scales or ()))
    if row.op == "cross_attention":
        args = (args[0], *(x[:, : row.keys] for x in args[1:3]), *args[3:])
    assert (row.read, row.written) == (nbytes(args), made)


def test_elementwise_bytes_of_a_forward():
    """A stream of T x C numbers is 14.4 MB: 20 of them a block by the ops as they stand. GELU takes 83.9 MB twice, but
    as a part of its product nothing."""
    stream, wide, rope = 4680 * 1536 * 2, 4680 * 8960 * 2, 4680 * 128 * 4
    some = roofline.forward(WAN_ROWS, "bf16", 3)
    expected = 30 * (20 * stream + rope) + stream  # modulate and gate_residual share what one fused op does
    assert roofline.elementwise_bytes(some, "bf16") == pytest.approx(expected, rel=1e-3)
    by_itself = roofline.elementwise_bytes([row_of("gelu_bias fp8", WAN_ROWS)], "fp8")
    assert by_itself == pytest.approx(30 * 1.5 * wide, rel=1e-3)  # where what it makes is FP8
    # of LayerNorm (3), q, k, v and their append (6), the norm of cross-attention's queries (2), residuals (3): 7.3 GB
    fused = roofline.elementwise_bytes(roofline.in_epilogues(some, roofline.Sizes(WAN, 480, 832)), "bf16")
    assert fused == pytest.approx(30 * (3 * 2 + 6 + 2 + 3) * stream + 30 * rope, rel=1e-3)
    assert fused == pytest.approx(7.3e9, rel=0.02)


def test_floors_follow_from_the_datasheets():
    h100, h200 = roofline.GPUS["H100 SXM"], roofline.GPUS["H200"]
    full, norm = row_of("attention kv 32760", WAN_ROWS), row_of("modulate", WAN_ROWS)
    assert full.floor(h100) == full.floor(h200) == pytest.approx(4 * 4680 * 32760 * 1536 / 989e6)
    assert (full.bound(h100), norm.bound(h100)) == ("products", "bytes")
    assert norm.floor(h100) / norm.floor(h200) == pytest.approx(4.8 / 3.35)
    assert row_of("attention kv 32760 fp8", WAN_ROWS).floor(h100) == pytest.approx(full.floor(h100) * 989 / 1979)
    at_rates = roofline.Rates({"bf16": 1e12, "fp8": 1e12}, {"bf16": 2e12, "fp8": 2e12}, 1e15)
    assert full.floor(at_rates) == pytest.approx(full.flop / 2e6)  # attention has a rate of its own


def test_every_public_op_has_a_row_or_a_reason():
    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and not isinstance(getattr(ops, name), type)}
    timed = {r.op for r in WAN_ROWS}
    assert public == (timed - {"linear"}) | roofline.NOT_TIMED.keys() and not timed & roofline.NOT_TIMED.keys()
    assert len({r.name for r in WAN_ROWS}) == len(WAN_ROWS)
    both = ("norm_rope_append", "modulate", "residual_modulate", "gelu_bias", "attention")
    assert all({r.precision for r in WAN_ROWS if r.op == op} == {"bf16", "fp8"} for op in both)
    assert {r.what for r in WAN_ROWS if "attention" in r.op} == {
        "kv 4680",
        "kv 18720",
        "kv 32760",
        "keys 512",
        "used 60",
    }


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


# What it takes


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
    """Also that no row's hostile inputs reach a right output."""
    assert kernels.main(["--check", "--model", "shapes", "--backends", "torch", "--seed", "3"]) == 0
    found = last_line(capsys)
    assert {r["row"] for r in found["results"]} == {r.name for r in SMALL_ROWS}
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
    real = backends.contender
    bad = {"triton": lambda row, device: kernel}
    monkeypatch.setattr(measure, "contender", lambda n, row, d: bad[n](row, d) if n in bad else real(n, row, d))
    argv = "--time --model shapes --quick --ops modulate --backends triton torch".split()
    assert kernels.main(argv) == (status == "wrong")
    found = {(r["row"], r["backend"]): r for r in last_line(capsys)["results"]}
    assert found["modulate", "triton"]["status"] == status and "us" not in found["modulate", "triton"]
    assert found["modulate", "torch"]["status"] == "ok"  # it went on
    if status == "failed":
        assert found["modulate", "triton"]["why"] == "RuntimeError: no such kernel image"


def test_reading_what_is_not_valid_shows():
    row = row_of("attention kv 48")
    args = inputs.hostile(row, inputs.inputs(row, SMALL_SIZES, "cpu", 0))
    q, k_cache, v_cache, slot, _, _ = args
    one_more = torch.tensor([[[0, row.frames + 1]]])
    expected = inputs.truth(row, args)
    assert inputs.distance([reference.attention(*args).float()], expected) < 0.01
    assert not inputs.distance([reference.attention(q, k_cache, v_cache, slot, one_more)], expected) < 1


def test_distance_is_that_of_the_worst_output():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert inputs.distance([a, b], [a, a]) == pytest.approx(0.1)
    assert not inputs.distance([a, torch.tensor([3.0, float("nan")])], [a, a]) < 1e9


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

    known = kernels.Known()
    kernels.run(
        [measure.Job(row_of("modulate"), SMALL_SIZES, "torch", "cpu", 0, None)],
        "cpu",
        Limit(0.1 + age()),
        Slow(),
        known,
    )
    assert known.results[0]["status"] == "skipped"


def test_every_result_is_saved_at_once_and_taken_up_again(on_cpu, monkeypatch, capsys, tmp_path):
    """Stopped in the middle, by no fault of its own; then only what was not there is timed."""
    path, judged, real = tmp_path / "kernels.json", [], measure.judge

    def dying(job):
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append((job.row.name, job.backend))
        return real(job)

    monkeypatch.setattr(kernels, "judge", dying)
    argv = [*QUICK[:4], "--backends", "torch", "--ops", "modulate", "gate_residual", "linear", "--save", str(path)]
    with pytest.raises(KeyboardInterrupt):
        kernels.main(argv)
    half = json.loads(path.read_text())
    assert half["unfinished"] and [(r["row"], r["backend"]) for r in half["results"]] == judged
    judged.clear()
    monkeypatch.setattr(kernels, "judge", lambda job: judged.append((job.row.name, job.backend)) or real(job))
    assert kernels.main([*argv, "--resume"]) == 0
    whole = json.loads(path.read_text())
    assert whole["results"][:3] == half["results"] and whole["ceilings"] == half["ceilings"] and not whole["unfinished"]
    assert judged and not set(judged) & {(r["row"], r["backend"]) for r in half["results"]}
    judged.clear()
    assert kernels.main([*argv, "--resume", "--seed", "1"]) == 0  # another question
    assert len(judged) == len(whole["results"]) and "of something else" in capsys.readouterr().err


# What was asked for


def test_what_heavy_rows_take_is_known_first():
    args = kernels.parsed(["--time", "--quick", "--backends", "torch"])
    order = [job.row for job in kernels.jobs(args, WAN_ROWS, roofline.Sizes(WAN, 480, 832), "cuda")]
    assert order[0].name == "attention kv 18720" and {r.name for r in order} == {
        r.name for r in kernels.chosen(args, WAN_ROWS)
    }


def test_the_ops_without_a_kernel_are_those_that_have_none():
    missing = {
        op
        for op, stem in dispatch.STEM_OF.items()
        if not hasattr(importlib.import_module(f"dsa_engine.triton_kernels.{stem}"), op)
    }
    assert missing == set(backends.LEFT_TO_CUBLAS)


def dispatching(monkeypatch, **others):
    """ops.dispatch as if it ran Triton but for these ops."""
    usual = dict.fromkeys(backends.LEFT_TO_CUBLAS, "torch") | others
    monkeypatch.setattr(
        dispatch, "choice", lambda op, device="cuda": dispatch.Choice(usual.get(op, "triton"), "the reason")
    )


def test_a_backend_that_was_not_asked_for_is_refused(monkeypatch):
    dispatching(monkeypatch)
    found = backends.refuse_others("auto")
    assert found.keys() == dispatch.STEM_OF.keys()
    assert found["attention"] == "triton" and found["linear_gelu"] == "torch"
    assert backends.refuse_others("triton") == found
    with pytest.raises(SystemExit, match="of rms_norm, asked for torch, got triton: the reason"):
        backends.refuse_others("torch")
    with pytest.raises(SystemExit, match="of attention, asked for cuda, got triton"):
        backends.refuse_others("cuda", only=["pool_frames", "attention"])  # csrc has no pool_frames
    with pytest.raises(SystemExit, match="of attention, asked for cudnn, got triton"):
        backends.refuse_others("cudnn")
    dispatching(monkeypatch, attention="cudnn")
    assert backends.refuse_others("cudnn")["attention"] == "cudnn"
    dispatching(monkeypatch, epilogue="torch")
    for asked in ("auto", "triton"):
        with pytest.raises(SystemExit, match=f"of epilogue, asked for {asked}, got torch: the reason"):
            backends.refuse_others(asked)
    assert backends.refuse_others("auto", only=["modulate"]) == {"modulate": "triton"}


def test_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    def choice(op, device="cuda"):
        raise RuntimeError(f"DSA_BACKEND={os.environ['DSA_BACKEND']}: {op} cannot run here")

    monkeypatch.setattr(dispatch, "choice", choice)
    monkeypatch.setenv("DSA_BACKEND", "auto")
    with pytest.raises(SystemExit, match="asked for cuda, got none: DSA_BACKEND=cuda: rms_norm cannot run here"):
        backends.refuse_others("cuda")
    assert os.environ["DSA_BACKEND"] == "auto"


def test_on_a_cpu_there_is_plain_torch_alone():
    assert set(backends.refuse_others("auto", "cpu").values()) == {"torch"}
    with pytest.raises(SystemExit, match="asked for triton, got torch: the tensors are on a CPU"):
        backends.refuse_others("triton", "cpu")


@pytest.mark.parametrize("argv, refused", [("", True), ("--backends torch cudnn", False), ("--backends cuda", True)])
def test_kernels_are_not_timed_where_dispatch_could_not_run_them(argv, refused, monkeypatch):
    """As where the package was not built: a file of plain torch's figures would look like all others."""
    dispatching(monkeypatch, **dict.fromkeys(dispatch.STEM_OF, "torch"))
    args = kernels.parsed(argv.split())
    with pytest.raises(SystemExit, match="nothing is timed") if refused else nullcontext():
        kernels.refuse(args, WAN_ROWS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "refuse", lambda *_: sys.exit("refused"))
    with pytest.raises(SystemExit, match="refused"):
        kernels.main(["--time"])


def test_choices_and_sums():
    rows = [row_of(name, WAN_ROWS) for name in ("attention kv 4680", "attention kv 18720", "modulate")]
    times = {"torch": (90, 90, 9), "triton": (30, 70, 8), "cuda": (20, None, None), "cudnn": (10, 75, None)}
    results = [
        {"row": r.name, "backend": b, "us": us[i]} for b, us in times.items() for i, r in enumerate(rows) if us[i]
    ]
    found = kernels.choices(rows, results)
    assert found["attention"]["backend"] == "triton" and found["attention"]["us"] == 100
    assert found["attention"]["lead"] == pytest.approx(1.8)  # cuda has not done every row
    assert found["attention"]["fastest"] == {"attention kv 4680": "cudnn", "attention kv 18720": "triton"}
    assert found["modulate"]["backend"] == "triton"
    one = [{"row": r.name, "backend": "torch", "us": 1000.0} for r in WAN_ROWS if r.frames in (None, 12)]
    (bf16, fp8) = kernels.measured_forwards(WAN_ROWS, roofline.Sizes(WAN, 480, 832), one, ["torch"])
    assert (bf16["kv"], bf16["products"], bf16["attention"]) == (18720, 180, 30)
    assert bf16["elementwise"] == 30 * 2 + 89 + 1 + 1 and fp8["elementwise"] == bf16["elementwise"] + 30 + 60


def test_twins_do_the_same_in_both_precisions():
    """The fastest of each; where bfloat16 has GELU in its product, FP8 has that of its own op added."""
    times = {
        "attention kv 4680": {"cuda": 100, "cudnn": 90},
        "attention kv 4680 fp8": {"triton": 80, "cuda": 60},
        "linear o": {"torch": 30},
        "fp8_linear o fp8": {"triton": 25, "scaled_mm": 15},
        "linear_gelu up": {"torch": 100},
        "fp8_linear up fp8": {"triton": 40},
        "gelu_bias fp8": {"triton": 20},
        "linear qkv": {"torch": 50},
        "modulate": {"triton": 5},
        "modulate fp8": {"triton": 4},
    }
    assert set(times) <= {r.name for r in WAN_ROWS}
    results = [{"row": row, "backend": b, "us": us} for row, of in times.items() for b, us in of.items()]
    found = kernels.twins(WAN_ROWS, results, backends.BACKENDS)
    assert {name: (p["fp8"], p["bf16"], p["goal"]) for name, p in found.items()} == {
        "attention kv 4680 fp8": ("cuda", "cudnn", True),
        "fp8_linear o fp8": ("scaled_mm", "torch", True),
        "fp8_linear up fp8": ("triton", "torch", True),
    }
    assert [p["times"] for p in found.values()] == pytest.approx([2.0, 100 / 60, 1.5])
    ours = kernels.twins(WAN_ROWS, results, backends.DISPATCHED)
    assert ours["attention kv 4680 fp8"]["times"] == pytest.approx(100 / 60)
    assert not ours["fp8_linear o fp8"]["goal"] and ours["fp8_linear o fp8"]["times"] == pytest.approx(1.2)
    assert kernels.twins(WAN_ROWS, [r for r in results if r["row"] != "gelu_bias fp8"], ["triton", "torch"]).keys() == {
        "fp8_linear o fp8"
    }


def test_rowwise_outputs_are_judged_as_what_they_stand_for():
    row = row_of("gelu_bias fp8")
    (x, bias, fp8) = inputs.inputs(row, SMALL_SIZES, "cpu", 0)
    right = reference.gelu_bias(x, bias, fp8)
    wrong = RowwiseFP8(right.values, right.scale * 1.2)
    expected = inputs.truth(row, (x, bias, fp8))
    assert inputs.distance(expected, [F.gelu(x.double() + bias.double(), approximate="tanh")]) < 1e-6  # not rounded
    assert inputs.distance(inputs.outputs(row, (), right), expected) < 0.03
    assert inputs.distance(inputs.outputs(row, (), wrong), expected) > 0.15


def test_a_run_survives_a_lost_worker(monkeypatch):
    todo = [measure.Job(row_of("modulate"), SMALL_SIZES, backend, "cpu", 0, None) for backend in ("cuda", "torch")]

    class Weak:
        ended = 0

        def call(self, function, job, seconds):
            if job.backend == "cuda":
                raise WorkerDied("no answer in 90 s")
            return function(job) | {"broken": True}

        def end(self):
            self.ended += 1

    worker, known = Weak(), kernels.Known()
    kernels.run(todo, "cpu", Limit(), worker, known)
    found = known.results
    assert [(r["status"], r.get("why")) for r in found] == [("failed", "no answer in 90 s"), ("ok", None)]
    assert worker.ended == 1 and "broken" not in found[1]
