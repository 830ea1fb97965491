"""A frame's hidden states as a few vectors, the input of a confidence head."""

from __future__ import annotations

from collections.abc import Sequence

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
    _check_frames("pool_frames", hidden, frames)
    return resolve("pool_frames", hidden)(hidden, frames, eps)


def attention_pool(hidden: Sequence[Tensor], queries: Tensor, frames: int, eps: float) -> Tensor:
    """Softmax-weighted means over a frame's tokens of n = LayerNorm(hidden), of several blocks' tokens at once:

        out_q = sum_s softmax_s(queries_q . n_s) n_s

    Cross-attention of a query u to keys K n and values V n is V out_q with queries_q = K^T u / sqrt(E).

    Args:
        hidden: [B, F * S, C] of each of N blocks.
        queries: [N, Q, C], each block's own.
        frames: F.
        eps: Of the LayerNorm.

    Returns:
        [B, F, N, Q, C] float32.

    Raises:
        ValueError: The tokens do not divide into frames, or the queries are not as many or as wide.
    """
    for h in hidden:
        _check_frames("attention_pool", h, frames)
    fits = queries.ndim == 3 and queries.numel() and queries.shape[::2] == (len(hidden), hidden[0].shape[2])
    if not fits or any(h.shape != hidden[0].shape for h in hidden):
        raise ValueError(
            f"attention_pool: queries {list(queries.shape)} must be [N, Q, C] for hidden "
            f"{[list(h.shape) for h in hidden]} of N blocks, [B, T, C] each"
        )
    leading = queries if queries.requires_grad else hidden[0]  # a gradient of either needs plain torch
    return resolve("attention_pool", leading)(hidden, queries, frames, eps)


def _check_frames(op: str, hidden: Tensor, frames: int) -> None:
    if hidden.ndim != 3 or frames < 1 or hidden.shape[1] % frames:
        raise ValueError(f"{op}: hidden {list(hidden.shape)} must be [B, F * S, C] with F = {frames}")
