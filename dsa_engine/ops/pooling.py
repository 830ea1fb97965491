"""Per-frame statistics of the last hidden states, which the confidence head reads."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import implementation


def pool_frames(hidden: Tensor, frames: int, eps: float) -> Tensor:
    """Mean and standard deviation over a frame's tokens of LayerNorm(hidden).

    hidden [B, F * S, C] -> [B, F, 2 C] float32.
    """
    return implementation("pool_frames")(hidden, frames, eps)
