"""The notes' table: that it is the plan's, that a run fills it, and what it refuses."""

from __future__ import annotations

import json

import pytest

from benchmarks import kernels, notes
from benchmarks.micro import roofline

FULL = 21


def row(fps: float, dit_commit: float = 30.0, dit: float = 40.0) -> dict:
    return {"fps": {"decode": fps, "dit_commit": dit_commit, "dit": dit}, "first_frame_ms": 123.4}


FPS = row(39.5) | {
    "model": notes.MODEL,
    "size": notes.SIZE,
    "machine": {"gpu": {"name": "a GPU"}},
    "decision_us": 21.0,
    "fixed": {"2": row(41.2), "4": row(31.2)},
    "steady": {"fixed": {"4": row(24.3, dit_commit=25.0)}},
    "ops": {"vae": 98.7},
}


def timed(us: float) -> dict:
    """Every row by two backends, the slower of them this project's own; one that dispatch may not pick is faster."""
    results = [
        {"row": r.name, "backend": backend, "us": us * factor}
        for r in notes.ROWS
        for backend, factor in (("torch", 1.0), ("triton", 2.0), ("cudnn", 0.5))
    ]
    forwards = kernels.measured_forwards(notes.ROWS, notes.SIZES, results, kernels.DISPATCHED)
    found = {"model": notes.MODEL, "height": 480, "width": 832, "machine": {"gpu": {"name": "a GPU"}}}
    return found | {"results": results, "measured_forward": {"dispatched": forwards}}


def table(*args) -> dict[str, tuple[str, ...]]:
    return {line[0]: line[1:] for line in notes.lines(*args)}


def test_the_notes_hold_the_plan():
    """Whoever changes the plan writes them anew: python benchmarks/notes.py."""
    text = notes.NOTES.read_text()
    assert notes.with_table(text, notes.table(None, None)) == text
    assert text.count(notes.NONE) == len(notes.lines(None, None))


def test_floors_and_predictions_are_the_plans():
    lines = table(None, None)
    floors = {r.name: r.floor(roofline.GPUS["H200"]) for r in notes.ROWS}
    assert float(lines["attention kv 32760"][2]) == pytest.approx(floors["attention kv 32760"], abs=0.5)
    plan = notes.planned(FULL)
    for n in (2, 4):  # what a chunk takes beside its decoding, and the sum as frames a second
        chunk = plan["chunk_expect_ms"][str(n)]["H100 SXM"]
        assert notes.chunk_ms(plan, "expect", n)["H100 SXM"] == chunk
    full = 12e3 / (plan["chunk_expect_ms"]["4"]["H100 SXM"] + 120 + 5 * 0.4)
    assert float(lines["fps, fixed 4, full window"][3].split("/")[0]) == pytest.approx(full, rel=0.005)
    halfway = notes.chunk_ms(plan, "floor", 2.5)["H200"]
    assert halfway == pytest.approx(sum(plan["chunk_floor_ms"][n]["H200"] for n in "23") / 2)
    assert "8.72 GB" in next(name for name in lines if name.startswith("elementwise"))


def test_a_run_fills_every_line():
    found = timed(10.0)
    lines = table(found, FPS)
    assert not [name for name, line in lines.items() if line[-1] == notes.NONE]
    assert lines["linear_gelu up"][-1] == "10.0 (torch)"  # not cudnn's, which dispatch cannot pick
    forward = found["measured_forward"]["dispatched"]
    full = next(f for f in forward if f["precision"] == "bf16" and f["kv"] == FULL * 1560)
    assert float(lines["gaps between launches, a forward"][-1]) == pytest.approx(12e3 / 25 / 5 - full["ms"], rel=0.01)
    assert float(lines["commit, a chunk, clip mean"][-1]) == pytest.approx(12e3 / 30 - 12e3 / 40, rel=0.01)
    assert [line[-1] for name, line in lines.items() if name.startswith("fps")] == ["31.2", "24.3", "41.2", "39.5"]
    assert lines["VAE, a chunk"][-1] == "98.7" and lines["decision, host asked"][-1] == "21"


def test_half_a_run_fills_half(tmp_path):
    path = tmp_path / "fps.json"
    path.write_text(json.dumps(FPS))
    notes.main(["--kernels", str(tmp_path / "nothing.json"), "--fps", str(path), "--to", str(tmp_path / "new.md")])
    text = (tmp_path / "new.md").read_text()
    assert "| 31.2 |" in text and 0 < text.count(notes.NONE) < len(notes.lines(None, None))
    assert text.split(notes.END)[1] == notes.NOTES.read_text().split(notes.END)[1]


@pytest.mark.parametrize("change", [{"model": "shapes"}, {"size": [64, 64]}, {"machine": {"gpu": None}}])
def test_figures_of_something_else_are_refused(tmp_path, change):
    path = tmp_path / "fps.json"
    path.write_text(json.dumps(FPS | change))
    with pytest.raises(ValueError, match="must be of wan2.1-t2v-1.3b"):
        notes.main(["--fps", str(path), "--to", str(tmp_path / "new.md")])
    with pytest.raises(ValueError, match="each once"):
        notes.with_table("no table", "")
