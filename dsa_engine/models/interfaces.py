"""What the engine asks of a video codec: the small model's `PixelCodec`, and the video VAEs of real models."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class VideoCodec(Protocol):
    """Pixels to latents and back, streaming: what a decoder must remember between chunks is passed in and out.

    spatial_stride, temporal_stride: pixels and frames a latent pixel and frame stand for; latent_channels: C.
    """

    spatial_stride: int
    temporal_stride: int
    latent_channels: int

    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, T, 3, H, W] in [0, 1] -> latents [B, F, C, h, w]."""

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """latents [B, F, C, h, w] and the state after the chunk before (None at a clip's start) ->
        frames [B, T, 3, H, W] in [0, 1] and the next state. The state given is not changed."""

    def frames_of(self, latent_frames: int, first: bool) -> int:
        """Pixel frames that a chunk decodes to; the first chunk of a clip may give fewer."""

    def latent_frames_of(self, frames: int) -> int:
        """Latent frames of a clip of `frames` pixel frames. Raises ValueError for a length that no clip has."""
