"""Per-frame statistics of the last hidden states, the input of the confidence head."""

from __future__ import annotations

from torch import Tensor

from dsa_engine.ops.dispatch import resolve


def pool_frames(hidden: Tensor, frames: int, eps: float) -> Tensor:
    """Mean and standard deviation over a frame's tokens of LayerNorm(hidden).

    Args:
        hidden: [B, F * S, C].
        frames: F.
        eps: Of the LayerNorm, and added to the variance.

    Returns:
        [B, F, 2 C] float32.

    Raises:
        ValueError: The tokens do not divide into frames.
    """
    if hidden.ndim != 3 or frames < 1 or hidden.shape[1] % frames:
        raise ValueError(f"pool_frames: hidden {list(hidden.shape)} must be [B, F * S, C] with F = {frames}")
    return resolve("pool_frames", hidden)(hidden, frames, eps)
