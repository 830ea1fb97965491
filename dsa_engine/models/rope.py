"""3-D rotary position embedding of Wan 2.1, for any frame position."""

from __future__ import annotations

import torch


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs of the time, height and width axes: 22, 21, 21 for D = 128; 6, 5, 5 for D = 32."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def rates(pairs: int, theta: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Radians a step of an axis with `pairs` pairs: theta ** (-j / pairs), float64."""
    return theta ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)


def rope_table(
    frames: torch.Tensor, height: int, width: int, head_dim: int, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every token's angles, in token order (frame, row, column).

    Pair j of an axis with n pairs turns by `p * theta ** (-j / n)` at coordinate p. Angles are taken in float64, since
    a frame position has no upper end (Wan's own table stops at 1024) and float32 loses 1e-4 rad near 2,000.

    frames: [B, F] absolute frame positions (integer, on the device); height, width: the token grid of a frame.
    Returns cos, sin: [B, F * height * width, head_dim / 2] float32.
    """
    batch, count = frames.shape
    device = frames.device

    def angles(coordinate: torch.Tensor, pairs: int) -> torch.Tensor:
        return coordinate.to(torch.float64)[..., None] * rates(pairs, theta, device)

    nt, nh, nw = axis_pairs(head_dim)
    grid = (batch, count, height, width)
    t = angles(frames, nt)[:, :, None, None].expand(*grid, nt)
    h = angles(torch.arange(height, device=device), nh)[None, None, :, None].expand(*grid, nh)
    w = angles(torch.arange(width, device=device), nw)[None, None, None, :].expand(*grid, nw)
    table = torch.cat((t, h, w), dim=-1).reshape(batch, count * height * width, head_dim // 2)
    return table.cos().float(), table.sin().float()
