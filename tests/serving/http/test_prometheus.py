"""The metrics."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_engine.engine.chunk import Chunk
from dsa_engine.serving.http import prometheus
from dsa_engine.serving.types import ChunkReady, Closed, StreamRequest
from tests.support.fake_backend import TIMINGS
from tests.support.serving.http_client import ask, finished, metrics, served


def test_metrics_of_jobs(fresh, monkeypatch):
    monkeypatch.setattr(prometheus, "FPS_WINDOW_S", 1000.0)  # however long the jobs take
    before = metrics(fresh)
    assert before[("dsa_pressure",)] == 0.25 and before[("dsa_jobs", "completed")] == 0
    fresh.backend.faults = {(2, 0)}
    for seed in (1, 2):
        finished(fresh, ask(fresh, seed=seed).json()["id"])
    after = metrics(fresh)
    assert after[("dsa_jobs", "completed")] == after[("dsa_jobs", "failed")] == 1
    assert after[("dsa_frames_total", "job")] == 12 and after[("dsa_fps",)] == pytest.approx(0.012)
    assert after[("dsa_steps_count", "job")] == 4 and after[("dsa_steps_bucket", "job", "1.0")] == 0
    assert after[("dsa_steps_bucket", "job", "2.0")] == 4
    assert after[("dsa_chunk_seconds_sum", "denoise")] == pytest.approx(4 * TIMINGS["denoise"] / 1e3)
    assert after[("dsa_chunk_seconds_sum", "kv")] == pytest.approx(4 * TIMINGS["commit"] / 1e3)
    assert after[("dsa_chunk_seconds_count", "vae")] == 4
    assert after[("dsa_streams_closed_total", "job", "done")] == 1
    assert after[("dsa_streams_closed_total", "job", "failed")] == 1
    assert after[("dsa_chunk_latency_seconds_count",)] == 0


def test_metrics_of_live_streams(fresh):
    class Task:
        request = StreamRequest("possible")

    told = fresh.app.state.metrics
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    for latency, deadline in ((0.2, 0.5), (0.7, 0.5), (9.0, None)):
        told.observe(Task(), ChunkReady(Chunk(0, frames, None, 3, None, 0.0, TIMINGS, None), latency, deadline, 0.375))
    told.observe(Task(), Closed("idle"))
    told.phase("encode", 0.004)
    found = metrics(fresh)
    assert found[("dsa_deadline_misses_total",)] == 1
    assert found[("dsa_chunk_latency_seconds_bucket", "0.2")] == 1
    assert found[("dsa_chunk_latency_seconds_sum",)] == pytest.approx(9.9)
    assert found[("dsa_threshold",)] == 0.375
    assert found[("dsa_streams_closed_total", "live", "idle")] == 1
    assert found[("dsa_chunk_seconds_bucket", "0.005", "encode")] == 1


def test_two_apps_do_not_share_numbers(tmp_path):
    with served(tmp_path / "a") as a, served(tmp_path / "b") as b:
        finished(a, ask(a).json()["id"])
        assert metrics(a)[("dsa_jobs", "completed")] == 1 and metrics(b)[("dsa_jobs", "completed")] == 0
        assert ("dsa_frames_total", "job") not in metrics(b)
