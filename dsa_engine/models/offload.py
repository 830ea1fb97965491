"""CPU offload: parts of a model that live on the CPU and are on the device only while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.models.streaming_vae import FeatureCache, State, StreamingVAE


class DeviceSwap:
    """A module's weights, kept on the CPU, are on a device between `__enter__` and `__exit__`.

    They are frozen and nothing writes them, so nothing is copied back. pin: page-locked on the CPU, for asynchronous
    copies to a CUDA device; torch's allocator rounds each such tensor up to a power of two.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, pin: bool = False):
        self.device = torch.device(device)
        entries, on_cpu = list(_tensor_entries(module)), {}
        for _, _, tensor in entries:
            if id(tensor) not in on_cpu:  # what is shared stays one tensor
                plain = tensor.detach().cpu()
                on_cpu[id(tensor)] = _like(tensor, plain.pin_memory() if pin and self.device.type == "cuda" else plain)
        self._on_cpu = [(table, name, on_cpu[id(tensor)]) for table, name, tensor in entries]
        self.__exit__()

    def __enter__(self) -> DeviceSwap:
        with torch.inference_mode(False):  # a parameter cannot be an inference tensor
            copies = {id(t): _like(t, t.detach().to(self.device, non_blocking=True)) for _, _, t in self._on_cpu}
        for table, name, tensor in self._on_cpu:
            table[name] = copies[id(tensor)]
        return self

    def __exit__(self, *_: Any) -> None:
        for table, name, tensor in self._on_cpu:
            table[name] = tensor


def _tensor_entries(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(the table that holds it, its name there, the tensor) of all parameters and buffers."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def add_offload_hooks(module: nn.Module, device: torch.device | str, pin: bool = False) -> None:
    """Keep a module's weights on the CPU, and on the device while its forward runs. pin: as for `DeviceSwap`.

    The tensors that it is called with are moved to the device too; its results stay there.
    """
    swap = DeviceSwap(module, device, pin)

    def to_device(value: Any) -> Any:
        return value.to(swap.device) if isinstance(value, Tensor) else value

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        moved = tuple(map(to_device, args)), {name: to_device(value) for name, value in kwargs.items()}
        swap.__enter__()
        return moved

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(swap.__exit__, always_call=True)


class OffloadedFeatureCache(FeatureCache):
    """A pass with its state on the CPU: each layer's part is copied to the device when needed, and back at once."""

    def __init__(self, state: State | None, axis: int, device: torch.device):
        super().__init__(None if state is None else (t.to(device, non_blocking=True) for t in state), axis)

    def _store(self, frames: Tensor) -> Tensor:
        frames = super()._store(frames)  # dense, and the copy in the same order, so that it is a single transfer
        on_cpu = torch.empty_like(frames, device="cpu", pin_memory=frames.is_cuda)
        return on_cpu.copy_(frames, non_blocking=True)


class OffloadedCodec(nn.Module):
    """A `VideoCodec` that takes no device memory between two calls: its weights and its streams' states are on the CPU.

    It decodes one latent frame at a time, which bounds the memory and changes no result; for each the state is copied
    to the device and back (the Wan VAE's is 1.9 GB at 480 x 832 in bfloat16). A state is a tuple of CPU tensors. Calls
    from several threads wait for each other.
    """

    def __init__(self, codec: nn.Module, device: torch.device | str):
        super().__init__()
        self.codec, self.device = codec, torch.device(device)
        self._swap, self._lock = DeviceSwap(codec, device, pin=True), threading.Lock()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # strides, channels and the arithmetic of frames are the codec's own
            return getattr(super().__getattr__("codec"), name)

    def encode(self, frames: Tensor) -> Tensor:
        with self._lock, self._swap:
            return self.codec.encode(frames.to(self.device))

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with self._lock, self._swap:
            latents, codec = latents.to(self.device), self.codec
            if not isinstance(codec, StreamingVAE):
                return codec.decode(latents, state)
            frames, state = codec.decode_passes(
                latents, state, 1, lambda s: OffloadedFeatureCache(s, codec.time_axis, self.device)
            )
            if self.device.type == "cuda":  # whoever copies the state next must find it whole
                torch.cuda.current_stream(self.device).synchronize()
            return frames, state
