"""Linear layers: several of one input as one GEMM, and the FP8 stand-in for `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_engine import ops
from dsa_engine.kernel_types import RowwiseFP8


class FP8Linear(nn.Module):
    """weight [N, K] e4m3, scale [N, 1] float32 per output channel, bias [N]; the output has the bias's dtype."""

    def __init__(self, weight: RowwiseFP8, bias: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        for name, value in (("weight", weight.values), ("scale", weight.scale), ("bias", bias)):
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Linear]) -> list[FP8Linear]:
        """Quantized layers of one input; their weights are packed, so that one GEMM can serve all of them."""
        whole = ops.quantize(torch.cat([layer.weight for layer in layers]))
        bias = torch.cat([layer.bias for layer in layers])
        parts = [x.split([layer.out_features for layer in layers]) for x in (*whole, bias)]
        return [cls(RowwiseFP8(values, scale), b) for values, scale, b in zip(*parts)]

    @property
    def rowwise(self) -> RowwiseFP8:
        return RowwiseFP8(self.weight, self.scale)

    def forward(self, x: Tensor | RowwiseFP8) -> Tensor:
        return ops.fp8_linear(x, self.rowwise, self.bias, self.bias.dtype)

    def gelu(self, x: Tensor | RowwiseFP8) -> RowwiseFP8:
        """gelu of the output, in FP8 for the next layer: the bias is added with the activation, not before."""
        return ops.gelu_bias(ops.fp8_linear(x, self.rowwise, None, self.bias.dtype), self.bias, fp8=True)


def fused_linear(x: Tensor | RowwiseFP8, layers: Sequence[nn.Linear | FP8Linear]) -> Sequence[Tensor]:
    """Every layer's output for one x [..., in], on a GPU by a single GEMM.

    On a CPU that is no faster. Weights that are trained, and torch.compile, which knows no addresses, take one GEMM per
    layer too.
    """
    trained = torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters())
    device = x.values.device if isinstance(x, RowwiseFP8) else x.device
    if device.type != "cuda" or trained or torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    return fused_gemm(x, layers)


def fused_gemm(x: Tensor | RowwiseFP8, layers: Sequence[nn.Linear | FP8Linear]) -> Sequence[Tensor]:
    """Every layer's output for one x [..., in]: views of one tensor [..., sum of their widths]."""
    weight, bias = (pack_parameters([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    if isinstance(x, RowwiseFP8):
        scale = pack_parameters([layer.scale for layer in layers])
        y = ops.fp8_linear(x, RowwiseFP8(weight, scale), bias, bias.dtype)
    else:
        y = F.linear(x, weight, bias)
    return y.split([layer.out_features for layer in layers], dim=-1)


def pack_parameters(parts: Sequence[nn.Parameter]) -> Tensor:
    """Parameters [n, ...] as one tensor [sum of n, ...] that shares their memory.

    They are packed into one contiguous tensor on first use and re-packed after anything that reallocates them
    (`Module.to`, `deepcopy`, `load_state_dict`). Each stays a parameter of its own, with its name.
    """
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            break
        end += part.nbytes
    else:
        storage = first.untyped_storage()  # neighbours may still be allocations of their own
        if end <= storage.data_ptr() + storage.nbytes():
            return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    with torch.inference_mode(False), torch.no_grad():  # trained later, they must not be inference tensors
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts])):
            part.data = view
    return whole
