"""CUDA graphs of a pool's forwards: a chunk's plan in as few launches as the decisions in it allow.

A forward reads everything at its rows' slots on the device (`ModelRunner`), so one captured graph of it serves every
chunk of every session: only the rows are filled in before a launch. What is launched is plain data (`lower`), and
`launched` runs it to the same effect as `plan.run_plan`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dsa_engine.engine import device_loop
from dsa_engine.engine.chunk_plan import Forward, RowSpec, chunk_plan
from dsa_engine.engine.device import read
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models.memory_estimate import module_tensors

logger = logging.getLogger(__name__)


class LaunchSpec(NamedTuple):
    """Forwards of a plan that are launched as one. loop: not all of them, but on until every row has stopped."""

    nodes: tuple[Forward, ...]
    loop: bool = False


class GraphKey(NamedTuple):
    """What a captured graph runs: one forward for each of `sizes`, with so many rows. steps: some of them are steps,
    not commits alone; loop: the last forward is repeated until every row has stopped."""

    sizes: tuple[int, ...]
    steps: bool = True
    loop: bool = False


def lower(plan: Sequence[Forward], loop: bool = False) -> tuple[LaunchSpec, ...]:
    """A plan as launches: cut where it is decided who goes on or, with `loop`, left to the device from the first step
    on. A commit alone is a launch of its own."""
    loop = loop and any(node.decide for node in plan)
    launches, nodes = [], []
    for node in plan:
        nodes.append(node)
        if not node.step or (node.decide and not loop):
            launches.append(LaunchSpec(tuple(nodes)))
            nodes = []
    return (*launches, LaunchSpec(tuple(nodes), loop)) if nodes else tuple(launches)


def run_launches(
    launches: Iterable[LaunchSpec],
    slots: Sequence[int],
    launch: Callable[[LaunchSpec, Sequence[int]], None],
    stopped: Callable[[Sequence[int]], Sequence[bool]],
    steps_taken: Callable[[Sequence[int]], Sequence[int]],
) -> Iterator[tuple[Forward, list[int]]]:
    """`plan.run_plan` by launches: the same yields, after each launch for all of its forwards.

    launch(launch, slots) runs one; stopped(slots) is asked after one whose last forward decides, and taken(slots), how
    many steps of the chunk each has taken, after a loop.
    """
    live = list(slots)
    for part in launches:
        launch(part, live)
        if part.loop:
            counts = steps_taken(live)
            for step, node in enumerate(part.nodes[: max(counts)]):
                yield node, [slot for slot, count in zip(live, counts) if count > step]
            return
        for node in part.nodes:
            yield node, live
        if part.nodes[-1].decide:
            live = [slot for slot, stop in zip(live, stopped(live)) if not stop]
            if not live:
                return


def key_of(launch: LaunchSpec, size: int) -> GraphKey:
    """The graph that runs a launch for `size` slots."""
    sizes = [size * (node.commit + node.step) for node in launch.nodes]
    return GraphKey(tuple([sizes[0], size] if launch.loop else sizes), launch.nodes[0].step, launch.loop)


def graph_keys(buckets: Sequence[int], max_steps: int, loop_rows: int) -> tuple[GraphKey, ...]:
    """All graphs that chunks of up to `max_steps` steps can need. The largest come first, for what they free serves the
    smaller ones; loops come last, for they are made of others."""
    plans = [
        chunk_plan(least, most, commit, merge)
        for most in range(1, max_steps + 1)
        for least in range(1, most + 1)
        for commit in (False, True)
        for merge in (False, True)
    ]
    graphs = {
        key_of(launch, size)
        for size in buckets
        for loop in {False, size <= loop_rows}
        for plan in plans
        for launch in lower(plan, loop)
    }
    return tuple(sorted(graphs, key=lambda graph: (graph.loop, [-size for size in graph.sizes], graph.steps)))


def rows_of(node: Forward, slots: Sequence[int]) -> list[RowSpec]:
    """The rows of a forward, commits first."""
    commits = [RowSpec(slot, commit=True) for slot in slots if node.commit]
    return commits + [RowSpec(slot, ahead=node.commit) for slot in slots if node.step]


class GraphRunner:
    """The graphs of a pool: for every bucket of rows 1 .. max_steps steps in one launch, the same with the commit of
    the chunk before in the first of them, single forwards of any rows, commits alone, and loops.

    A batch is filled up to the next bucket with rows that do not count (`ModelRunner.rows`): more work, but no other
    graph. In a batch they repeat its first row, and where both write the same key it does not matter which comes last:
    the two differ, if at all, by the rounding of a product that sums in another order at another row. In deterministic
    mode they do not differ.

    loop_rows: chunks of at most so many rows, whose stopping the device can judge, are one launch whatever their count
    (`DeviceLoop`). Of more rows than one those that have stopped run on, for nothing, until the last one has, so more
    than one pays only where a forward is so small that rows cost nothing. 0: no loops; a step at a time is replayed and
    the flag read through pinned memory. Loops and replays give the same bits for one row, and for any in deterministic
    mode.

    Prompts are read at their full length, captured or not, so that nobody's bits depend on which it was.
    """

    def __init__(
        self,
        inputs: ModelRunner,
        buckets: Sequence[int] = (1, 2, 4, 8),
        max_steps: int | None = None,
        loop_rows: int = 1,
    ):
        """max_steps: None is the length of the step list. Buckets beyond the first that holds all slots are left out.
        Raises ImportError where loops are wanted and cannot be."""
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
        self._done = torch.cuda.Event() if inputs.x.is_cuda else None  # of the last replay, whose memory all share
        self._weights: list[int] = []  # where they were when they were captured

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: Sequence[Forward],
        slots: Sequence[int],
        stopped: Callable[[Sequence[int]], Sequence[bool]] | None = None,
    ) -> Iterator[tuple[Forward, list[int]]]:
        """A chunk's plan for some slots, whose chunks have begun; yields as `plan.run_plan` does.

        stopped: as there, asked after each forward that decides. None: the stop flags decide, on the device alone where
        a loop has been captured.
        """
        size = self._bucket(len(slots))
        looped = any(graph.loop and graph.sizes[1] == size for graph in self._captured)
        launches = lower(plan, stopped is None and looped)
        return run_launches(launches, slots, self._launch, stopped or self.flags, self._steps_taken)

    def forward(self, rows: Sequence[RowSpec]) -> None:
        """One forward over any rows, commits first: `ModelRunner.forward` as a graph."""
        steps = any(not row.commit for row in rows)
        single = (graph for graph in self._captured if len(graph.sizes) == 1 and graph.steps == steps)
        self._replay(min((g for g in single if g.sizes[0] >= len(rows)), default=None), [list(rows)])

    def _launch(self, launch: LaunchSpec, slots: Sequence[int]) -> None:
        size = self._bucket(len(slots))
        self._replay(key_of(launch, size) if size else None, [rows_of(node, slots) for node in launch.nodes])

    def _bucket(self, rows: int) -> int:
        """The least bucket that holds them, 0 where none does."""
        return next((size for size in self.buckets if size >= rows), 0)

    def _replay(self, graph: GraphKey | None, forwards: Sequence[list[RowSpec]]) -> None:
        if graph not in self._captured:
            self._warn_uncaptured(len(forwards[0]))
            for rows in forwards:
                self.inputs.run(self.inputs.rows(rows), [self._keys] * len(rows), any(not row.commit for row in rows))
            return
        stream = None if self._done is None else torch.cuda.current_stream(self.inputs.x.device)
        if stream is not None:  # rows and intermediate results lie in one place, whichever stream it is launched on
            stream.wait_event(self._done)
        for size, rows in zip(graph.sizes, forwards):
            if self._filled.get(size) != rows:
                self._rows[size].copy_(self.inputs.rows(rows, size))
                self._filled[size] = rows
        self._captured[graph].replay()
        if stream is not None:
            self._done.record(stream)

    def weights_moved(self) -> bool:
        """Whether a weight lies elsewhere than when it was captured: a replay would read memory that is not its any
        more. Moving, casting and quantising a model do that; writing into its weights does not."""
        return bool(self._captured) and self._weights != self._addresses()

    def _addresses(self) -> list[int]:
        modules = (self.inputs.dit, self.inputs.head)
        return [x.data_ptr() for module in modules if module is not None for x in module_tensors(module)]

    def _warn_uncaptured(self, rows: int) -> None:
        if rows not in self._warned:
            self._warned.add(rows)
            known = f"buckets {self.buckets}" if self._captured else "none yet, see GraphRunner.capture"
            logger.warning("a forward of %d rows was not captured (%s): such forwards run eagerly", rows, known)

    def flags(self, slots: Sequence[int]) -> list[bool]:
        """Which of the slots have stopped, as soon as what was launched until now is done."""
        state = self.inputs.read_state()
        return [state[slot][-1] > 0 for slot in slots]

    def _steps_taken(self, slots: Sequence[int]) -> list[int]:
        step = read(self.inputs.step).tolist()
        return [step[slot] for slot in slots]

    # ---- capturing ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] | None = None, stream: Any = None) -> float:
        """Capture every graph; returns the seconds it took. progress(done, of) is called after each. stream: to capture
        on, None for a new one; the workspace of its products is the graphs' for as long as they are replayed.

        Every forward is run once before, for what is compiled, chosen or loaded at first use must not be captured. It
        runs in a cache slot that nobody has (RuntimeError if there is none), with rows that do not count. A loop that
        cannot be made costs all loops and nothing else: their chunks are then replayed a step at a time.
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
            with torch.cuda.stream(stream):  # the stream of the captures, for what is kept for each stream
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
        # What other threads do meanwhile is their own affair.
        with torch.cuda.graph(captured, pool=pool, stream=stream, capture_error_mode="thread_local"):
            for size in graph.sizes:
                self._forward(size, graph.steps)
        if part:
            captured.instantiate()  # else only the first replay would
        return captured

    def _without_loops(self, error: Exception) -> None:
        """Go on with what needs no loop: every plan of a loop has graphs of its single steps too."""
        logger.warning("no loop on the device, single steps are launched instead: %s: %s", type(error).__name__, error)
        self.graph_keys = tuple(graph for graph in self.graph_keys if not graph.loop)
        self._captured = {graph: made for graph, made in self._captured.items() if not graph.loop}

    def _forward(self, size: int, steps: bool = True) -> None:
        self.inputs.run(self._rows[size], [self._keys] * size, steps)
