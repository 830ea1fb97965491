"""Parts of a model that live on the CPU and are on the device only where they are at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.models.streaming_vae import State, Stream, StreamingVAE


class Loan:
    """A module's weights, which are at home on the CPU, on a device between `__enter__` and `__exit__`.

    They are frozen and nothing writes them, so nothing is copied back. pin: page-locked at home for a CUDA device,
    which then fetches them by itself; torch's allocator rounds each such tensor up to a power of two.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, pin: bool = False):
        self.device = torch.device(device)
        slots, home = list(_slots(module)), {}
        for _, _, tensor in slots:
            if id(tensor) not in home:  # what is shared stays one tensor
                plain = tensor.detach().cpu()
                home[id(tensor)] = _like(tensor, plain.pin_memory() if pin and self.device.type == "cuda" else plain)
        self._home = [(table, name, home[id(tensor)]) for table, name, tensor in slots]
        self.__exit__()

    def __enter__(self) -> Loan:
        with torch.inference_mode(False):  # a parameter cannot be an inference tensor
            there = {id(t): _like(t, t.detach().to(self.device, non_blocking=True)) for _, _, t in self._home}
        for table, name, tensor in self._home:
            table[name] = there[id(tensor)]
        return self

    def __exit__(self, *_: Any) -> None:
        for table, name, tensor in self._home:
            table[name] = tensor


def _slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """(the table that holds it, its name there, the tensor) of all parameters and buffers."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def lend(module: nn.Module, device: torch.device | str, pin: bool = False) -> None:
    """From now on a module's weights live on the CPU, and on the device while its forward runs. pin: as for `Loan`.

    The tensors that it is called with are moved there too; its results stay there.
    """
    loan = Loan(module, device, pin)

    def moved(value: Any) -> Any:
        return value.to(loan.device) if isinstance(value, Tensor) else value

    def take(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}
        loan.__enter__()
        return given

    module.register_forward_pre_hook(take, with_kwargs=True)
    module.register_forward_hook(loan.__exit__, always_call=True)


class HomeStream(Stream):
    """A pass whose past lies on the CPU: each layer's comes when its turn does, and its tail goes home at once."""

    def __init__(self, state: State | None, axis: int, device: torch.device):
        super().__init__(None if state is None else (t.to(device, non_blocking=True) for t in state), axis)

    def _kept(self, tail: Tensor) -> Tensor:
        tail = super()._kept(tail)  # dense, and home in the same order, so that it goes as one piece
        home = torch.empty_like(tail, device="cpu", pin_memory=tail.is_cuda)
        return home.copy_(tail, non_blocking=True)


class Offloaded(nn.Module):
    """A `VideoCodec` that takes nothing of the device between two calls: its weights and the states of its streams are
    on the CPU, each on the device only while it is needed.

    It decodes one latent frame at a time, which bounds the memory and changes no result; for each the state goes there
    and back (the Wan VAE's is 1.9 GB at 480 x 832 in bfloat16). A state is a tuple of CPU tensors, good for a second
    use as always. Calls from several threads wait for each other.
    """

    def __init__(self, codec: nn.Module, device: torch.device | str):
        super().__init__()
        self.codec, self.device = codec, torch.device(device)
        self._loan, self._lock = Loan(codec, device, pin=True), threading.Lock()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # strides, channels and the arithmetic of frames are the codec's own
            return getattr(super().__getattr__("codec"), name)

    def encode(self, frames: Tensor) -> Tensor:
        with self._lock, self._loan:
            return self.codec.encode(frames.to(self.device))

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        with self._lock, self._loan:
            if isinstance(self.codec, StreamingVAE):
                return self._stream(latents.to(self.device), state)
            return self.codec.decode(latents.to(self.device), state)

    def _stream(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        codec = self.codec
        codec._check("latents", latents, codec.latent_channels)
        dtype, frames = next(codec.parameters()).dtype, []
        for piece in latents.split(1, dim=1):
            stream = HomeStream(state, codec.time_axis, self.device)
            frames.append(codec._decode(piece.to(dtype), stream))
            state = tuple(stream.tails)
        if self.device.type == "cuda":  # whoever copies the state next must find it whole
            torch.cuda.current_stream(self.device).synchronize()
        return torch.cat(frames, dim=1), state
