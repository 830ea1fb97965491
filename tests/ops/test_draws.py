"""Where the tests for a GPU draw their inputs: on the GPU. One thread of a CPU takes 20 ns per value, 4 s for the keys
and values of one attention at its real size. The meta device stands in for the GPU: it draws nothing."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops import test_attention_kernel, test_fp8_linear, test_norm_silu
from tests.support import kernels

META = torch.device("meta")
BF16 = torch.bfloat16


class Drawn(TorchDispatchMode):
    """The largest random tensor that was made on the CPU."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in func.__name__ for word in ("rand", "normal", "uniform")) and out.device.type == "cpu":
            self.elements = max(self.elements, out.numel())
        return out


class Stop(Exception):
    """The inputs are drawn."""


def stop(*_):
    raise Stop


def attention():
    """Until the kernel is called."""
    runs = [(0, 3), (6, 15)]
    test_attention_kernel.check_attention(1, 4680, 12, 128, 1560, 21, 2, [1], [runs], BF16, BF16, 2)


CASES = {
    "attention": attention,
    "norm_silu": lambda: test_norm_silu.case(1, 12, 480 * 832, 96, BF16, 2),
    "split_rows": lambda: kernels.split_rows(2, 4680, 1536, dtype=BF16),
    "surrounded": lambda: test_fp8_linear.surrounded(2, 4680, 8960, dtype=BF16),
}


@pytest.mark.parametrize("name", CASES)
def test_inputs_of_real_size_are_drawn_on_the_device(name, monkeypatch):
    for module in (kernels, test_attention_kernel, test_norm_silu, test_fp8_linear):
        monkeypatch.setattr(module, "DEVICE", META)
    monkeypatch.setattr(test_attention_kernel.kernel, "attention", stop)
    with Drawn() as drawn:
        with suppress(Stop):
            CASES[name]()
    assert drawn.elements < 10**6
