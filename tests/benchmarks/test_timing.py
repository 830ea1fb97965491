"""What the benchmarks share: clocks against a simulated GPU, the worker, and records."""

from __future__ import annotations

import json
import operator
import os
import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks.common import environment, timing
from benchmarks.common.cli import format_table
from benchmarks.common.isolation import Worker, WorkerDied


class Simulated:
    """Stands in for torch.cuda: every call below takes `cost` microseconds of a time that only it moves."""

    def __init__(self, costs):
        self.now, self.costs, self.calls, self.taped = 0.0, costs, 0, None

    def call(self):
        cost = self.costs[min(self.calls // 1000, len(self.costs) - 1)]
        self.calls += 1
        if self.taped is None:
            self.now += cost
        else:
            self.taped.append(cost)

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class Graph:
            def replay(self):
                gpu.now += sum(self.tape)

        class Stream:
            def wait_stream(self, other):
                pass

        @contextmanager
        def graph(one):
            gpu.taped = one.tape = []
            yield
            gpu.taped = None

        @contextmanager
        def stream(_):
            yield

        fake = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": Stream, "stream": stream}
        fake |= {"current_stream": Stream, "synchronize": lambda: None}
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("capture, name", [(True, "graph"), (False, "events")])
def test_a_gpu_clock_gives_the_time_of_one_call(capture, name, monkeypatch):
    gpu = Simulated([12.5])
    gpu.install(monkeypatch)
    found = timing.measure([gpu.call] * 7, timing.clock("cuda", capture), seconds=0.02)
    assert (found.us, found.low, found.high, found.again) == pytest.approx((12.5, 12.5, 12.5, 0), abs=1e-9)
    assert found.clock == name and found.repeats >= 2 * timing.MIN_REPEATS
    if capture:  # nothing is launched while it is timed
        assert gpu.calls == 7 * (timing.WARM + 1 + 23)


def test_again_sees_a_machine_that_slows_down(monkeypatch):
    spans = iter([100.0] + [100.0] * 5 + [130.0] * 5)

    class Clock(timing.CpuClock):
        def span(self, work):
            return next(spans)

    found = timing.measure([lambda: None] * 10, Clock(), seconds=0)
    assert found.again == pytest.approx(0.3) and found.us == pytest.approx(11.5)
    assert (found.low, found.high) == pytest.approx((10, 13))


def test_the_cpu_clock_counts_calls():
    done = []
    found = timing.measure([lambda: done.append(time.sleep(0.001))] * 2, timing.clock("cpu"), seconds=0)
    assert found.us >= 1000 and len(done) == 2 * (1 + 1 + 10) and found.clock == "cpu"


def test_a_lost_worker_is_replaced():
    with Worker() as worker:
        assert worker.call(operator.add, 2, 3, seconds=60) == 5
        with pytest.raises(WorkerDied, match="no answer in 0 s"):
            worker.call(time.sleep, 3600, seconds=0.2)
        with pytest.raises(WorkerDied, match="ended with code 7"):
            worker.call(os._exit, 7, seconds=60)
        assert worker.call(operator.add, 2, 4, seconds=60) == 6


def test_the_state_of_a_gpu():
    found = environment.gpu_state("580.159.03, 1755, 1980, 3201, 688.12, 700.00, 61, 0x0000000000000044")
    assert found == {
        "driver": "580.159.03",
        "sm_mhz": 1755,
        "sm_mhz_max": 1980,
        "memory_mhz": 3201,
        "power_w": 688.12,
        "power_limit_w": 700,
        "celsius": 61,
        "throttle": ["power cap", "thermal, hardware"],
    }
    assert environment.gpu_state("580, [N/A], 1, 1, 1, 1, 1, [N/A]")["throttle"] == "[N/A]"


def test_records(tmp_path):
    about = environment.machine()
    assert {"cpu", "threads", "python", "torch", "cuda", "cudnn", "triton", "gpu"} == about.keys()
    environment.save({"a": [1, None]}, tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"a": [1, None]}
    assert format_table([["a", "b"], ["long", "100"]]) == ["a       b", "long  100"]
