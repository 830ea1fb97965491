"""Triton kernels on the pretend device: interpreted on the inner tensors, or compiled for an architecture and not run.

Either way the launch is held to what a GPU asks: tensors on the current device, a grid within its limits and, compiled,
shared memory within the architecture's.
"""

from __future__ import annotations

from collections import Counter

import torch

from .device import device, where
from .tensor import CudaTensor

launches: Counter[str] = Counter()  # by kernel
compiled: dict[str, tuple[str, int]] = {}  # hash -> kernel, bytes of shared memory
late: Counter[str] = Counter()  # kernels that were first compiled inside a capture


def check_launch(kernel: str, args, grid) -> None:
    for i, a in enumerate(args):
        if not isinstance(a, torch.Tensor):
            continue
        if not isinstance(a, CudaTensor):
            raise ValueError(f"{kernel}: argument {i} is a CPU tensor {list(a.shape)}, at {where()}")
        if a.index != device.current:
            raise RuntimeError(
                f"{kernel}: argument {i} on cuda:{a.index}, launched on the current device, "
                f"cuda:{device.current}: an illegal access, at {where()}"
            )
    grid = (*grid, 1, 1)[:3]
    if not (0 < grid[0] < 2**31 and all(0 < n < 65536 for n in grid[1:])):
        raise RuntimeError(f"{kernel}: grid {grid} is outside the limits, at {where()}")
    launches[kernel] += 1


def interpret() -> None:
    """Launches run in Triton's interpreter (TRITON_INTERPRET=1), and again with each replay of a capture."""
    from triton.runtime.interpreter import InterpretedFunction

    from tests.support import interpreter

    interpreter.install()  # bfloat16 and FP8 done right
    run = InterpretedFunction.run

    def launch(self, *args, grid, warmup=False, **kwargs):
        shape = grid(kwargs) if callable(grid) else grid
        check_launch(self.fn.__name__, (*args, *kwargs.values()), shape)
        args = [a.inner if isinstance(a, CudaTensor) else a for a in args]
        kwargs = {k: v.inner if isinstance(v, CudaTensor) else v for k, v in kwargs.items()}

        def go():
            run(self, *args, grid=grid, warmup=warmup, **kwargs)

        if device.capturing:
            device.capture.record(go, (), {}, ())
        else:
            go()

    InterpretedFunction.run = launch


def compile_for(arch: int) -> None:
    """Launches compile the kernel with the arguments that they have, and do nothing else."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tests.support.triton_compile import CHIPS, AheadOfTime

    driver.set_active(AheadOfTime(arch))
    run = JITFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__
        check_launch(name, (*args, *kwargs.values()), grid(kwargs) if callable(grid) else grid)
        stand_ins = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
        kernel = run(self, *stand_ins, grid=grid, warmup=True, **kwargs)
        shared = kernel.metadata.shared
        if kernel.hash not in compiled:
            compiled[kernel.hash] = (name, shared)
            late[name] += device.capturing
        if shared > CHIPS[arch].limit:
            raise RuntimeError(
                f"{name}: {shared} bytes of shared memory, sm_{arch} has {CHIPS[arch].limit}, at {where()}"
            )

    JITFunction.run = launch


class Pointer:
    """Of a tensor what Triton's specialisation reads: its type and whether its address is a multiple of 16."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self._tensor = tensor.dtype, tensor

    def data_ptr(self) -> int:
        return self._tensor.data_ptr()

    def element_size(self) -> int:
        return self._tensor.element_size()
