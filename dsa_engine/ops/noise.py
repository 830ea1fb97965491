"""Counter-based normal noise."""

from __future__ import annotations

from math import prod

from torch import Tensor

from dsa_engine.ops.dispatch import resolve


def gaussian(seed: Tensor, chunk: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values; each row depends on its own seed, chunk and step alone.

    Philox4x64-10 with key (seed, 0) and counter (n, 0, step, chunk), n = 1, 2, ..., gives 64-bit words; each word makes
    two neighbouring values by the Box-Muller transform of its halves a (low) and b (high):

        r = sqrt(-2 ln((a div 2^8 + 1/2) / 2^24)),   values r cos(2 pi b / 2^32) and r sin(2 pi b / 2^32)

    The words (those of numpy.random.Philox) are the same on every device, the values equal up to the rounding of its
    logarithm and cosine. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        seed: [B] int64 on the device, its bits read as unsigned.
        chunk: [B] int64 on the device.
        step: [B] int64 on the device.
        shape: Of one row.

    Returns:
        [B, *shape] float32.

    Raises:
        ValueError: Shapes disagree or are empty.
    """
    if not seed.shape == chunk.shape == step.shape or seed.ndim != 1 or prod(shape) < 1:
        raise ValueError(
            f"gaussian: seed {list(seed.shape)}, chunk {list(chunk.shape)}, step {list(step.shape)} must all be [B], "
            f"and shape {list(shape)} must not be empty"
        )
    return resolve("gaussian", seed)(seed, chunk, step, shape)
