"""A loop on the device: one launch that takes steps until every row has stopped, without the host."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsa_engine.ops import cuda_backend as kernels


def unavailable() -> str | None:
    """Why there can be no loop on the device; None if there can."""
    why = kernels.why_unavailable(kernels.SET_WHILE)  # the loop itself does not need attention
    if why is None:
        try:
            runtime()
        except ImportError as error:
            why = str(error)
    return why


def runtime() -> ModuleType:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ImportError(
            f"a loop on the device needs cuda-python: pip install 'dsa-engine[cuda]' ({error})"
        ) from error
    return runtime


class DeviceLoop:
    """The graph `first; while any flag is 0: again`, out of two captured graphs.

        first -> condition -> WHILE
                                body: again -> condition

    first, again: captured with keep_graph=True, so that they can be nodes; slots [R] int64: the rows; flags [N] float32
    of any stride: 0 where a slot goes on. `again` must finally set each of them, or the loop never ends. All four are
    kept alive. The condition is a kernel of its own (csrc/graphs.cuh), added as a node, not captured.
    Raises RuntimeError naming the call that failed, ImportError without cuda-python.
    """

    def __init__(self, first: torch.cuda.CUDAGraph, again: torch.cuda.CUDAGraph, slots: Tensor, flags: Tensor):
        self.kept = (first, again, slots, flags)
        self.runtime = rt = runtime()
        graph = self._call("cudaGraphCreate", 0)
        weakref.finalize(self, rt.cudaGraphDestroy, graph).atexit = False  # at exit the driver may be gone
        handle = self._call("cudaGraphConditionalHandleCreate", graph, 0, 0)  # no default: the first condition sets it
        node = self._call("cudaGraphAddChildGraphNode", graph, None, 0, first.raw_cuda_graph())
        node = self._condition(graph, node, handle)
        loop = rt.cudaGraphNodeParams()
        loop.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        loop.conditional.handle = handle
        loop.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
        loop.conditional.size = 1
        self._call("cudaGraphAddNode", graph, [node], None, 1, loop)
        body = loop.conditional.phGraph_out[0]
        node = self._call("cudaGraphAddChildGraphNode", body, None, 0, again.raw_cuda_graph())
        self._condition(body, node, handle)
        self.executable = self._call("cudaGraphInstantiate", graph, 0)
        weakref.finalize(self, rt.cudaGraphExecDestroy, self.executable).atexit = False

    def replay(self) -> None:
        self._call("cudaGraphLaunch", self.executable, torch.cuda.current_stream().cuda_stream)

    def _condition(self, graph: Any, after: Any, handle: Any) -> Any:
        _, _, slots, flags = self.kept
        node = kernels.csrc.set_while(
            graph=int(graph),
            after=int(after),
            handle=int(handle),
            slots=slots.data_ptr(),
            rows=len(slots),
            flags=flags.data_ptr(),
            stride=flags.stride(0),
        )
        return self.runtime.cudaGraphNode_t(node)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; its error raises."""
        error, *result = getattr(self.runtime, name)(*arguments)
        if error != self.runtime.cudaError_t.cudaSuccess:
            self.runtime.cudaGetLastError()  # clears it, else the next kernel launch reports it
            raise RuntimeError(f"{name}: {self.runtime.cudaGetErrorString(error)[1].decode()} ({error.name})")
        return result[0] if result else None
