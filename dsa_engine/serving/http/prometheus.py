"""Numbers for Prometheus, in a registry of their own: two servers in one process do not mix theirs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dsa_engine.serving.types import ChunkReady, Closed, Event

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0)
PHASES = {"commit": "kv", "denoise": "denoise", "decode": "vae", "total": "total"}  # of `Chunk.timings`
RECENT = 10.0  # seconds that `dsa_fps` looks back


class Metrics:
    """What happened, told by `observe`, and what is, asked when somebody looks.

    steps: the most a chunk can take. stats: a backend's numbers. jobs: how many are in each state, None for no jobs.
    """

    def __init__(
        self, steps: int, stats: Callable[[], Mapping[str, float]], jobs: Callable[[], Mapping[str, int]] | None = None
    ):
        self.registry = CollectorRegistry()
        common = {"registry": self.registry}
        self._phase = Histogram(
            "dsa_chunk_seconds", "Time a chunk took, by phase", ["phase"], buckets=SECONDS, **common
        )
        self._latency = Histogram(
            "dsa_chunk_latency_seconds",
            "From a live stream's chunk being wanted to its being there",
            buckets=SECONDS,
            **common,
        )
        self._steps = Histogram(
            "dsa_steps", "Denoising steps of a chunk", ["kind"], buckets=range(1, steps + 1), **common
        )
        self._frames = Counter("dsa_frames", "Frames made", ["kind"], **common)
        self._misses = Counter("dsa_deadline_misses", "Chunks of live streams that came late", **common)
        self._closed = Counter("dsa_streams_closed", "Streams that ended, by reason", ["kind", "reason"], **common)
        self._threshold = Gauge(
            "dsa_threshold", "Confidence at which the last chunk of a live stream was done", **common
        )
        self._recent: deque[tuple[float, int]] = deque()
        Gauge("dsa_fps", "Frames made a second, of all streams", **common).set_function(self._fps)
        self._threshold.set(math.nan)
        self.registry.register(State(stats, jobs))

    def observe(self, task: Any, event: Event) -> None:
        """An event of a stream (`Worker.observers`); from any thread. task: has the stream's `order`."""
        kind = "live" if task.request.live else "job"
        if isinstance(event, Closed):
            self._closed.labels(kind, event.reason).inc()
        if not isinstance(event, ChunkReady):
            return
        for name, milliseconds in event.chunk.timings.items():
            self.phase(PHASES[name], milliseconds / 1e3)
        self._steps.labels(kind).observe(event.chunk.steps)
        self._frames.labels(kind).inc(len(event.chunk.frames))
        now = time.monotonic()
        self._recent.append((now, len(event.chunk.frames)))
        while now - self._recent[0][0] > RECENT:
            self._recent.popleft()
        if kind == "live":
            self._latency.observe(event.latency)
            self._misses.inc(event.late)
            self._threshold.set(math.nan if event.threshold is None else event.threshold)

    def phase(self, name: str, seconds: float) -> None:
        """A chunk took so long in this phase: kv, denoise, vae, total or encode."""
        self._phase.labels(name).observe(seconds)

    def _fps(self) -> float:
        now = time.monotonic()
        return sum(frames for then, frames in list(self._recent) if now - then <= RECENT) / RECENT

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class State(Collector):
    """What is true now."""

    GAUGES = {
        "live": ("dsa_sessions", "Live streams that have a place"),
        "max_sessions": ("dsa_sessions_limit", "Places for live streams"),
        "jobs": ("dsa_jobs_running", "Jobs that are being made"),
        "waiting": ("dsa_queue_depth", "Live streams that wait for a place"),
        "pressure": ("dsa_pressure", "How far the load presses the threshold of budget streams down, 0 to 1"),
        "forwards": ("dsa_forwards", "Forwards of the model so far"),
        "cache_bytes": ("dsa_cache_bytes", "Memory of the key-value caches"),
    }

    def __init__(self, stats: Callable[[], Mapping[str, float]], jobs: Callable[[], Mapping[str, int]] | None):
        self._stats, self._jobs = stats, jobs

    def describe(self) -> Iterable:
        return ()  # else registering would ask for everything once

    def collect(self) -> Iterable[GaugeMetricFamily]:
        stats = self._stats()
        for key, (name, text) in self.GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(name, text, stats[key])
        if self._jobs is not None:
            jobs = GaugeMetricFamily("dsa_jobs", "Jobs, by state", labels=["state"])
            for state, count in self._jobs().items():
                jobs.add_metric([state], count)
            yield jobs
        if torch.cuda.is_available():
            memory = GaugeMetricFamily("dsa_gpu_memory_bytes", "Memory of the GPU", labels=["kind"])
            free, total = torch.cuda.mem_get_info()
            allocated = torch.cuda.memory_allocated()
            for kind, size in (("allocated", allocated), ("used", total - free), ("total", total)):
                memory.add_metric([kind], size)
            yield memory
