"""What the engine asks of a model's parts: the video codec, the text encoder, and the memory behind self-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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
        """latents [B, F, C, h, w] and the state after the previous chunk (None at a clip's start) ->
        frames [B, T, 3, H, W] in [0, 1] and the next state. The state given is not changed."""

    def frames_of(self, latent_frames: int, first: bool) -> int:
        """Pixel frames that a chunk decodes to; the first chunk of a clip may give fewer."""

    def latent_frames_of(self, frames: int) -> int:
        """Latent frames of a clip of `frames` pixel frames. Raises ValueError for a length that no clip has."""


class TextEncoder(Protocol):
    """text_dim: the width of its embeddings."""

    text_dim: int

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, L, text_dim]. Raises ValueError for a prompt that it cannot represent."""


class KVMemory(Protocol):
    """Owns the keys and values of the past: a ring cache at inference, the neighbouring chunks in training."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm_weights: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        """Raw q, k, v [B, T, C] of this chunk -> attention output [B, T, C] over the past and the chunk.

        They may be views of one [B, T, 3 C]: only their last dim is contiguous.
        """


class TextKV(NamedTuple):
    """Keys and values of all cross-attentions for B prompts: kv [layers, 2, B, L, H, D].

    used, repeat: [B], as `ops.cross_attention` takes them; None where every key counts once.
    """

    kv: Tensor
    used: Tensor | None = None
    repeat: Tensor | None = None

    def select(self, rows: Tensor) -> TextKV:
        """Those of some of the rows."""
        return TextKV(self.kv[:, :, rows], *(None if x is None else x[rows] for x in (self.used, self.repeat)))
