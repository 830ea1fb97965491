"""Shared by the tests of the Triton kernels: where they run, hostile inputs, and the comparison.

The kernels run on a GPU where there is one and in Triton's interpreter on CPU tensors otherwise (`conftest.py` sets
TRITON_INTERPRET, importing this file puts the interpreter right). Import the kernels after this file:

    from tests.support.kernels import DEVICE, DTYPES, compare, poison
    from dsa_engine.triton_kernels import norm_rope as kernel
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.micro.inputs import poisoned_memory as poisoned_memory
from tests.support import interpreter

interpreter.install()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Plain torch may be right to the last bit by luck, so a kernel may always be off by this much of the largest expected
# value: a few roundings of float32, in which every kernel sums.
FLOOR = 2.0**-20


def compare(kernel: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> tuple[float, float]:
    """The kernel's largest error is at most `factor` times plain torch's, both against `exact`.

    kernel, plain: outputs in the dtype of the test; exact: the same in float32 or, better, float64. Returns both
    errors, relative to the largest expected magnitude. A failure names the worst element; NaN and inf always fail.
    """
    assert kernel.shape == plain.shape == exact.shape, (kernel.shape, plain.shape, exact.shape)
    assert kernel.dtype == plain.dtype, (kernel.dtype, plain.dtype)
    if exact.numel() == 0:
        return 0.0, 0.0
    # On the kernel's device: a CPU's one thread takes seconds for the 80 million values of a real output.
    kernel, plain, exact = (x.detach().to(kernel.device, torch.float64) for x in (kernel, plain, exact))
    largest = exact.abs().max().item()
    error, allowed = (kernel - exact).abs(), factor * (plain - exact).abs().max().item() + FLOOR * largest
    worst = error.nan_to_num(nan=float("inf")).argmax()
    where = [i.item() for i in torch.unravel_index(worst, error.shape)]
    assert error.flatten()[worst] <= allowed, (
        f"worst element {where}: kernel {kernel.flatten()[worst]:.6g}, plain {plain.flatten()[worst]:.6g}, exact "
        f"{exact.flatten()[worst]:.6g}; error {error.flatten()[worst]:.3g}, allowed {allowed:.3g} = {factor:g} x plain "
        f"torch's largest error and {FLOOR:.1e} of {largest:.3g}"
    )
    scale = largest or 1.0
    return error.max().item() / scale, (plain - exact).abs().max().item() / scale


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN everywhere, on the device of the kernels: for outputs that must be written and inputs that must not be read.

    Every bit is set, which is NaN in all dtypes, those of FP8 included, and -1 in integers.
    """
    return torch.full((*shape, dtype.itemsize), 255, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def nan_cache(cache: Tensor, used: dict[int, list[int]]) -> Tensor:
    """A copy of cache [N, W, ...] with NaN in every slot and frame but those of `used`: {slot: [frames]}."""
    copy = poison(*cache.shape, dtype=cache.dtype)
    for slot, frames in used.items():
        copy[slot, frames] = cache[slot, frames].to(copy.device)
    return copy


def split_rows(*shape: int, dtype: torch.dtype, parts: int = 3, scale: float = 1.0) -> tuple[Tensor, ...]:
    """`parts` random tensors [..., C] that are views of one [..., parts * C], as the fused linear layer of q, k and v
    gives."""
    whole = scale * torch.randn(*shape[:-1], parts * shape[-1], device=DEVICE)
    return whole.to(dtype).chunk(parts, dim=-1)
