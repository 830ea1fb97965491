"""Initial weights for a causal DiT that is trained from nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.rope import axis_pairs

PHASES = (-1, 0, -3)  # frames: head 0 looks at the previous frame, head 1 at its own, head 2 one chunk of three back


def init_weights(model: CausalDiT, generator: torch.Generator | None = None) -> CausalDiT:
    """Xavier projections, quiet outputs, identity-like modulation, three heads that attend to given frames at once.

    A biased query and key make a head's first attention a function of relative position alone: with query phase
    dt * rate_j and key phase 0, RoPE peaks dt frames away. It gives small models the use of context early.
    """
    config = model.config
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.data.view(config.dim, -1), generator=generator)
    nn.init.zeros_(model.patch_embedding.bias)
    dit: Any = model
    for layer in (dit.time_projection[1], dit.head.head):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(dit.head.modulation)
    for block in dit.blocks:
        for out in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            nn.init.normal_(out.weight, std=0.02 / math.sqrt(config.num_layers), generator=generator)
        nn.init.zeros_(block.modulation)
        block.modulation.data[:, [2, 5]] = 1.0
        _aim_heads(block.self_attn, config)
    return model


@torch.no_grad()
def _aim_heads(attention, config) -> None:
    heads, d = min(len(PHASES), config.num_heads), config.head_dim
    rates, turns = [], []
    for axis, pairs in enumerate(axis_pairs(d)):
        rate = config.rope_theta ** (-torch.arange(pairs) / pairs)
        rates.append(rate if axis == 0 else torch.zeros(pairs))
        turns.append(rate > 0.05)  # slower pairs hardly distinguish neighbouring frames
    rate, turning = torch.cat(rates), torch.cat(turns).float()
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        phase = PHASES[head] * rate
        attention.q.bias[rows] = 3 * torch.stack((phase.cos() * turning, phase.sin() * turning), -1).flatten()
        attention.k.bias[rows] = 3 * torch.stack((turning, torch.zeros_like(turning)), -1).flatten()
        for projection, norm in ((attention.q, attention.norm_q), (attention.k, attention.norm_k)):
            projection.weight[rows] *= 0.3
            norm.weight[rows] = 2.5
