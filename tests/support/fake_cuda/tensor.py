"""Tensors of the pretend device, and the rules of a GPU that every operation on them is held to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .device import PINNED, READ, TO_DEVICE, TO_HOST, device, where

READS = {  # what the host cannot go on without
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "allclose",
}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "to"}
SHAPED = ("empty", "zeros", "ones", "full", "rand", "arange", "scalar_tensor", "new_", "eye", "linspace")
RANDOM = {"normal_", "uniform_", "random_", "exponential_"}


class CudaTensor(torch.Tensor):
    """Reports `cuda:N`; `inner` lies on the CPU, or on meta where it holds no data."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", index),
        )
        wrapper.inner, wrapper.index = inner, index
        wrapper._hold = device.memory.hold(inner)
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict):
        if id(self) not in memo:
            copy = CudaTensor(self.inner.clone(), self.index)
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]

    def __repr__(self):
        return f"CudaTensor({list(self.shape)}, {self.dtype}, cuda:{self.index})"

    def data_ptr(self) -> int:
        if self.inner.device.type == "cpu":
            return self.inner.data_ptr()
        return 512 * self.inner.untyped_storage()._cdata + self.inner.storage_offset() * self.inner.element_size()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def record_stream(self, stream) -> None:
        pass

    def tolist(self):
        device.event(READ, "tolist")
        return torch.zeros(self.shape, dtype=self.dtype).tolist() if self.inner.is_meta else self.inner.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert cuda:{self.index} device type tensor to numpy, at {where()}")

    def pin_memory(self, *_):
        raise RuntimeError(f"cannot pin a CUDA tensor, at {where()}")

    def is_pinned(self, *_) -> bool:
        return False


class CudaMode(TorchDispatchMode):
    """Sends what names the device (`torch.empty(3, device="cuda")`, `.to("cuda")`) the same way as its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args: tuple, kwargs: dict[str, Any]):
    """One operation: held to the rules, recorded where a stream is captured, computed on the inner tensors."""
    name = func.overloadpacket.__name__
    flat, spec = tree_flatten((args, kwargs))
    ours = [a for a in flat if isinstance(a, CudaTensor)]
    asked = next((a for a in flat if isinstance(a, torch.device)), None)
    to_cuda = asked is not None and asked.type == "cuda"
    if not ours and not to_cuda:
        return on_host(func, name, args, kwargs)
    check(name, args, kwargs, flat, ours, to_cuda, asked)
    if device.capturing:
        device.captured[name] += 1
    result = compute(func, name, args, flat, spec, ours, asked)
    if kwargs.get("pin_memory") and asked is not None and asked.type == "cpu":
        device.event(PINNED, name)
        return pinned(result)
    index = device.current if to_cuda and asked.index is None else asked.index if to_cuda else ours[0].index
    by_inner = {id(t.inner): t for t in ours}
    leaves = to_cuda or asked is None

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in by_inner:
            return by_inner[id(value)]
        return CudaTensor(value, index) if leaves else value

    return tree_map(wrapped, result)


def on_host(func, name: str, args: tuple, kwargs: dict[str, Any]):
    """An operation without a GPU tensor. Pinned memory is remembered as such: there is no driver to ask."""
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    device.event(PINNED, name)
    return pinned(func(*args, **(kwargs | {"pin_memory": False})))


PINNED_STORAGES: dict[int, StorageWeakRef] = {}


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """From now on its memory counts as pinned, whatever tensor lies on it."""
    for key in [key for key, reference in PINNED_STORAGES.items() if reference.expired()]:
        del PINNED_STORAGES[key]
    PINNED_STORAGES[storage(tensor)] = StorageWeakRef(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    return storage(tensor) in PINNED_STORAGES and not PINNED_STORAGES[storage(tensor)].expired()


# ---- the rules -------------------------------------------------------------------------------------------------------


def check(name: str, args, kwargs, flat, ours, to_cuda: bool, asked) -> None:
    """Raises RuntimeError for a mix of devices, in a capture also for what it forbids; else events."""
    host = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, CudaTensor)]
    if name in READS:
        device.event(READ, name)
    if name == "copy_":
        transfer(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
    elif name in COPIES:
        there = to_cuda if asked is not None else bool(ours)
        if isinstance(args[0], CudaTensor) != there:
            transfer_of(args[0], there, kwargs.get("non_blocking", False))
    elif name in INDEXING:
        index(name, args)
    else:
        mixed = [list(h.shape) for h in host if h.dim()]
        indices = {t.index for t in ours}
        if mixed or len(indices) > 1:
            others = f"cpu {mixed}" if mixed else f"cuda:{indices}"
            raise RuntimeError(
                f"{name}: all tensors must be on the same device, cuda:{ours[0].index} and {others}, at {where()}"
            )


def transfer(target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    if isinstance(target, CudaTensor) != isinstance(source, CudaTensor):
        host = source if isinstance(target, CudaTensor) else target
        transfer_of(host, isinstance(target, CudaTensor), non_blocking)


def transfer_of(host: torch.Tensor, to_device: bool, non_blocking: bool) -> None:
    """host: what says whether the host's memory is pinned. `.to("cpu")` makes its own, which is not."""
    kind = "pinned" if is_pinned(host) else "pageable"
    how = "asynchronous" if non_blocking and kind == "pinned" else "blocking"
    device.event(TO_DEVICE if to_device else TO_HOST, f"{kind}, {how}, {host.nbytes} bytes")


def index(name: str, args) -> None:
    if not isinstance(args[0], CudaTensor):
        raise RuntimeError(f"{name}: a CPU tensor indexed by a CUDA one, at {where()}")
    for i in args[1]:
        if i is None:
            continue
        if i.dtype in (torch.bool, torch.uint8):
            device.event(READ, f"{name} by a mask")
        if not isinstance(i, CudaTensor):
            transfer_of(i, True, False)
    if name.startswith(("index_put", "_index_put")) and not isinstance(args[2], CudaTensor) and args[2].dim():
        raise RuntimeError(f"{name}: values on the CPU, at {where()}")


# ---- computing -------------------------------------------------------------------------------------------------------


def compute(func, name: str, args: tuple, flat: list, spec, ours: list, asked):
    """The operation on the inner tensors: on the CPU, or on meta where an operand or the result holds no data."""
    inner = [a.inner if isinstance(a, CudaTensor) else a for a in flat]
    to_host = asked is not None and asked.type == "cpu"
    empty = any(t.is_meta for t in inner if isinstance(t, torch.Tensor))
    if empty and to_host and name in COPIES:  # what was never there reads as zeros
        source = next(t for t in inner if isinstance(t, torch.Tensor))
        dtype = next((a for a in flat if isinstance(a, torch.dtype)), source.dtype)
        return torch.zeros(source.shape, dtype=dtype)
    if name == "_local_scalar_dense" and empty:
        return 0
    if not empty and (too_big(name, args, inner, asked) or name in RANDOM and too_many(inner[0])):
        empty = True
    place = "meta" if empty else "cpu"
    given, target = list(inner), next((t for t in inner if isinstance(t, torch.Tensor)), None)
    if func._schema.is_mutable and empty and target is not None and not target.is_meta:
        return target  # values that are not there are written to some that are: they stay as they were
    for i, value in enumerate(given):
        if isinstance(value, torch.device):
            given[i] = torch.device(place) if value.type == "cuda" else value
        elif isinstance(value, torch.Tensor) and empty and not value.is_meta:
            given[i] = value.to("meta")
    args, kwargs = tree_unflatten(given, spec)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    if empty and "generator" in kwargs:  # meta draws nothing
        kwargs["generator"] = None
    if name == "copy_":
        args = args[:2]
    capture = device.capture if device.capturing else None
    if capture is not None and func._schema.is_mutable:
        out = kwargs.get("out", args[0])
        if not empty:
            capture.record(func, args, kwargs, ())
        if not empty and capture.owns(out):
            func(*args, **kwargs)
        return original(out, given, inner)
    result = func(*args, **kwargs)
    if name.startswith(("empty", "new_empty")) and not empty:
        result.zero_()  # so that every run is the same
    if capture is not None and not empty:
        capture.made(func, args, kwargs, result, [t for t in given if isinstance(t, torch.Tensor)])
    result = tree_map(lambda value: original(value, given, inner), result)
    if device.no_data is None or to_host:
        return result
    known = {storage(t) for t in inner if isinstance(t, torch.Tensor)}
    return tree_map(lambda t: t.to("meta") if too_many(t) and storage(t) not in known else t, result)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def original(value, given: list, inner: list):
    """The operand that an operation has returned, as it was before it was moved to meta."""
    return next((before for after, before in zip(given, inner) if value is after), value)


def too_many(value) -> bool:
    """Whether a tensor holds data that it should not: it was made here, views of what holds data stay with it."""
    limit = device.no_data
    return limit is not None and isinstance(value, torch.Tensor) and not value.is_meta and value.numel() > limit


def too_big(name: str, args: tuple, inner: list, asked) -> bool:
    """Whether what an operation makes is too big to hold data, so that it is not even allocated."""
    if device.no_data is None:
        return False
    if name in COPIES:
        return (asked is None or asked.type == "cuda") and too_many(inner[0])
    if name.endswith("_like"):
        return too_many(inner[0])
    if not name.startswith(SHAPED):
        return False
    size = next((a for a in args if isinstance(a, (list, tuple))), args if name == "arange" else ())
    return math.prod(size) > device.no_data
