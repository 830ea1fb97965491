"""The parts of the kernel benchmark: poisoned inputs, the backends that are asked for, what the results come to."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks.micro import backends, inputs, roofline, summary
from dsa_engine.config import ModelConfig
from dsa_engine.ops import RowwiseFP8, dispatch, reference

SIZES = roofline.Sizes(ModelConfig.preset("wan2.1-t2v-1.3b"), 480, 832)
ROWS = roofline.rows(SIZES)
SMALL_SIZES = roofline.Sizes(ModelConfig.preset("shapes"), 64, 64)
SMALL_ROWS = roofline.rows(SMALL_SIZES)


def row_of(name: str, rows=SMALL_ROWS) -> roofline.Row:
    return next(r for r in rows if r.name == name)


def test_reading_what_is_not_valid_shows():
    row = row_of("attention kv 48")
    args = inputs.poison_unused(row, inputs.inputs(row, SMALL_SIZES, "cpu", 0))
    q, k_cache, v_cache, slot, _, _ = args
    one_more = torch.tensor([[[0, row.frames + 1]]])
    expected = inputs.reference_fp32(row, args, backends.plain_torch(row))
    assert inputs.relative_error([reference.attention(*args).float()], expected) < 0.01
    assert not inputs.relative_error([reference.attention(q, k_cache, v_cache, slot, one_more)], expected) < 1


def test_distance_is_that_of_the_worst_output():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert inputs.relative_error([a, b], [a, a]) == pytest.approx(0.1)
    assert not inputs.relative_error([a, torch.tensor([3.0, float("nan")])], [a, a]) < 1e9


def test_rowwise_outputs_are_judged_as_what_they_stand_for():
    row = row_of("gelu_bias fp8")
    (x, bias, fp8) = inputs.inputs(row, SMALL_SIZES, "cpu", 0)
    right = reference.gelu_bias(x, bias, fp8)
    wrong = RowwiseFP8(right.values, right.scale * 1.2)
    expected = inputs.reference_fp32(row, (x, bias, fp8), backends.plain_torch(row))
    assert (
        inputs.relative_error(expected, [F.gelu(x.double() + bias.double(), approximate="tanh")]) < 1e-6
    )  # not rounded
    assert inputs.relative_error(inputs.outputs(row, (), right), expected) < 0.03
    assert inputs.relative_error(inputs.outputs(row, (), wrong), expected) > 0.15


def test_the_ops_without_a_kernel_are_those_that_have_none():
    missing = {
        op
        for op, stem in dispatch.GROUP_OF.items()
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
    assert found.keys() == dispatch.GROUP_OF.keys()
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


def test_choices_and_sums():
    rows = [row_of(name, ROWS) for name in ("attention kv 4680", "attention kv 18720", "modulate")]
    times = {"torch": (90, 90, 9), "triton": (30, 70, 8), "cuda": (20, None, None), "cudnn": (10, 75, None)}
    results = [
        {"row": r.name, "backend": b, "us": us[i]} for b, us in times.items() for i, r in enumerate(rows) if us[i]
    ]
    found = summary.choices(rows, results)
    assert found["attention"]["backend"] == "triton" and found["attention"]["us"] == 100
    assert found["attention"]["lead"] == pytest.approx(1.8)  # cuda has not done every row
    assert found["attention"]["fastest"] == {"attention kv 4680": "cudnn", "attention kv 18720": "triton"}
    assert found["modulate"]["backend"] == "triton"
    one = [{"row": r.name, "backend": "torch", "us": 1000.0} for r in ROWS if r.frames in (None, 12)]
    (bf16, fp8) = summary.measured_forwards(ROWS, SIZES, one, ["torch"])
    assert (bf16["kv"], bf16["products"], bf16["attention"]) == (18720, 180, 30)
    assert bf16["elementwise"] == 30 * 2 + 89 + 1 + 1 and fp8["elementwise"] == bf16["elementwise"] + 30 + 60


def test_twins_do_the_same_in_both_precisions():
    """The fastest of each; where bfloat16 has GELU in its GEMM, FP8 has that of its own op added."""
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
    assert set(times) <= {r.name for r in ROWS}
    results = [{"row": row, "backend": b, "us": us} for row, of in times.items() for b, us in of.items()]
    found = summary.twins(ROWS, results, backends.BACKENDS)
    assert {name: (p["fp8"], p["bf16"], p["goal"]) for name, p in found.items()} == {
        "attention kv 4680 fp8": ("cuda", "cudnn", True),
        "fp8_linear o fp8": ("scaled_mm", "torch", True),
        "fp8_linear up fp8": ("triton", "torch", True),
    }
    assert [p["times"] for p in found.values()] == pytest.approx([2.0, 100 / 60, 1.5])
    ours = summary.twins(ROWS, results, backends.DISPATCHED)
    assert ours["attention kv 4680 fp8"]["times"] == pytest.approx(100 / 60)
    assert not ours["fp8_linear o fp8"]["goal"] and ours["fp8_linear o fp8"]["times"] == pytest.approx(1.2)
    assert summary.twins(ROWS, [r for r in results if r["row"] != "gelu_bias fp8"], ["triton", "torch"]).keys() == {
        "fp8_linear o fp8"
    }
