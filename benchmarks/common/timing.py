"""Clocks for work on a CPU or a GPU with one interface: medians of repeats, and how far two rounds of the same differ.

    timing = measure([lambda: f(a1), lambda: f(a2)], clock(device))        # one function on several sets of inputs
    timing.us, timing.low, timing.high, timing.again

The calls take turns, so inputs that together are larger than the cache come from memory each time. On a GPU a batch of
turns is captured as a CUDA graph, whose replay is timed with events: launch gaps all but vanish, as they do in the
engine. What cannot be captured is timed with events round plain calls, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

Call = Callable[[], object]

WARM = 3  # calls of each before anything is timed
BATCH_US = 2000.0  # of a batch: the event pair and the launch of a graph then weigh under one percent
MAX_TURNS = 100
ROUNDS, MIN_REPEATS = 2, 5  # rounds, and repeats of each


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile; again: (second round's median - first's) / first's.

    A difference between two versions that is smaller than `again` or than high - low is noise.
    """

    us: float
    low: float
    high: float
    again: float
    repeats: int
    clock: str


def mark() -> torch.cuda.Event:
    """This moment of the current stream, as a CUDA event that can be timed. Every time that a benchmark takes of a GPU
    lies between two of them: `a.elapsed_time(b)` milliseconds, known when both are reached."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Clock(Protocol):
    name: str

    def batch(self, calls: Sequence[Call]) -> tuple[Call, int]:
        """Something to time as a whole, and how many calls it makes; all is warm afterwards."""

    def span(self, work: Call) -> float:
        """Microseconds that it took."""


class CpuClock:
    name = "cpu"

    def batch(self, calls: Sequence[Call]) -> tuple[Call, int]:
        take_turns(calls)
        return lambda: take_turns(calls), len(calls)

    def span(self, work: Call) -> float:
        start = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - start)


class EventClock:
    """Plain calls between two CUDA events. Short kernels are bound by their launches."""

    name = "events"

    def batch(self, calls: Sequence[Call]) -> tuple[Call, int]:
        take_turns(calls, WARM)
        turns = self._turns(calls)
        return lambda: take_turns(calls, turns), turns * len(calls)

    def _turns(self, calls: Sequence[Call]) -> int:
        return min(MAX_TURNS, math.ceil(BATCH_US / max(1.0, self.span(lambda: take_turns(calls)))))

    def span(self, work: Call) -> float:
        torch.cuda.synchronize()
        start = mark()
        work()
        stop = mark()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)


class GraphClock(EventClock):
    """Replays of a CUDA graph of many turns between two events."""

    name = "graph"

    def batch(self, calls: Sequence[Call]) -> tuple[Call, int]:
        side = torch.cuda.Stream()  # capture wants all lazy set-up done on a stream that is not the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            take_turns(calls, WARM)
        torch.cuda.current_stream().wait_stream(side)
        turns, graph = self._turns(calls), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            take_turns(calls, turns)
        graph.replay()
        return graph.replay, turns * len(calls)


def take_turns(calls: Sequence[Call], turns: int = 1) -> None:
    """Results live to the end of a turn: each is then written to memory of its own, as its inputs are read from."""
    for _ in range(turns):
        results = [call() for call in calls]
        del results


def clock(device: torch.device | str, capture: bool = True) -> Clock:
    if torch.device(device).type == "cpu":
        return CpuClock()
    return GraphClock() if capture else EventClock()


def measure(calls: Sequence[Call], by: Clock, seconds: float = 0.3) -> Timing:
    """Times one call of a sort, in two rounds of about `seconds` together, at least five repeats of a batch each."""
    work, count = by.batch(calls)
    repeats = max(MIN_REPEATS, int(1e6 * seconds / ROUNDS / max(1.0, by.span(work))))
    rounds = [[by.span(work) / count for _ in range(repeats)] for _ in range(ROUNDS)]
    every = sorted(span for one in rounds for span in one)
    tenths = quantiles(every, n=10, method="inclusive")
    first, second = (median(one) for one in rounds)
    return Timing(median(every), tenths[0], tenths[-1], second / first - 1, len(every), by.name)
