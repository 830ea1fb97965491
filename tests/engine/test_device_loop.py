"""The graph of a loop on the device, on a stand-in for the runtime, and the kernel that sets its condition."""

from __future__ import annotations

import ctypes
import gc
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dsa_engine.engine import device_loop
from tests.support.csrc.emulated import cuda_headers
from tests.support.cuda_stand_in import Cuda, patch

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture
def cuda(monkeypatch):
    return patch(Cuda(), monkeypatch)


# ---- the loop's graph ------------------------------------------------------------------------------------------------


def test_the_loops_graph(cuda):
    """first -> condition -> WHILE [again -> condition], one handle, each call checked, nothing left when it is gone."""
    first, again = (cuda.CUDAGraph(keep_graph=True) for _ in range(2))
    slots, state = torch.tensor([2, 0]), torch.ones(4, 3)
    loop = device_loop.DeviceLoop(first, again, slots, state[:, -1])
    rt = cuda.runtime
    assert [call[0] for call in rt.calls] == [
        "cudaGraphCreate",
        "cudaGraphConditionalHandleCreate",
        "cudaGraphAddChildGraphNode",
        "set_while",
        "cudaGraphAddNode",
        "cudaGraphAddChildGraphNode",
        "set_while",
        "cudaGraphInstantiate",
    ]
    graph, body = rt.alive
    kinds = [[kind for _, (kind, *_) in rt.alive[g]] for g in (graph, body)]
    assert kinds == [["child", "condition", "while"], ["child", "condition"]]
    (_, (_, one)), (_, condition), (_, (_, handle, inside)) = rt.alive[graph]
    (_, (_, two)), (_, same_condition) = rt.alive[body]
    assert (one(), two(), inside) == (first, again, body) and condition == same_condition
    assert condition == ("condition", handle, slots.data_ptr(), 2, state.data_ptr() + 8, 3)
    loop.replay()
    assert rt.calls[-1] == ("cudaGraphLaunch", graph + 1000, 7)
    del first, again, slots, state
    gc.collect()
    assert one() and two()  # a cudaGraph_t does not keep the memory that its kernels use
    del loop
    gc.collect()
    assert one() is two() is None
    assert sorted(rt.calls[-2:]) == [("cudaGraphDestroy", graph), ("cudaGraphExecDestroy", graph + 1000)]


@pytest.mark.parametrize(
    "call",
    [
        "cudaGraphCreate",
        "cudaGraphConditionalHandleCreate",
        "cudaGraphAddChildGraphNode",
        "cudaGraphAddNode",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
    ],
)
def test_an_error_of_the_runtime_names_its_call(cuda, call):
    cuda.runtime.fails = call
    with pytest.raises(RuntimeError, match=rf"{call}: invalid argument \(cudaErrorInvalidValue\)"):
        parts = [cuda.CUDAGraph(keep_graph=True) for _ in range(2)]
        device_loop.DeviceLoop(*parts, torch.zeros(1, dtype=torch.long), torch.ones(1)).replay()
    assert cuda.runtime.last is cuda.runtime.SUCCESS  # the next launch of a kernel, which asks, is not told of it


def test_the_real_runtime_takes_these_names_and_values(monkeypatch):
    """As far as there is no driver: the structures, and an error that is raised with its name."""
    rt = pytest.importorskip("cuda.bindings.runtime")
    loop = rt.cudaGraphNodeParams()
    loop.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
    loop.conditional.handle = rt.cudaGraphConditionalHandle(5)
    loop.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
    loop.conditional.size = 1
    assert int(loop.conditional.handle) == 5 and loop.conditional.size == len(loop.conditional.phGraph_out) == 1
    assert int(rt.cudaGraphNode_t(12)) == 12
    for name in ("cudaGraphAddChildGraphNode", "cudaGraphAddNode", "cudaGraphLaunch", "cudaGraphExecDestroy"):
        assert callable(getattr(rt, name))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"cudaGraphCreate: .* \(cudaError"):
            device_loop.DeviceLoop(None, None, torch.zeros(1, dtype=torch.long), torch.ones(1))


# ---- csrc/graphs -----------------------------------------------------------------------------------------------------


def test_the_condition_compiles(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    architectures = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=sm_80"]
    command = [nvcc, "-std=c++17", *architectures, "-Xptxas", "-v", "-c", str(CSRC / "graphs.cu"), "-o"]
    done = subprocess.run([*command, str(tmp_path / "graphs.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores") == 2


EMULATED = r"""
#include "emulator.h"
static unsigned long long set_handle;
static unsigned set_value, set_times;
#define cudaGraphSetConditional(handle, value) (set_handle = handle, set_value = value, ++set_times)
#include "graphs.cuh"
extern "C" int condition(const int64_t* slots, int rows, const float* flags, int64_t stride, int order) {
    set_times = 0;
    emulate::order() = order;
    dsa::WhileArgs args{nullptr, nullptr, 77, slots, rows, flags, stride};
    emulate::launch(dim3(1), dim3(32), 0, [&] { dsa::set_while_kernel(args); });
    return set_times == 1 && set_handle == 77 ? int(set_value) : -1;
}
"""


@pytest.fixture(scope="module")
def condition(tmp_path_factory):
    """The kernel on the host."""
    headers = cuda_headers()
    if headers is None or not shutil.which("g++"):
        pytest.skip("needs g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("condition")
    (folder / "graphs.cpp").write_text(EMULATED)
    includes = [headers, CSRC, CSRC.parent / "tests" / "support" / "csrc"]
    command = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-DDSA_EMULATE", "-shared", "-fPIC"]
    command += [*(f"-I{path}" for path in includes), str(folder / "graphs.cpp"), "-o", str(folder / "graphs.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "graphs.so")).condition


@pytest.mark.parametrize("rows", [1, 3, 32, 33, 70])
def test_the_condition_is_whether_any_row_goes_on(condition, rows):
    """Flags of other slots, and what lies beside the flags, say the opposite."""
    for order, going in itertools.product((0, 1, 5), (None, 0, rows // 2, rows - 1)):
        slots = torch.randperm(90)[:rows]
        state = torch.full((90, 4), float(going is not None))
        state[slots, -1] = 1.0
        if going is not None:
            state[slots[going], -1] = 0.0
        flags = state[:, -1]
        arguments = (slots.data_ptr(), rows, flags.data_ptr(), flags.stride(0), order)
        kinds = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        assert condition(*(kind(value) for kind, value in zip(kinds, arguments))) == (going is not None)
