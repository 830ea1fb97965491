"""The smoke's loop on the device, on what stands in for CUDA graphs."""

from __future__ import annotations

import pytest

from benchmarks import smoke
from dsa_engine.engine import device_loop
from dsa_engine.engine.cuda_graphs import GraphRunner
from dsa_engine.engine.engine import Engine
from tests.support.cuda_stand_in import Cuda, patch


@pytest.fixture
def looped(monkeypatch):
    """looped(): what the smoke says of the small model, captured with its loops."""
    patch(Cuda(), monkeypatch)
    real = smoke.pipeline
    monkeypatch.setattr(smoke, "pipeline", lambda model, device, *rest: real(model, "cpu", *rest))

    def capture(engine, *, height, width, frames, config, loop_rows=1):
        inputs = engine._shared(engine._pool_shape(height, width, frames, config))
        inputs.graphs = GraphRunner(inputs, (1,), loop_rows=loop_rows)
        inputs.graphs.capture()

    monkeypatch.setattr(Engine, "capture", capture)
    args = smoke.parse_args(["loop", "--work", "nowhere"])
    return lambda: smoke.compare_loop(args, "cuda")


def test_the_loop_does_what_single_replays_do(looped):
    found = looped()
    assert found["status"] == "ok" and found["steps"][:2] == [4, 4] and found["steps"][-2:] == [1, 1]


def test_a_loop_that_makes_something_else_is_wrong(looped, monkeypatch):
    real = smoke.generate

    def off(rollout, by_host):
        made = real(rollout, by_host)
        return made if by_host else made._replace(latents=made.latents * 1.001)

    monkeypatch.setattr(smoke, "generate", off)
    assert looped()["status"] == "wrong"


def test_a_loop_that_was_dropped_is_absent(looped, monkeypatch):
    capture = Engine.capture
    monkeypatch.setattr(Engine, "capture", lambda engine, **given: capture(engine, loop_rows=0, **given))
    with pytest.raises(smoke.Absent, match="0 of 6 chunks"):
        looped()
    monkeypatch.setattr(device_loop, "unavailable", lambda: "no csrc")
    with pytest.raises(smoke.Absent, match="no csrc"):
        looped()
