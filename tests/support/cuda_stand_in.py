"""CUDA graphs without CUDA: what stands in for torch.cuda, cuda.bindings.runtime and csrc in the tests of graphs.

Of a captured forward `Cuda` keeps what a CUDA graph keeps: its operations, with the tensors and the numbers they had.
Nothing is written while it records and the host may read nothing, so that what is replayed later can only be right if
the forward is a function of device tensors. `Runtime` builds and runs the graph of a loop.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_engine.engine import device_loop, model_runner
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models.interfaces import TextKV
from dsa_engine.ops import cuda_backend as kernels
from dsa_engine.ops import reference
from tests.support.loop_graph import run_graph

PATCHED = ("Stream", "current_stream", "stream", "device", "CUDAGraph", "graph", "graph_pool_handle", "synchronize")


class Recorder(TorchDispatchMode):
    """Operations as they are captured. What exists already is not written, and nothing is read by the host."""

    def __init__(self):
        super().__init__()
        self.tape, self.own = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"):
            raise RuntimeError(f"{func}: not permitted when a stream is capturing")
        if func._schema.is_mutable:
            self.tape.append((func, args, kwargs, ()))
            return func(*args, **kwargs) if storage(args[0]) in self.own else args[0]
        made = func(*args, **kwargs)
        given = {storage(t) for t in tensors((*args, *kwargs.values()))}
        new = [t for t in tensors([made]) if storage(t) not in given]
        if new:  # else it is a view
            self.own |= {storage(t) for t in new}
            self.tape.append((func, args, kwargs, new))
        return made

    @torch.inference_mode()
    def replay(self):
        for func, args, kwargs, made in self.tape:
            for old, new in zip(made, tensors([func(*args, **kwargs)])):
                old.copy_(new)


def tensors(values):
    """Those in a list, and in the lists in it."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def storage(tensor) -> int:
    return tensor.untyped_storage()._cdata


class FakeGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, cuda, keep_graph):
        self.cuda, self.keep, self.ready = cuda, keep_graph, not keep_graph
        self.recorder = Recorder()

    def instantiate(self):
        assert self.keep and self.recorder.tape
        self.ready = True

    def replay(self):
        assert self.ready, "the first replay would instantiate it"
        self.cuda.launches += 1
        self.recorder.replay()

    def raw_cuda_graph(self):
        assert self.keep, "its cudaGraph_t is gone"
        self.cuda.raw[id(self)] = weakref.ref(self)
        return id(self)


class Cuda:
    """What of `torch.cuda` capturing and replaying uses; `log` is what was done in which order."""

    def __init__(self):
        self.log, self.launches, self.reads, self.raw, self.stream_now = [], 0, 0, {}, "main"
        self.runtime = Runtime(self)

    def Stream(self, device=None):
        return SimpleNamespace(name="side", wait_stream=lambda other: self.log.append(f"side waits for {other.name}"))

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self, device=None):
        return SimpleNamespace(name=self.stream_now, cuda_stream=7)

    @contextlib.contextmanager
    def stream(self, stream):
        self.stream_now = stream.name
        yield
        self.stream_now = "main"

    def read(self, x):
        self.reads += 1
        return x.clone()

    def CUDAGraph(self, keep_graph=False):
        return FakeGraph(self, keep_graph)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.log.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        with self.stream(stream), pytest.MonkeyPatch.context() as patch, graph.recorder:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("tolist() while a stream is capturing"))
            yield

    def graph_pool_handle(self):
        return "pool"

    def synchronize(self, device=None):
        pass


class Runtime:
    """What a loop needs of cuda.bindings.runtime and of csrc. A launch runs what was built, from the addresses."""

    SUCCESS, FAILURE = SimpleNamespace(name="cudaSuccess"), SimpleNamespace(name="cudaErrorInvalidValue")
    DEVICE = "cpu"

    def __init__(self, cuda):
        self.cuda, self.calls, self.alive, self.fails, self.ids = cuda, [], {}, None, itertools.count(1)
        self.last = self.SUCCESS  # error
        self.cudaError_t = SimpleNamespace(cudaSuccess=self.SUCCESS)
        self.cudaGraphNodeType = SimpleNamespace(cudaGraphNodeTypeConditional="conditional")
        self.cudaGraphConditionalNodeType = SimpleNamespace(cudaGraphCondTypeWhile="while")
        self.cudaGraphNode_t = int

    def cudaGraphNodeParams(self):
        return SimpleNamespace(conditional=SimpleNamespace())

    def cudaGetErrorString(self, error):
        return self.SUCCESS, b"invalid argument"

    def cudaGetLastError(self):
        last, self.last = self.last, self.SUCCESS
        return (last,)

    def made(self, call, value=None):
        self.calls.append(call)
        if self.fails == call[0]:
            self.last = self.FAILURE
            return self.FAILURE, None
        return self.SUCCESS, value

    def graph(self):
        number = next(self.ids)
        self.alive[number] = []
        return number

    def add(self, graph, after, node):
        number = next(self.ids)
        assert [n for n, _ in self.alive[graph]][-1:] == [a for a in after if a], "a node waits for the one before"
        self.alive[graph].append((number, node))
        return number

    def cudaGraphCreate(self, flags):
        return self.made(("cudaGraphCreate", flags), self.graph())

    def cudaGraphConditionalHandleCreate(self, graph, default, flags):
        return self.made(("cudaGraphConditionalHandleCreate", graph, default, flags), 90)

    def cudaGraphAddChildGraphNode(self, graph, after, count, child):
        assert count == len(after or [])
        node = ("child", self.cuda.raw[child])
        return self.made(("cudaGraphAddChildGraphNode", graph), self.add(graph, after or [], node))

    def cudaGraphAddNode(self, graph, after, data, count, params):
        assert count == len(after) and data is None and params.type == "conditional"
        loop = params.conditional
        assert (loop.handle, loop.type, loop.size) == (90, "while", 1)
        loop.phGraph_out = [self.graph()]
        node = ("while", loop.handle, loop.phGraph_out[0])
        return self.made(("cudaGraphAddNode", graph), self.add(graph, after, node))

    def set_while(self, *, graph, after, handle, slots, rows, flags, stride):
        self.calls.append(("set_while", graph))
        return self.add(graph, [after], ("condition", handle, slots, rows, flags, stride))

    def cudaGraphInstantiate(self, graph, flags):
        return self.made(("cudaGraphInstantiate", graph, flags), graph + 1000)

    def cudaGraphLaunch(self, executable, stream):
        self.cuda.launches += 1
        nodes = {number: [node for _, node in added] for number, added in self.alive.items()}
        run_graph(nodes, executable - 1000, lambda child: child().recorder.replay())
        return self.made(("cudaGraphLaunch", executable, stream))[:1]

    def cudaGraphDestroy(self, graph):
        return self.made(("cudaGraphDestroy", graph))[:1]

    def cudaGraphExecDestroy(self, executable):
        return self.made(("cudaGraphExecDestroy", executable))[:1]


def masked_attention(q, k_cache, v_cache, slot, keys, scales=None):
    """Attention that reads no index on the host, as on a GPU."""
    frame = torch.arange(k_cache.shape[1])[:, None]
    seen = ((keys[:, None, :, 0] <= frame) & (frame < keys[:, None, :, 1])).any(-1)
    k, v = (torch.where(seen[:, :, None, None, None], cache[slot], 0).flatten(1, 2) for cache in (k_cache, v_cache))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    hidden = ~seen.repeat_interleave(k_cache.shape[2], dim=1)[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def whole_text(model_runner, slot, longest):
    return TextKV(
        model_runner.text.kv[:, :, slot, :longest], model_runner.text.used[slot], model_runner.text.repeat[slot]
    )


def patch(cuda, monkeypatch):
    """Put it in CUDA's place, empty of what was logged; patched is also what may read on a CPU what it may not on a
    GPU."""
    cuda.log.clear()
    cuda.runtime.calls.clear()
    cuda.runtime.fails = None
    for name in PATCHED:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    for module in (model_runner,):
        monkeypatch.setattr(module, "read", cuda.read)
    monkeypatch.setattr(device_loop, "runtime", lambda: cuda.runtime)
    monkeypatch.setattr(kernels, "csrc", cuda.runtime)
    monkeypatch.setattr(reference, "attention", masked_attention)
    monkeypatch.setattr(ModelRunner, "_text", whole_text)
    return cuda
