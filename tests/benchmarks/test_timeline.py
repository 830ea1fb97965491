"""Chunks whose times are known: their figures in closed form, and what is drawn of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.e2e.timeline import Chunk, Run, columns, figures, rates, ratio, stacked


def chunk(steps, frames, forwards, **ms) -> Chunk:
    """A chunk that took so many milliseconds per stage."""
    return Chunk(steps, frames, forwards, dict.fromkeys(("denoise", "commit", "decode", "copy"), 0.0) | ms)


def run_of(*chunks: Chunk, dit=None) -> Run:
    wall = sum(c.total for c in chunks)
    return Run(list(chunks), wall, wall / 2, first_frame=chunks[0].total + 5, dit=dit)


def test_rates_count_more_and_more():
    dit = run_of(chunk(2, 0, [3, 3], denoise=20), chunk(2, 0, [6, 6], denoise=30))
    one = chunk(2, 3, [3, 3], denoise=25, decode=5, copy=1)
    two = chunk(2, 3, [3, 6, 6], denoise=55, decode=12, copy=2)
    expected = {"dit": 6 / 0.05, "dit_commit": 6 / 0.08, "decode": 6 / 0.097, "delivered": 6 / 0.1}
    assert rates([run_of(one, two, dit=dit)]) == pytest.approx(expected)
    plain = run_of(chunk(4, 12, [3] * 5, denoise=40, commit=10, decode=25, copy=5))
    assert rates([plain, plain]) == pytest.approx({"dit": 300, "dit_commit": 240, "decode": 160, "delivered": 150})


def test_figures_of_known_chunks():
    spans = [50, 100, 200, 100, 300]
    runs = [run_of(*(chunk(n, 3, [3], denoise=ms - 1, copy=1) for n, ms in enumerate(spans, 1)))]
    found = figures([runs, runs], whole=True)
    assert found["chunk_ms"] == pytest.approx(
        {"p50": 150, "p95": 300, "p99": 300, "max": 300}
    )  # without the first: 100, 100, 200, 300, each twice
    assert found["first_frame_ms"] == pytest.approx(55)
    assert found["jitter_ms"] == pytest.approx(np.std([100, 100, 200, 300]))
    assert found["fps"]["delivered"] == pytest.approx(15 / 0.75)
    assert found["real_time"]["16"] == pytest.approx(20 / 16)
    assert found["missed"] == {"16": 4, "24": 4, "30": 4} and found["deadlines"] == 8  # 187.5, 125 and 100 ms
    assert found["steps_histogram"] == dict.fromkeys("12345", 2) and found["mean_steps"] == 3 and found["chunks"] == 10
    assert found["clock"]["stages_over_wall"] == pytest.approx(1)
    steady = figures([runs], whole=False)
    assert steady["first_frame_ms"] is None and steady["deadlines"] == 5
    slow = [run_of(chunk(1, 3, [3], denoise=3000))]
    assert figures([runs, slow, runs], whole=True)["fps"]["delivered"] == pytest.approx(20)  # the median round


def test_a_ratio_is_of_pairs():
    ours = [[run_of(chunk(1, 3, [3], denoise=ms)) for ms in row] for row in ([10, 20], [40, 10])]
    theirs = [[run_of(chunk(1, 6, [3], denoise=ms)) for ms in row] for row in ([20, 60], [400, 40])]
    assert ratio(ours, theirs) == pytest.approx({"median": 1.75, "low": 1, "high": 5, "processor": 1.75})


def test_the_commit_that_rides_along_is_shown_apart():
    def one(first, second, dit):
        dit = run_of(*(chunk(1, 0, [3], denoise=ms) for ms in dit))
        return run_of(chunk(1, 3, [3], denoise=first, decode=1), chunk(1, 3, [3, 6], denoise=second, decode=1), dit=dit)

    table = columns([[one(10, 30, (9, 10)), one(10, 30, (2, 5)), one(10, 30, (8, 18))]])
    assert table["kv_frames"] == [3, 6] and table["riding"] == pytest.approx([0, 20])  # the first chunk has none
    parts = stacked(table)
    assert list(parts) == ["denoise", "commit", "decode", "copy"]
    assert parts["denoise"] == pytest.approx([10, 10]) and parts["commit"] == pytest.approx([0, 20])
    below = columns([[one(10, 3, (9, 10))]])
    assert below["riding"] == [0, 0] and stacked(below)["denoise"] == pytest.approx([10, 3])  # noise
