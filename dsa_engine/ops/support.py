"""Backend selection as data: what a call is, and what each backend supports."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
E4M3 = torch.float8_e4m3fn


class Call(NamedTuple):
    """The properties of a call that decide whether a backend has a kernel for it. None: unknown, no objection."""

    op: str
    capability: tuple[int, int] | None  # of the CUDA device; None: CPU
    dtype: torch.dtype | None = None  # of the first tensor
    head_dim: int | None = None
    stored: torch.dtype | None = None
    index: int = 0  # type: ignore[assignment]

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch.")] if self.dtype else []
        parts += [f"head dim {self.head_dim}"] if self.head_dim else []
        parts += [f"{str(self.stored).removeprefix('torch.')} stored"] if self.stored else []
        return f"{self.op} ({', '.join(parts)})" if parts else self.op


class Kind(Enum):
    """Why a backend does not run a call. NO_OP and CALL: it works here, but has no kernel for this op or these tensors;
    NOT_INSTALLED and DEVICE: it cannot run this op here at all."""

    NO_OP = "no such op"
    NOT_INSTALLED = "not installed"
    DEVICE = "not on this device"
    CALL = "not for this dtype or shape"


class Reason(NamedTuple):
    kind: Kind
    text: str

    @property
    def here(self) -> bool:
        """Whether the backend does run here, for other ops or other tensors."""
        return self.kind in (Kind.NO_OP, Kind.CALL)


class Limits(NamedTuple):
    """The calls that a kernel supports. An unknown dtype or head dim passes."""

    dtypes: tuple[torch.dtype, ...] = FLOATS
    stored: tuple[torch.dtype, ...] = (*FLOATS, E4M3)
    head_dim: Callable[[int, torch.dtype | None], bool] = lambda dim, stored: True  # (head dim, stored dtype)
    head_dims: str = "any"  # in words

    def refuse(self, backend: str, call: Call) -> Reason | None:
        for dtype, those in ((call.dtype, self.dtypes), (call.stored, self.stored)):
            if dtype is not None and dtype not in those:
                return Reason(Kind.CALL, f"{backend} takes {' or '.join(map(str, those))}, not {dtype}")
        if call.head_dim is not None and not self.head_dim(call.head_dim, call.stored):
            return Reason(Kind.CALL, f"{backend} takes head dims {self.head_dims}, not {call.head_dim}")
        return None
