"""The small codec of the synthetic world: one 64x64 frame <-> one latent [16, 8, 8], about 151 k parameters.

It is a `VideoCodec` like the video VAEs, with a temporal stride of 1 and nothing to remember between chunks.
"""

from __future__ import annotations

import torch
from torch import nn

from dsa_engine.checks import check_min, check_video


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class PixelCodec(nn.Module):
    """frames [B, T, 3, H, W] in [0, 1] <-> latents [B, T, 16, H / 8, W / 8] of unit standard deviation per channel.

    The last layer of the encoder is a BatchNorm2d without weights, so its running statistics are what Wan's VAE calls
    `latents_mean` and `latents_std`; in `eval()` they are constants and every frame is coded on its own.
    """

    spatial_stride = 8
    temporal_stride = 1
    latent_channels = 16

    def __init__(self, ch: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            _conv(48, ch),
            nn.SiLU(),
            nn.Conv2d(ch, 2 * ch, 4, stride=2, padding=1),
            nn.SiLU(),
            _conv(2 * ch, self.latent_channels, 1),
            nn.BatchNorm2d(self.latent_channels, affine=False),
        )
        self.decoder = nn.Sequential(  # three doublings: 8 -> 16 -> 32 -> 64
            _conv(self.latent_channels, 2 * ch),
            nn.SiLU(),
            _conv(2 * ch, 4 * ch),
            nn.PixelShuffle(2),
            nn.SiLU(),
            _conv(ch, 2 * ch),
            nn.PixelShuffle(2),
            nn.SiLU(),
            _conv(ch // 2, 12),
            nn.PixelShuffle(2),
        )

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """frames [B, T, 3, H, W] in [0, 1], H and W multiples of 8 -> latents [B, T, 16, H / 8, W / 8].

        Raises ValueError for another number of axes or channels, or a size that is not a multiple of 8.
        """
        check_video("frames", frames, 3, self.spatial_stride)
        return self.encoder(2 * frames.flatten(0, 1) - 1).unflatten(0, frames.shape[:2])

    def decode(self, latents: torch.Tensor, state: None = None) -> tuple[torch.Tensor, None]:
        """latents [B, F, 16, h, w] -> (frames [B, F, 3, 8 h, 8 w] in [0, 1], the next chunk's state: None).

        Raises ValueError for another number of axes or channels.
        """
        return self.reconstruct(latents).clamp(0, 1), state

    def reconstruct(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` without the clamp, whose gradient training needs."""
        check_video("latents", latents, self.latent_channels)
        return (self.decoder(latents.flatten(0, 1)) / 2 + 0.5).unflatten(0, latents.shape[:2])

    def frames_of(self, latent_frames: int, first: bool) -> int:
        """Pixel frames that a chunk of `latent_frames` decodes to; being the `first` chunk changes nothing here."""
        return self.latent_frames_of(latent_frames)

    def latent_frames_of(self, frames: int) -> int:
        """Latent frames of a clip of `frames` pixel frames: as many. Raises ValueError below 1."""
        check_min("frames", frames)
        return frames
