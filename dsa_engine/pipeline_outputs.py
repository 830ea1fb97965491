"""What `Pipeline` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_engine.engine.engine import Engine
from dsa_engine.engine.session import to_uint8


@dataclass(frozen=True)
class VideoOutput:
    """The result of a call.

    Attributes:
        frames: in the requested output type.
        steps_per_chunk: [B][N], per clip and chunk.
        confidence: [B][N][F], None without a head.
        timings: seconds of the whole call ("total") and until the first chunk's latents ("first_chunk").
    """

    frames: Any
    steps_per_chunk: list[list[int]]
    confidence: list[list[list[float]]] | None
    timings: dict[str, float]


@torch.inference_mode()
def convert_latents(engine: Engine, latents: Tensor, output_type: str) -> Any:
    """Latents [B, F, C, h, w], decoded unless the output type is "latent"."""
    if output_type == "latent":
        return latents
    pixels = engine.decode(latents)
    if output_type == "pt":
        return pixels.float().clamp(0, 1)
    if output_type == "np":
        return pixels.float().clamp(0, 1).movedim(2, -1).cpu().numpy()
    from PIL import Image

    return [[Image.fromarray(frame) for frame in clip] for clip in to_uint8(pixels)]
