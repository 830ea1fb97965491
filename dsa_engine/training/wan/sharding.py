"""A module's weights spread over the processes of a run: FSDP2, and state that does not depend on how many there are.

Source: `torch.distributed.fsdp.fully_shard`. A checkpoint holds whole tensors, gathered one at a time, so a run may be
resumed by any number of processes, one included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dsa_engine.models.dit import CausalDiT, DiTOutput


class Pass(nn.Module):
    """A DiT under one way to run it: forward(*args) = function(dit, *args).

    All that a pass needs of the weights happens inside this module's forward, as FSDP's hooks must see it: a DiT's
    `text_kv` and `forward` one after the other would be two.
    """

    def __init__(self, dit: CausalDiT, function: Callable[..., DiTOutput]):
        super().__init__()
        self.dit, self.function = dit, function

    def forward(self, *args: Any) -> DiTOutput:
        return self.function(self.dit, *args)


def shard(module: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Spread a module's parameters over all processes, in place; each is gathered while it is used.

    Of a `Pass` the attentions and feed-forwards of all blocks are gathered one by one, and the rest, which blocks
    share, as one. dtype: that weights are gathered and used in (None: their own); gradients are averaged in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Also the outermost part goes back after its forward: outside of one, parameters and their gradients are always
    # this process's own, for zero_grad, the optimizer and checkpoints.
    options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": True}
    if isinstance(module, Pass):
        for block in module.dit.blocks:
            for part in (block.self_attn, block.cross_attn, block.ffn):
                fully_shard(part, **options)
            register_fsdp_forward_method(block.cross_attn, "keys_values")
    fully_shard(module, **options)
    # A pass changes nothing in place (`tests/training/test_sharding.py` compares the gradients).
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def spread_like(module: nn.Module, sharded: nn.Module) -> None:
    """Replace a module's parameters by frozen copies of those of a sharded module of the same structure."""
    for name, value in sharded.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(value.detach().clone(), requires_grad=False))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Whole parameters of a module, sharded or not, into one of the same structure that is not, in its dtype."""
    for value, own in zip(source.parameters(), target.parameters()):
        own.copy_(whole(value))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in place; a plain tensor is itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; each must ask. A plain tensor is itself.

    FSDP gives every process ceil(n / processes) rows and the last ones fewer, or none. `DTensor.full_tensor` does the
    same, ten times slower for small tensors.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    own, processes = tensor.to_local(), tensor.device_mesh.size()
    rows = -(-len(tensor) // processes)
    padded = own.new_zeros(rows, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded, tensor.device_mesh.get_group())
    return torch.cat(parts)[: len(tensor)]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float) -> None:
    """Scale gradients so that the norm of all of them, over all processes, is at most `most`.

    `nn.utils.clip_grad_norm_` on this process's parts: on lists of hundreds of DTensors it takes seconds.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(square)
    torch._foreach_mul_(gradients, (most / (square.sqrt() + 1e-6)).clamp(max=1.0))


def gathered(state: Any) -> Any:
    """A nested state with whole tensors on process 0's CPU; the others, who must all take part, get None for them.

    One tensor at a time is whole on the device.
    """
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value) for value in state)
    if isinstance(state, DTensor):
        value = whole(state)
        return value.cpu().clone() if dist.get_rank() == 0 else None
    return state


def like(value: Tensor, own: Tensor) -> Tensor:
    """A copy of this process's part of a whole tensor, spread as `own` is. No communication."""
    if not isinstance(own, DTensor):
        return value.clone()
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).clone()
