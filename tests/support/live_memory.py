"""Bytes of tensors that a computation keeps alive, also on the meta device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that a computation makes and keeps alive, at their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, 0)  # it was there before
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._see(tensor, tensor.untyped_storage().nbytes())
        return out

    def _see(self, tensor, count):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = weakref.finalize(storage, self._forget, storage._cdata, count)
            self.now += count
            self.peak = max(self.peak, self.now)

    def _forget(self, key, count):
        del self._known[key]
        self.now -= count


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options).to("meta", torch.bfloat16).requires_grad_(False).eval()


def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)
