"""Prometheus metrics, in a registry of their own: two servers in one process do not share theirs."""

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
# The label of each of the engine's `Chunk.timings`.
PHASES = {"commit": "kv", "denoise": "denoise", "step": "step", "decode": "vae", "copy": "copy", "total": "total"}
FPS_WINDOW_S = 10.0  # that `dsa_fps` averages over


class Metrics:
    """Counts events (`observe`) and reads the current state when it is scraped.

    Args:
        max_steps: of a chunk.
        stats: of the backend.
        jobs: how many are in each state; None for a server without jobs.
    """

    def __init__(
        self,
        max_steps: int,
        stats: Callable[[], Mapping[str, float]],
        jobs: Callable[[], Mapping[str, int]] | None = None,
    ):
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, help: str, labels: Iterable[str] = (), **options: Any) -> Any:
            return kind(f"dsa_{name}", help, labels, registry=self.registry, **options)

        latency = "From the time a live stream's chunk could start to its being ready"
        self._phase = make(Histogram, "chunk_seconds", "Time of a chunk, by phase", ["phase"], buckets=SECONDS)
        self._latency = make(Histogram, "chunk_latency_seconds", latency, buckets=SECONDS)
        self._steps = make(Histogram, "steps", "Denoising steps of a chunk", ["kind"], buckets=range(1, max_steps + 1))
        self._frames = make(Counter, "frames", "Frames made", ["kind"])
        self._misses = make(Counter, "deadline_misses", "Chunks of live streams that were late")
        self._closed = make(Counter, "streams_closed", "Streams that ended, by reason", ["kind", "reason"])
        self._threshold = make(Gauge, "threshold", "Confidence threshold of the last chunk of a live stream")
        self._threshold.set(math.nan)
        make(Gauge, "fps", "Frames per second, of all streams").set_function(self._fps)
        self._recent: deque[tuple[float, int]] = deque()
        self.registry.register(State(stats, jobs))

    def observe(self, stream: Any, event: Event) -> None:
        """An event of a stream, which has its `request` (`Worker.observers`); from any thread."""
        kind = "live" if stream.request.live else "job"
        if isinstance(event, Closed):
            self._closed.labels(kind, event.reason).inc()
        if not isinstance(event, ChunkReady):
            return
        chunk = event.chunk
        for name, milliseconds in chunk.timings.items():
            self.phase(PHASES[name], milliseconds / 1e3)
        self._steps.labels(kind).observe(chunk.steps)
        self._frames.labels(kind).inc(len(chunk.frames))
        now = time.monotonic()
        self._recent.append((now, len(chunk.frames)))
        while now - self._recent[0][0] > FPS_WINDOW_S:
            self._recent.popleft()
        if kind == "live":
            self._latency.observe(event.latency)
            self._misses.inc(event.late)
            self._threshold.set(math.nan if event.threshold is None else event.threshold)

    def phase(self, name: str, seconds: float) -> None:
        """Time of a chunk in a phase: kv, denoise, vae, total or encode."""
        self._phase.labels(name).observe(seconds)

    def _fps(self) -> float:
        now = time.monotonic()
        return sum(frames for then, frames in list(self._recent) if now - then <= FPS_WINDOW_S) / FPS_WINDOW_S

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class State(Collector):
    """Values that are read when scraped."""

    GAUGES = {
        "live": ("dsa_sessions", "Live streams that have a slot"),
        "max_sessions": ("dsa_sessions_limit", "Slots for live streams"),
        "jobs": ("dsa_jobs_running", "Jobs that are running"),
        "waiting": ("dsa_queue_depth", "Live streams that wait for a slot"),
        "pressure": ("dsa_pressure", "How far load lowers the threshold of budget streams, 0 to 1"),
        "forwards": ("dsa_forwards", "Forwards of the model so far"),
        "cache_bytes": ("dsa_cache_bytes", "Memory of the key-value caches"),
    }

    def __init__(self, stats: Callable[[], Mapping[str, float]], jobs: Callable[[], Mapping[str, int]] | None):
        self._stats, self._jobs = stats, jobs

    def describe(self) -> Iterable:
        return ()  # else registering would collect once

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
