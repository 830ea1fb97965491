"""The decoder of the Wan VAE in plain torch, op by op and channels first: what `models/wan_vae.py` is compared with.

It walks the layers of a `WanVAE` and shares no line of arithmetic with them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_engine.models.wan_vae import AttentionBlock, Head, ResidualBlock, Upsample, WanVAE


def decode(vae: WanVAE, latents: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """As `WanVAE.decode` of one pass: latents [B, F, C, h, w] -> frames [B, T, 3, H, W], and the next state."""
    z = (latents.to(vae.conv2.weight.dtype) * vae.std + vae.mean).transpose(1, 2)
    walk = Walk(state)
    x = walk.conv(vae.decoder.conv1, F.conv3d(z, vae.conv2.weight, vae.conv2.bias))
    for layer in (*vae.decoder.middle, *vae.decoder.upsamples, vae.decoder.head):
        x = walk.layer(layer, x)
    return x.transpose(1, 2).clamp(-1, 1) / 2 + 0.5, walk.tails


class Walk:
    """One chunk's way through the layers."""

    def __init__(self, state: list[Tensor] | None):
        self.first, self.tails = state is None, []
        self.past: Iterator[Tensor] = iter(state or ())

    def layer(self, layer, x: Tensor) -> Tensor:
        ways = {ResidualBlock: self.block, AttentionBlock: attention, Upsample: self.upsample, Head: self.head}
        return ways[type(layer)](layer, x)

    def conv(self, layer, x: Tensor) -> Tensor:
        past = x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if self.first else next(self.past)
        x = torch.cat((past, x), dim=2)
        self.tails.append(x[:, :, -2:].clone())
        if x.shape[2] < 3:
            return x.new_empty(len(x), layer.out_channels, 0, *x.shape[3:])
        return F.conv3d(x, layer.weight, layer.bias, padding=layer.padding)

    def block(self, block: ResidualBlock, x: Tensor) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        y = self.conv(conv1, F.silu(normed(norm1.gamma, x)))
        y = self.conv(conv2, F.silu(normed(norm2.gamma, y)))
        if isinstance(block.shortcut, torch.nn.Conv3d):
            x = F.conv3d(x, block.shortcut.weight, block.shortcut.bias)
        return x + y

    def head(self, head: Head, x: Tensor) -> Tensor:
        norm, _, conv = head
        return self.conv(conv, F.silu(normed(norm.gamma, x)))

    def upsample(self, layer: Upsample, x: Tensor) -> Tensor:
        if layer.time_conv is not None:
            new = self.conv(layer.time_conv, x[:, :, 1:] if self.first else x)
            pairs = new.reshape(len(x), 2, x.shape[1], -1, *x.shape[3:])
            new = torch.stack((pairs[:, 0], pairs[:, 1]), dim=3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], new), dim=2) if self.first else new
        frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest-exact")
        conv = layer.resample[1]
        frames = F.conv2d(frames, conv.weight, conv.bias, padding=1)
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def normed(gamma: Tensor, x: Tensor) -> Tensor:
    """RMS norm over the channels, x [B, C, ...]."""
    unit = F.normalize(x.float(), dim=1).to(x.dtype)
    return unit * (x.shape[1] ** 0.5 * gamma.view(-1, *[1] * (x.ndim - 2)))


def attention(layer: AttentionBlock, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1)
    qkv = F.conv2d(normed(layer.norm.gamma, frames), layer.to_qkv.weight, layer.to_qkv.bias)
    q, k, v = qkv.flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(frames.shape)
    y = F.conv2d(y, layer.proj.weight, layer.proj.bias)
    return x + y.unflatten(0, (len(x), -1)).transpose(1, 2)
