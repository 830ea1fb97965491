"""Wan 2.1's video VAE, streaming: the frames of a clip are the same whatever chunks it comes in.

Every convolution over time sees only the two previous frames, zeros at a clip's start, so a stream's state is the last
two frames of each one's input. The layers that double or halve the frame rate pass a clip's first frame through, so
that 1 + n latent frames are 1 + 4 n pixel frames. Apart from that a chunk of any length is one call per layer.

Source: Wan 2.1 (arXiv 2503.20314) and its `wan/modules/vae.py`, which goes frame by frame with `feat_cache` on
the module; here the state is an argument and a result.

Activations are [B, C, T, H, W] in `channels_last_3d`, where a clip's frames are contiguous: the op before a convolution
writes right behind the history frames, and frames are split as views. Only those two frames are copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_engine import ops
from dsa_engine.checks import check_video
from dsa_engine.models.streaming_vae import FeatureCache, State, StreamingVAE

# Mean and standard deviation of each latent channel over Wan's training videos (from `wan/modules/vae.py`).
LATENT_MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
LATENT_STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)


class Causal(nn.Module):
    """A layer with history: it is called with (x, cache), all others with x."""


class Chain(Causal, nn.Sequential):
    """Layers one after another, x [B, C, T, H, W]."""

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        for layer in self:
            x = layer(x, cache) if isinstance(layer, Causal) else layer(x)
        return x


class CausalConv3d(Causal, nn.Conv3d):
    """A convolution that is padded in space and preceded in time by the kernel's length less one frames.

    bias_later: it does not add its bias, which is left to what follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        time_stride: int = 1,
        bias_later: bool = False,
    ):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel, stride=(time_stride, 1, 1), padding=padding)
        self.bias_later = bias_later

    def forward(self, x: Tensor, cache: FeatureCache, write: Callable[[Tensor], object] | None = None) -> Tensor:
        """write(part): puts what is convolved, a function of x of its shape, into memory of the layer's; None: x."""
        return self.convolve(cache.prepend_history(x, self.kernel_size[0] - 1, write))

    def convolve(self, x: Tensor) -> Tensor:
        """x with its history in front -> the frames that the kernel fits on, which may be none (torch refuses that)."""
        if x.shape[2] < self.kernel_size[0]:
            return x.new_empty(len(x), self.out_channels, 0, *x.shape[3:])
        weight, bias = self.weight, None if self.bias_later else self.bias
        missing = -self.out_channels % _unit(x)
        if not missing:
            return self._conv_forward(x, weight, bias)
        # Padded in each call, since weights are loaded, cast and moved: 41 kB beside frames of a hundred MB.
        weight = F.pad(weight, (0, 0) * 4 + (0, missing))
        bias = None if bias is None else F.pad(bias, (0, missing))
        return self._conv_forward(x, weight, bias)[:, : self.out_channels]


class PointwiseConv3d(nn.Conv3d):
    """A 1 x 1 x 1 convolution as a GEMM over the contiguous channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _channels_first(F.linear(_channels_last(x), self.weight.flatten(1), self.bias))


class RMSNorm(nn.Module):
    """`ops.norm_silu` over the channels, x [B, C, ...]."""

    def __init__(self, channels: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor, silu: bool = False, bias: Tensor | None = None) -> Tensor:
        return _channels_first(ops.norm_silu(_channels_last(x), self.gamma.flatten(), silu, bias))

    def silu_into(self, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """silu(norm(x + bias)) into a tensor of x's shape."""
        ops.norm_silu(_channels_last(x), self.gamma.flatten(), True, bias, _channels_last(out))


class ResidualBlock(Causal, nn.Module):
    """x [B, inputs, T, H, W] -> [B, outputs, T, H, W].

    The norms write where the convolutions read, and each convolution's bias is added by the op after it. Identity
    layers keep Wan's parameter names, which count two activations and a dropout.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(inputs),
            nn.Identity(),
            CausalConv3d(inputs, outputs, bias_later=True),
            RMSNorm(outputs),
            nn.Identity(),
            nn.Identity(),
            CausalConv3d(outputs, outputs, bias_later=True),
        )
        self.shortcut = nn.Identity() if inputs == outputs else PointwiseConv3d(inputs, outputs)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(x, cache, partial(norm1.silu_into, x))
        y = conv2(y, cache, partial(norm2.silu_into, y, bias=conv1.bias))
        return _channels_first(ops.bias_residual(_channels_last(self.shortcut(x)), _channels_last(y), conv2.bias))


class Head(Causal, nn.Sequential):
    """The last norm and convolution; its names count an activation too."""

    def __init__(self, channels: int, outputs: int):
        super().__init__(RMSNorm(channels), nn.Identity(), CausalConv3d(channels, outputs))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        norm, _, conv = self
        return conv(x, cache, partial(norm.silu_into, x))


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame, x [B, C, T, H, W]; frames do not see each other."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = _channels_last(self.norm(x)).flatten(0, 1).flatten(1, 2)  # [B T, H W, C]
        qkv = F.linear(pixels, self.to_qkv.weight.flatten(1), self.to_qkv.bias)[:, None]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))[:, 0]
        y = F.linear(y, self.proj.weight.flatten(1)).view(_channels_last(x).shape)
        return _channels_first(ops.bias_residual(_channels_last(x), y, self.proj.bias))


class Upsample(Causal, nn.Module):
    """x [B, C, T, H, W] -> [B, C / 2, T', 2 H, 2 W]; `in_time` doubles the frames too, but for the first of a clip."""

    def __init__(self, channels: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Identity(),  # the names count the enlargement
            nn.Conv2d(channels, channels // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if self.time_conv is None:
            large = _enlarged(_channels_last(x)[:, :, None])
        else:
            # A clip's first frame is neither doubled nor the past of the others: zeros come before the second.
            pairs = self.time_conv(x[:, :, int(cache.first) :], cache).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
            large = _enlarged(pairs.movedim((1, 2), (2, -1)))
            if cache.first:
                large = torch.cat((_enlarged(_channels_last(x[:, :, :1])[:, :, None]), large), dim=1)
        return _each_frame(self.resample, _channels_first(large))


class Downsample(Causal, nn.Module):
    """x [B, C, T, H, W] -> [B, C, T', H / 2, W / 2]; `in_time` halves the frames too, but for the first of a clip."""

    def __init__(self, channels: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if in_time else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past_and_x = cache.prepend_history(x, 1)
        if not cache.first:
            return self.time_conv.convolve(past_and_x)
        # A clip's first frame stays as it is and is the past of the others: no zeros before it.
        return torch.cat((x[:, :, :1], self.time_conv.convolve(x)), dim=2)


def _unit(x: Tensor) -> int:
    """Channels that a convolution's outputs should be a multiple of: cuDNN's kernels for tensor cores write 16 bytes at
    a time, 8 channels of a 16-bit dtype. At the usual sizes only the decoder's last layer, with 3, has another number.
    """
    return 8 if x.is_cuda and x.dtype.itemsize == 2 else 1


def _enlarged(frames: Tensor) -> Tensor:
    """[B, T, N, H, W, C], whatever its strides -> [B, T N, 2 H, 2 W, C], each pixel four times, in one copy."""
    batch, time, count, height, width, channels = frames.shape
    pixels = frames[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, 2, -1, 2, -1)
    return pixels.reshape(batch, time * count, 2 * height, 2 * width, channels)


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, T, H, W, C], a view."""
    return x.movedim(1, -1)


def _channels_first(x: Tensor) -> Tensor:
    """[B, T, H, W, C] -> [B, C, T, H, W], a view."""
    return x.movedim(-1, 1)


def _each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer for images [N, C, H, W] on every frame of x [B, C, T, H, W]."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _middle(channels: int) -> Chain:
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def _encoder(dim: int, widths: list[int], blocks: int, outputs: int, time_down: tuple[bool, ...]) -> Chain:
    layers: list[nn.Module] = []
    channels = dim
    for level, width in enumerate(widths):
        layers += [ResidualBlock(channels if block == 0 else width, width) for block in range(blocks)]
        if level < len(time_down):
            layers.append(Downsample(width, time_down[level]))
        channels = width
    parts = ("conv1", CausalConv3d(3, dim)), ("downsamples", Chain(*layers)), ("middle", _middle(widths[-1]))
    return Chain(OrderedDict([*parts, ("head", Head(widths[-1], outputs))]))


def _decoder(widths: list[int], blocks: int, inputs: int, time_up: tuple[bool, ...]) -> Chain:
    layers: list[nn.Module] = []
    channels = widths[0]
    for level, width in enumerate(widths):
        layers += [ResidualBlock(channels if block == 0 else width, width) for block in range(blocks + 1)]
        if level < len(time_up):
            layers.append(Upsample(width, time_up[level]))
            channels = width // 2
    parts = ("conv1", CausalConv3d(inputs, widths[0])), ("middle", _middle(widths[0])), ("upsamples", Chain(*layers))
    return Chain(OrderedDict([*parts, ("head", Head(widths[-1], 3))]))


class WanVAE(StreamingVAE):
    """A `VideoCodec`: frames [B, T, 3, H, W] in [0, 1] <-> latents [B, F, 16, H / 8, W / 8] as the DiT has them.

    The DiT's latents are the network's z, normalised: `z = latents * std + mean`. The parameters have Wan's own names:
    194 tensors, 126,892,531 parameters at the default sizes.

    dim: channels at full resolution, even; latent_channels: C; multipliers: channels of each level in units of `dim`;
    blocks: residual blocks a level (one more in the decoder); time_down: for each halving of the image, whether it
    halves the frame rate too; mean, std: C values each.
    Raises ValueError for arguments that do not fit together.

    A stream's state is the last two frames of the inputs of the decoder's 32 causal convolutions: 0.94 G elements at
    480 x 832, which is 1.9 GB in bfloat16.
    """

    time_axis = 2

    def __init__(
        self,
        dim: int = 96,
        latent_channels: int = 16,
        multipliers: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        time_down: tuple[bool, ...] = (False, True, True),
        mean: tuple[float, ...] = LATENT_MEAN,
        std: tuple[float, ...] = LATENT_STD,
    ):
        if dim < 2 or dim % 2:
            raise ValueError(f"dim = {dim}: must be even and positive; the nearest is {max(2, dim // 2 * 2)}")
        if len(time_down) != len(multipliers) - 1:
            raise ValueError(
                f"time_down has {len(time_down)} values: must be one less than the {len(multipliers)} multipliers"
            )
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != latent_channels:
                raise ValueError(f"{name} has {len(values)} values: must be latent_channels = {latent_channels}")
        super().__init__()
        self.latent_channels = latent_channels
        self.spatial_stride = 2 ** len(time_down)
        self.temporal_stride = 2 ** sum(time_down)
        widths = [dim * m for m in multipliers]
        self.encoder = _encoder(dim, widths, blocks, 2 * latent_channels, tuple(time_down))
        self.conv1 = PointwiseConv3d(2 * latent_channels, 2 * latent_channels)
        self.conv2 = PointwiseConv3d(latent_channels, latent_channels)
        self.decoder = _decoder(widths[::-1], blocks, latent_channels, tuple(time_down)[::-1])
        # Not in the files, so they must have their values even when the parameters are made on the meta device; made on
        # any other they are on it too.
        device = "cpu" if torch.get_default_device().type == "meta" else None
        self.register_buffer("mean", torch.tensor(mean, device=device)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device)[:, None, None], persistent=False)

    def to_channels_last(self) -> WanVAE:
        """Weights in the memory format that the convolutions read, in place; else each call would copy them."""
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                layout = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
                layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """A whole clip: frames [B, 1 + 4 n, 3, H, W] in [0, 1] -> latents [B, 1 + n, 16, H / 8, W / 8], the mean of the
        posterior. Raises ValueError for other lengths and for sides that are not multiples of 8."""
        return self.encode_chunk(frames)[0]

    def encode_chunk(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """`encode` for a stream: 1 + 4 n frames at a clip's start (state None), 4 n later; and the next state."""
        check_video("frames", frames, 3, self.spatial_stride)
        count, first = frames.shape[1], state is None
        stride = self.temporal_stride
        if not first and count % stride:
            near = stride * max(1, round(count / stride))
            raise ValueError(f"{count} frames: a later chunk has a multiple of {stride}; the nearest is {near}")
        total = self.latent_frames_of(count) if first else count // stride
        sizes = [min(self.pass_frames, total - start) for start in range(0, total, self.pass_frames)]
        pieces = frames.split([self.frames_of(size, first and i == 0) for i, size in enumerate(sizes)], dim=1)
        return self._run(self._encode, pieces, state)

    def _encode(self, frames: Tensor, cache: FeatureCache) -> Tensor:
        moments = self.conv1(self.encoder(2 * frames.transpose(1, 2) - 1, cache))  # mean and log variance
        return (moments[:, : self.latent_channels].transpose(1, 2) - self.mean) / self.std

    def _decode(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        z = (latents * self.std + self.mean).transpose(1, 2)
        return self.decoder(self.conv2(z), cache).transpose(1, 2).clamp(-1, 1) / 2 + 0.5
