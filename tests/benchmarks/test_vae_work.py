"""The plan of the VAE's decode: its FLOP are torch's own count, its bytes those of the tensors that the ops touch."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernels, plain_vae, vae_decode, vae_work
from benchmarks.common.limit import UNFINISHED
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import reference

SIZES = [(60, 104, 3), (8, 12, 2)]


def on_meta(height, width, frames):
    """A VAE in bfloat16, a chunk, and the state before it."""
    with torch.device("meta"):
        vae = WanVAE().to("meta", torch.bfloat16).requires_grad_(False).lay_out()
        chunk = torch.empty(1, frames, 16, height, width, dtype=torch.bfloat16)
        with torch.no_grad():
            _, state = vae.decode(chunk)
    return vae, chunk, state


def touched(tensor: torch.Tensor) -> int:
    """Bytes of memory under a tensor: what is repeated counts once."""
    return tensor.itemsize * math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step)


class Traffic(TorchDispatchMode):
    """Bytes read and written by ops that are neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def add(self, *tensors):
        self.bytes += sum(map(touched, tensors))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        name = func.overloadpacket.__name__
        storages = {t.untyped_storage()._cdata for t in given}
        if func._schema.is_mutable:
            self.add(*given)
        elif not name.startswith(("empty", "new_empty")):
            made = [t for t in made if t.untyped_storage()._cdata not in storages]
            self.add(*(given if made else ()), *made)
            if name == "convolution" and args[2] is not None:
                self.add(*made, *made)  # the bias, which cuDNN's convolution does not add
        return out


@pytest.fixture
def traffic(monkeypatch):
    """A counter, before which attention and the VAE's ops are one kernel each."""
    counter = Traffic()

    def norm_silu(x, gain, silu=True, bias=None, out=None):
        out = torch.empty_like(x) if out is None else out
        counter.add(x, out)
        return out

    def bias_residual(x, y, bias):
        counter.add(x, y, x)
        return torch.empty_like(x)

    def attention(q, k, v):
        counter.add(q, k, v, q)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    monkeypatch.setattr(reference, "norm_silu", norm_silu)
    monkeypatch.setattr(reference, "bias_residual", bias_residual)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return counter


@pytest.mark.parametrize("size", SIZES)
def test_flop_are_those_that_torch_counts(size):
    vae, chunk, state = on_meta(*size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(chunk, state)
    assert sum(part.flop for part in vae_work.layers(*size)) == counter.get_total_flops()


def test_a_chunk_is_40_65_tflop_as_planned_and_of_the_same_kinds():
    vae, chunk, state = on_meta(*SIZES[0])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(chunk, state)
    counts = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    parts = list(vae_work.layers(*SIZES[0]))
    assert sum(p.flop for p in parts if p.kind == "conv") == counts["aten.convolution"]
    assert sum(p.flop for p in parts if p.kind == "attention") == 3 * 4 * 384 * (60 * 104) ** 2
    assert sum(p.flop for p in parts) == pytest.approx(40.65e12, rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_the_tensors(size, traffic):
    """To what small vectors, gains and deviations weigh."""
    vae, chunk, state = on_meta(*size)
    traffic.bytes = 0
    with torch.no_grad(), traffic:
        vae.decode(chunk, state)
    now = sum(part.now for part in vae_work.layers(*size))
    assert traffic.bytes == pytest.approx(now, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_before_are_those_of_plain_torch(size, traffic):
    vae, chunk, state = on_meta(*size)
    state, traffic.bytes = [tail.contiguous() for tail in state], 0
    with torch.no_grad(), traffic:
        plain_vae.decode(vae, chunk, state)
    before = sum(part.before for part in vae_work.layers(*size))
    assert traffic.bytes == pytest.approx(before, rel=0.02)


def test_a_part_is_bound_by_its_products_or_its_bytes():
    conv = vae_work.Part("conv", "", flop=4 * 10**11, now=10, before=10)
    assert conv.ms("H100 SXM", conv.now) == pytest.approx(1.0)
    copy = vae_work.Part("past", "", flop=0, now=3_350_000_000, before=0)
    assert copy.ms("H100 SXM", copy.now) == pytest.approx(1 / 0.875)
    assert conv.ms("H200", 42 * 10**9) == pytest.approx(10.0)


def test_kernels_prints_the_plan_of_the_vae(capsys):
    assert kernels.main(["--plan"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["vae"]
    assert found["tflop"] == pytest.approx(40.65, rel=1e-3) and found["gb"]["now"] < found["gb"]["before"] / 3
    assert sum(row["flop"] for row in found["rows"]) == pytest.approx(1e12 * found["tflop"], rel=1e-3)
    for which in ("now", "before"):
        ms = sum(row[f"{which}_ms"]["H100 SXM"] for row in found["rows"])
        assert ms == pytest.approx(found["ms"][which]["H100 SXM"], rel=1e-3)
    assert {row["kind"] for row in found["rows"]} >= {"conv", "norm_silu", "attention", "past", "bias"}
    assert "VAE decode of a chunk" in out and "assumed" in out
    kernels.main(["--plan", "--model", "shapes"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["vae"] is None  # its codec is another


def test_the_three_ways_are_judged_by_float32(monkeypatch):
    """On a CPU the last one runs eagerly; a wrong one is seen."""
    shape = (1, 3, 16, 2, 3)
    results = list(vae_decode.judge(shape, "cpu", 0, 1e-3, dim=8))
    assert [r["backend"] for r in results] == ["eager", "channels_last", "graphed"]
    assert all(r["status"] == "ok" and 0 < r["error"] <= r["limit"] and r["us"] > 0 for r in results)
    decode = WanVAE.decode
    monkeypatch.setattr(WanVAE, "decode", lambda *args: (1.1 * decode(*args)[0], decode(*args)[1]))
    results = list(vae_decode.judge(shape, "cpu", 0, None, dim=8))
    assert [r["status"] for r in results] == ["ok", "wrong", "wrong"] and "us" not in results[0]


SMALL = "--height 16 --width 24 --dim 8 --seconds 0.001".split()


def failing(way, *_):
    raise RuntimeError(f"out of memory in {way}")


def test_each_way_is_saved_at_once_and_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    saved, whole = [], vae_decode.third
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vae_decode, "save", lambda result, path: saved.append(json.loads(json.dumps(result))))
    assert vae_decode.main([*SMALL, "--save", str(tmp_path / "vae.json")]) == 0
    assert [[r["backend"] for r in one["results"]] for one in saved] == [list(vae_decode.WAYS[:n]) for n in (1, 2, 3)]
    assert [one["unfinished"] for one in saved] == [True, True, False]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == saved[-1]
    middle = vae_decode.WAYS[1]
    monkeypatch.setattr(vae_decode, "third", lambda way, *rest: (failing if way == middle else whole)(way, *rest))
    assert vae_decode.main(SMALL) == 1
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [r["status"] for r in results] == ["ok", "failed", "ok"] and "out of memory" in results[1]["why"]


def test_a_way_that_does_not_fit_the_limit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vae_decode.main([*SMALL, "--limit", "0"]) == UNFINISHED
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {r["status"] for r in result["results"]} == {"skipped"} and result["unfinished"]
