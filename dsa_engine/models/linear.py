"""A linear layer in FP8, in the place of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsa_engine import ops
from dsa_engine.kernel_types import Rowwise


class Fp8Linear(nn.Module):
    """weight [N, K] e4m3, scale [N, 1] float32, one an output channel, bias [N]; the output has the bias's dtype."""

    def __init__(self, weight: Rowwise, bias: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        for name, value in (("weight", weight.values), ("scale", weight.scale), ("bias", bias)):
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Linear]) -> list[Fp8Linear]:
        """Layers of one input, quantised; their numbers lie side by side, so that one product can serve all of them."""
        whole = ops.quantise(torch.cat([layer.weight for layer in layers]))
        bias = torch.cat([layer.bias for layer in layers])
        parts = [x.split([layer.out_features for layer in layers]) for x in (*whole, bias)]
        return [cls(Rowwise(values, scale), b) for values, scale, b in zip(*parts)]

    @property
    def rowwise(self) -> Rowwise:
        return Rowwise(self.weight, self.scale)

    def forward(self, x: Tensor | Rowwise) -> Tensor:
        return ops.fp8_linear(x, self.rowwise, self.bias, self.bias.dtype)

    def gelu(self, x: Tensor | Rowwise) -> Rowwise:
        """gelu of the output, as the next FP8 layer takes it: the bias is added with the activation, not before."""
        return ops.gelu_bias(ops.fp8_linear(x, self.rowwise, None, self.bias.dtype), self.bias, fp8=True)
