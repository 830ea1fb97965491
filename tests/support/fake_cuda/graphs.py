"""Streams, events and CUDA graphs of the pretend device, and the CUDA runtime under a loop on the device.

What is captured is not run: of each operation its inner tensors and numbers are kept, as a graph keeps addresses, and a
replay runs it again. So what is replayed can only be right if it is a function of device tensors. Operations on tensors
without data are not kept, and a replay leaves them out.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_flatten

from tests.support.loop_graph import run_graph

from .device import WAIT, device
from .tensor import storage


class Stream:
    numbers = itertools.count(1)

    def __init__(self, device_=None, priority: int = 0, **_):
        index = torch.device(device_ if device_ is not None else "cuda").index
        self.device_index = device.current if index is None else index
        self.device = torch.device("cuda", self.device_index)
        self.cuda_stream = next(self.numbers)

    def __enter__(self):
        device.streams.append((self, device.current))
        device.current = self.device_index
        return self

    def __exit__(self, *_):
        _, device.current = device.streams.pop()

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device.event(WAIT, "stream")


class Event:
    """Its time is the host's."""

    def __init__(self, enable_timing: bool = False, **_):
        self.timing, self.time = enable_timing, None

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device.event(WAIT, "event")

    def elapsed_time(self, end) -> float:
        if not (self.timing and end.timing):
            raise RuntimeError("both events must be made with enable_timing=True")
        if self.time is None or end.time is None:
            raise RuntimeError("both events must have been recorded")
        return max(1e3 * (end.time - self.time), 1e-3)


DEFAULT: dict[int, Stream] = {}


def default_stream(device_=None) -> Stream:
    return DEFAULT.setdefault(device.current, Stream(device_))


def current_stream(device_=None) -> Stream:
    return device.streams[-1][0] if device.streams else default_stream()


def set_stream(stream_: Stream) -> None:
    """Of this thread, and its device with it."""
    device.streams[:] = [(stream_, device.current)]
    device.current = stream_.device_index


def stream(stream_):
    return contextlib.nullcontext() if stream_ is None else stream_


class Capture:
    """The tape of one graph. made: storages that it allocates, which are its own."""

    def __init__(self):
        self.thread = threading.get_ident()
        self.tape: list = []
        self._own: set[int] = set()

    def record(self, func, args, kwargs, made) -> None:
        self.tape.append((func, args, kwargs, made))

    def owns(self, tensor: torch.Tensor) -> bool:
        return storage(tensor) in self._own

    def made(self, func, args, kwargs, result, given) -> None:
        known = {storage(t) for t in given}
        new = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor) and storage(t) not in known]
        if new:  # else it is a view
            self._own |= {storage(t) for t in new}
            self.record(func, args, kwargs, new)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.tape:
            result = func(*args, **kwargs)
            for old, new in zip(made, (t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor))):
                old.copy_(new)


class CUDAGraph:
    def __init__(self, keep_graph: bool = False):
        self.keep, self.ready, self.captured = keep_graph, not keep_graph, None

    def instantiate(self) -> None:
        assert self.keep, "only a graph that was kept is instantiated by hand"
        self.ready = True

    def replay(self) -> None:
        assert self.captured is not None and self.ready, "not captured, or not instantiated"
        self.captured.replay()

    def raw_cuda_graph(self) -> int:
        assert self.keep, "its cudaGraph_t is gone"
        RAW[id(self)] = weakref.ref(self)
        return id(self)

    def reset(self) -> None:
        self.captured = None


RAW: dict[int, weakref.ref[CUDAGraph]] = {}
POOLS = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(POOLS)


@contextlib.contextmanager
def graph(graph_: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global"):
    """A pool keeps the most that any of its captures had at once beyond what was there before."""
    assert device.capture is None, "another stream is capturing"
    device.event(WAIT, "device, before a capture")
    pool = graph_pool_handle() if pool is None else pool
    memory = device.memory
    before, peak, pools = memory.now, memory.peak, memory.pools
    memory.pools, memory.peak = {}, memory.now  # what is made now is made in the pool
    device.capture = capture = Capture()
    try:
        with stream or contextlib.nullcontext():
            yield
    finally:
        device.capture = None
        kept = memory.now - before  # what the capture's results still hold is counted by itself
        pools[pool] = max(pools.get(pool, 0), memory.peak - before - kept)
        memory.pools, memory.peak = pools, max(peak, memory.now + sum(pools.values()))
    graph_.captured = capture


class Runtime:
    """What a loop on the device needs of `cuda.bindings.runtime`, and `set_while` of csrc: builds the graph from nodes
    and runs it from raw addresses. refuse: names of calls that fail."""

    DEVICE = "cuda"

    def __init__(self):
        self.refuse: set[str] = set()
        self._graphs: dict[int, list[tuple]] = {}
        self._numbers = itertools.count(1)
        self.cudaError_t = SimpleNamespace(cudaSuccess=SimpleNamespace(name="cudaSuccess"))
        self.cudaGraphNodeType = SimpleNamespace(cudaGraphNodeTypeConditional="conditional")
        self.cudaGraphConditionalNodeType = SimpleNamespace(cudaGraphCondTypeWhile="while")
        self.cudaGraphNode_t = int

    def __getattr__(self, name: str):
        call = self.__class__.__dict__.get(f"_{name}")
        if call is None:
            raise AttributeError(name)

        def checked(*arguments):
            if name in self.refuse:
                return (SimpleNamespace(name="cudaErrorNotSupported"), *([None] if name != "cudaGraphLaunch" else []))
            result = call(self, *arguments)
            success = self.cudaError_t.cudaSuccess
            return (success,) if result is None else (success, result)

        return checked

    def cudaGetErrorString(self, error):
        return error, b"operation not supported"

    def cudaGraphNodeParams(self):
        return SimpleNamespace(conditional=SimpleNamespace())

    def _graph(self) -> int:
        number = next(self._numbers)
        self._graphs[number] = []
        return number

    def _add(self, graph_: int, *node) -> int:
        self._graphs[graph_].append(node)
        return next(self._numbers)

    def _cudaGraphCreate(self, flags):
        return self._graph()

    def _cudaGraphConditionalHandleCreate(self, graph_, default, flags):
        return next(self._numbers)

    def _cudaGraphAddChildGraphNode(self, graph_, after, count, child):
        return self._add(graph_, "child", RAW[child]())

    def _cudaGraphAddNode(self, graph_, after, data, count, params):
        params.conditional.phGraph_out = [self._graph()]
        return self._add(graph_, "while", params.conditional.handle, params.conditional.phGraph_out[0])

    def _cudaGraphInstantiate(self, graph_, flags):
        return graph_

    def _cudaGraphDestroy(self, graph_):
        return None

    def _cudaGraphExecDestroy(self, executable):
        return None

    def _cudaGraphLaunch(self, executable, stream_):
        run_graph(self._graphs, executable, CUDAGraph.replay)
        return None

    def set_while(self, *, graph, after, handle, slots, rows, flags, stride):
        return self._add(graph, "condition", handle, slots, rows, flags, stride)
