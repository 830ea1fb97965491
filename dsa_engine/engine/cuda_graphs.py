"""CUDA graphs of a pool's forwards: a chunk's plan in as few launches as the decisions in it allow.

A forward reads everything at its rows' slots on the device (`ModelRunner`), so one captured graph of it serves every
chunk of every session: only the rows are filled in before a launch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dsa_engine.engine import device_loop
from dsa_engine.engine.chunk_plan import Forward, LaunchSpec, RowSpec, chunk_plan, lower
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models.memory_estimate import module_tensors

logger = logging.getLogger(__name__)

UNROLLED_ROWS = 1  # more rows take a graph per step: the launch is small beside the forward, and few graphs suffice


class GraphKey(NamedTuple):
    """What a captured graph runs: one forward for each of `sizes`, with so many rows. steps: some of them are steps,
    not commits alone; loop: the last forward is repeated until every row has stopped."""

    sizes: tuple[int, ...]
    steps: bool = True
    loop: bool = False


def key_of(launch: LaunchSpec, size: int) -> GraphKey:
    """The graph that runs a launch for `size` slots."""
    sizes = [size * (forward.commit + forward.step) for forward in launch.forwards]
    return GraphKey(tuple([sizes[0], size] if launch.loop else sizes), launch.forwards[0].step, launch.loop)


def graph_keys(buckets: Sequence[int], max_steps: int, loop_rows: int) -> tuple[GraphKey, ...]:
    """All graphs that chunks of up to `max_steps` steps can need: the largest first, since the memory they free serves
    the smaller ones; loops last, since they are made of others."""
    plans = [
        chunk_plan(least, most, commit, recaches)
        for most in range(1, max_steps + 1)
        for least in range(1, most + 1)
        for commit in (False, True)
        for recaches in (0, 1)
    ]
    keys = {
        key_of(launch, size)
        for size in buckets
        for loop in {False, size <= loop_rows}
        for plan in plans
        for launch in lower(plan, size <= UNROLLED_ROWS, loop)
    }
    return tuple(sorted(keys, key=lambda key: (key.loop, [-size for size in key.sizes], key.steps)))


class GraphRunner:
    """The graphs of a pool. For one row: 1 .. max_steps steps in one launch, the same with the previous chunk's commit
    in the first of them, and loops. For every other bucket of rows single forwards.

    A batch is padded to the next bucket with rows that do not count (`ModelRunner.rows`). They repeat its first row;
    where both write the same key it does not matter which comes last: the two differ, if at all, by the rounding of a
    matmul that sums in another order at another row. In deterministic mode they do not differ.

    loop_rows: chunks of at most so many rows, if the device can evaluate their stop rules, are one launch whatever
    their count (`DeviceLoop`). Rows that have stopped run on, for nothing, until the last one has, so more than one
    pays only where a forward is so small that rows are free. 0: no loops; a step at a time is replayed and the flag
    read through pinned memory. Loops and replays give the same bits for one row, and for any in deterministic mode.

    Prompts are read at their full length, captured or not, so that no bits depend on which it was.
    """

    def __init__(
        self,
        inputs: ModelRunner,
        buckets: Sequence[int] = (1, 2, 4, 8),
        max_steps: int | None = None,
        loop_rows: int = 1,
    ):
        """The graphs of a runner, to be captured.

        Args:
            inputs: the pool's model runner.
            buckets: rows to capture for; those beyond the first that holds all slots are left out.
            max_steps: of a chunk; None: the length of the step list.
            loop_rows: largest number of rows that loop on the device.

        Raises:
            ImportError: loops are not available.
        """
        levels, slots = inputs.noise.shape[1], inputs.cache.slots
        max_steps = levels if max_steps is None else max_steps
        if not 1 <= max_steps <= levels:
            near = min(max(max_steps, 1), levels)
            raise ValueError(f"max_steps={max_steps}: must be from 1 to {levels}, the step list; nearest is {near}")
        if not buckets or min(buckets) < 1:
            raise ValueError(f"buckets={tuple(buckets)}: must be numbers of rows, 1 or more; e.g. (1, 2, 4, 8)")
        why = device_loop.unavailable() if loop_rows > 0 else None
        if why is not None:
            raise ImportError(f"loop_rows={loop_rows}: {why}; nearest is 0")
        buckets = sorted(set(buckets))
        self.buckets = buckets[:1] + [size for size, less in zip(buckets[1:], buckets) if less < slots]
        self.inputs = inputs
        self.graph_keys = graph_keys(self.buckets, max_steps, loop_rows)
        self._keys = inputs.text.kv.shape[3]
        sizes = {size for graph in self.graph_keys for size in graph.sizes}
        self._rows = {size: torch.zeros(4, size, dtype=torch.long, device=inputs.x.device) for size in sizes}
        self._filled: dict[int, list[RowSpec]] = {}  # what the rows hold
        self._captured: dict[GraphKey, torch.cuda.CUDAGraph | device_loop.DeviceLoop] = {}
        self._warned: set[int] = set()
        self._done = torch.cuda.Event() if inputs.x.is_cuda else None  # of the last replay
        self._weights: list[int] = []  # their addresses at the capture

    # ---- running -----------------------------------------------------------------------------------------------------

    def lower(
        self, plan: Sequence[Forward], rows: int, host_decides: bool = False, each_step: bool = False
    ) -> tuple[LaunchSpec, ...]:
        """A plan for so many slots as launches that were captured, a loop included unless the host has to decide."""
        size = self._bucket(rows)
        loop = not (host_decides or each_step) and any(k.loop and k.sizes[1] == size for k in self._captured)
        return lower(plan, size == UNROLLED_ROWS and not each_step, loop)

    def launch(self, launch: LaunchSpec, slots: Sequence[int]) -> None:
        """Run a launch for some slots whose chunks have been started."""
        forwards = [forward.rows(slots) for forward in launch.forwards]
        if len(forwards) == 1:
            return self.forward(forwards[0])
        size = self._bucket(len(slots))
        self._replay(key_of(launch, size) if size else None, forwards)

    def forward(self, rows: Sequence[RowSpec]) -> None:
        """One forward over any rows, commits first: `ModelRunner.forward` as a graph."""
        steps = any(not row.commit for row in rows)
        single = (key for key in self._captured if len(key.sizes) == 1 and key.steps == steps)
        self._replay(min((key for key in single if key.sizes[0] >= len(rows)), default=None), [list(rows)])

    def _bucket(self, rows: int) -> int:
        """The smallest bucket that holds them, 0 if none does."""
        return next((size for size in self.buckets if size >= rows), 0)

    def _replay(self, graph: GraphKey | None, forwards: Sequence[list[RowSpec]]) -> None:
        if graph not in self._captured:
            self._warn_uncaptured(len(forwards[0]))
            for rows in forwards:
                self.inputs.run(self.inputs.rows(rows), [self._keys] * len(rows), any(not row.commit for row in rows))
            return
        stream = None if self._done is None else torch.cuda.current_stream(self.inputs.x.device)
        if stream is not None:  # all replays share the row buffers and intermediates, whatever their stream
            stream.wait_event(self._done)
        for size, rows in zip(graph.sizes, forwards):
            if self._filled.get(size) != rows:
                self._rows[size].copy_(self.inputs.rows(rows, size))
                self._filled[size] = rows
        self._captured[graph].replay()
        if stream is not None:
            self._done.record(stream)

    def weights_moved(self) -> bool:
        """Whether a weight's address has changed since the capture, so that a replay would read freed memory. Moving,
        casting and quantizing a model do that; writing into its weights does not."""
        return bool(self._captured) and self._weights != self._addresses()

    def _addresses(self) -> list[int]:
        modules = (self.inputs.dit, self.inputs.head)
        return [x.data_ptr() for module in modules if module is not None for x in module_tensors(module)]

    def _warn_uncaptured(self, rows: int) -> None:
        if rows not in self._warned:
            self._warned.add(rows)
            captured = f"buckets {self.buckets}" if self._captured else "none yet, see GraphRunner.capture"
            logger.warning("a forward of %d rows was not captured (%s): such forwards run eagerly", rows, captured)

    # ---- capturing ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] | None = None, stream: Any = None) -> float:
        """Capture every graph; returns the seconds it took.

        Every forward is run once before: what is compiled, autotuned or loaded at first use must not be captured. It
        uses a free cache slot (RuntimeError if there is none), with rows that do not count. If a loop cannot be
        created, all loops are dropped and their chunks are replayed a step at a time.

        Args:
            progress: called with (done, total) after each graph.
            stream: to capture on, None for a new one; its matmul workspace belongs to the graphs from then on.
        """
        start = time.perf_counter()
        device = self.inputs.x.device
        slot = self.inputs.cache.acquire()
        try:
            for rows in self._rows.values():
                rows.zero_()[0] = slot
            self._filled.clear()
            self._captured.clear()
            stream, pool = stream or torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # the stream of the captures: some caches are per stream
                for size in self._rows:
                    self._forward(size)
            for done, graph in enumerate(self.graph_keys, 1):
                try:
                    self._captured[graph] = self._capture(graph, stream, pool)
                except Exception as error:  # of the driver, of the kernel's launcher or of cuda-python
                    if not graph.loop:
                        raise
                    self._without_loops(error)
                    break  # loops come last
                if progress is not None:
                    progress(done, len(self.graph_keys))
            torch.cuda.synchronize(device)
            self._weights = self._addresses()
        finally:
            self.inputs.cache.release(slot)
        return time.perf_counter() - start

    def _capture(self, graph: GraphKey, stream, pool) -> torch.cuda.CUDAGraph | device_loop.DeviceLoop:
        if graph.loop:
            first, again = (self._captured[GraphKey((size,))] for size in graph.sizes)
            return device_loop.DeviceLoop(first, again, self._rows[graph.sizes[1]][0], self.inputs.state[:, -1])
        part = (
            len(graph.sizes) == 1 and graph.steps and any(graph.sizes[0] in g.sizes for g in self.graph_keys if g.loop)
        )
        captured = torch.cuda.CUDAGraph(keep_graph=part)
        # Other threads may use CUDA meanwhile.
        with torch.cuda.graph(captured, pool=pool, stream=stream, capture_error_mode="thread_local"):
            for size in graph.sizes:
                self._forward(size, graph.steps)
        if part:
            captured.instantiate()  # else only the first replay would
        return captured

    def _without_loops(self, error: Exception) -> None:
        """Go on without loops: every plan of a loop has graphs of its single steps too."""
        logger.warning("no loop on the device, single steps are launched instead: %s: %s", type(error).__name__, error)
        self.graph_keys = tuple(key for key in self.graph_keys if not key.loop)
        self._captured = {key: made for key, made in self._captured.items() if not key.loop}

    def _forward(self, size: int, steps: bool = True) -> None:
        self.inputs.run(self._rows[size], [self._keys] * size, steps)
