"""TAEHV, a tiny substitute for Wan's VAE: the same latents, 11.3 M parameters, slightly softer images.

Every layer works on single images; time comes in through blocks that also see their own input one frame earlier, and
through 1 x 1 convolutions that turn s frames into one (encoder) or one frame into s (decoder).

Source: github.com/madebyollin/taehv (MIT), `taew2_1.pth` for Wan 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsa_engine.checks import check_video
from dsa_engine.models.streaming_vae import FeatureCache, StreamingVAE

POOLS = (2, 2, 1)  # frames that each of the encoder's three stages turns into one
GROWS = (1, 2, 2)  # frames that each of the decoder's three stages makes of one


def _conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class SoftClamp(nn.Module):
    """`3 tanh(x / 3)`: limits outliers."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """`relu(x + conv(x, past))` on images x [N, C, H, W], with their predecessors in `past`."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.relu(x + self.conv(torch.cat((x, past), dim=1)))


class TPool(nn.Module):
    """[N s, C, H, W] -> [N, C, H, W]: a 1 x 1 convolution over the channels of s frames in a row."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class TGrow(nn.Module):
    """[N, C, H, W] -> [N s, C, H, W]: a 1 x 1 convolution to the channels of s frames in a row."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


def _mem_blocks(width: int) -> list[nn.Module]:
    return [MemBlock(width) for _ in range(3)]


def _encoder(width: int, outputs: int) -> nn.Sequential:
    layers = [_conv(3, width), nn.ReLU()]
    for stride in POOLS:
        layers += [TPool(width, stride), _conv(width, width, stride=2, bias=False), *_mem_blocks(width)]
    return nn.Sequential(*layers, _conv(width, outputs))


def _decoder(widths: tuple[int, ...], inputs: int) -> nn.Sequential:
    layers = [SoftClamp(), _conv(inputs, widths[0]), nn.ReLU()]
    for width, following, stride in zip(widths, widths[1:], GROWS):
        layers += [*_mem_blocks(width), nn.Upsample(scale_factor=2), TGrow(width, stride)]
        layers.append(_conv(width, following, bias=False))
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))


class TAEHV(StreamingVAE):
    """A `VideoCodec`: frames [B, T, 3, H, W] in [0, 1] <-> latents [B, F, 16, H / 8, W / 8] as the DiT has them, with
    no mean and deviation to undo. 128 tensors, 11.3 M parameters at the default sizes.

    Each latent frame decodes to 4 frames; the first 3 of a clip belong to no frame of it and are dropped, so that
    1 + n latent frames are 1 + 4 n frames as with Wan's VAE.

    widths: channels of the decoder's three stages and of its output, whose number the encoder has throughout.
    A stream's state is the last frame of the inputs of the decoder's 9 memory blocks.
    """

    time_axis = 1

    def __init__(self, widths: tuple[int, int, int, int] = (256, 128, 64, 64), latent_channels: int = 16):
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = _encoder(widths[-1], latent_channels)
        self.decoder = _decoder(widths, latent_channels)

    def encode(self, frames: Tensor) -> Tensor:
        """A whole clip: frames [B, 1 + 4 n, 3, H, W] in [0, 1] -> latents [B, 1 + n, 16, H / 8, W / 8].

        A latent frame is made of four frames, so the clip's last frame is repeated three times, as TAEHV does.
        Raises ValueError for other lengths and for sides that are not multiples of 8.
        """
        check_video("frames", frames, 3, self.spatial_stride)
        self.latent_frames_of(frames.shape[1])
        padded = torch.cat((frames, frames[:, -1:].expand(-1, self.temporal_stride - 1, -1, -1, -1)), dim=1)
        pieces = padded.split(self.temporal_stride * self.pass_frames, dim=1)
        return self._run(lambda piece, cache: _apply(self.encoder, piece, cache), pieces, None)[0]

    def _decode(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        frames = _apply(self.decoder, latents, cache).clamp(0, 1)
        return frames[:, self.temporal_stride - 1 :] if cache.first else frames


def _apply(layers: nn.Sequential, x: Tensor, cache: FeatureCache) -> Tensor:
    """x [B, T, C, H, W] through layers for images; the memory blocks get every frame's predecessor too."""
    batch = len(x)
    x = x.flatten(0, 1)
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = cache.prepend_history(x.unflatten(0, (batch, -1)), 1)[:, :-1]
            x = layer(x, past.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1))
