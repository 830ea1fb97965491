"""What Wan's VAE and TAEHV share: streaming, chunk by chunk, with the state as an argument and a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dsa_engine.checks import check_min, check_video

# A stream's state between two chunks: tensors in the order of the layers that need them. Never changed in place.
State = tuple[Tensor, ...]


class FeatureCache:
    """One pass of a chunk through the layers: hands out the previous pass's frames per layer, collects the new ones.

    state: of the previous pass, None at a clip's start (`first`). axis: the axis of time. into: tensors that take the
    new state, others than those of `state`; None makes new ones. new_state: complete after the pass.
    """

    def __init__(self, state: Iterable[Tensor] | None, axis: int, into: Sequence[Tensor] | None = None):
        self.first = state is None
        self.new_state: list[Tensor] = []
        self._state = iter(() if state is None else state)
        self._axis, self._into = axis, into

    def prepend_history(self, x: Tensor, frames: int, write: Callable[[Tensor], object] | None = None) -> Tensor:
        """x with the `frames` frames before it, zeros at a clip's start; its last `frames` are kept for the next chunk.

        write(part): puts a function of x, of its shape, into the part behind those frames; None copies x itself.
        Raises ValueError when the state does not fit x.
        """
        axis, count, shape = self._axis, x.shape[self._axis], list(x.shape)
        shape[axis] = frames
        history = None if self.first else next(self._state, None)
        if not self.first and (history is None or list(history.shape) != shape):
            held = "nothing" if history is None else list(history.shape)
            raise ValueError(
                f"state holds {held} where this chunk needs {shape}: give the state that the stream's previous chunk "
                "returned, or None at a clip's start"
            )
        shape[axis] += count
        layout = torch.channels_last_3d if axis == 2 else torch.contiguous_format
        whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        front = whole.narrow(axis, 0, frames)
        front.zero_() if history is None else front.copy_(history)
        part = whole.narrow(axis, frames, count)  # only now: autograd allows no older view beside the one written
        part.copy_(x) if write is None else write(part)
        self.new_state.append(self._store(whole.narrow(axis, count, frames)))
        return whole

    def _store(self, frames: Tensor) -> Tensor:
        if self._into is not None:
            return self._into[len(self.new_state)].copy_(frames)
        return frames.clone()  # a view would keep the whole chunk alive


class StreamingVAE(nn.Module):
    """The arithmetic of frames, the checks, and the loop over passes.

    A subclass defines `_decode(latents, cache)` and `time_axis`, the axis of time in its layers.
    """

    spatial_stride = 8
    temporal_stride = 4
    latent_channels = 16
    # Latent frames that are computed at once: bounds the memory of long clips and changes no result. A usual chunk.
    pass_frames = 3
    time_axis: int

    def decode(
        self, latents: Tensor, state: State | None = None, into: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """latents [B, F, C, h, w] of any floating dtype and the state after the previous chunk (None at a clip's start)
        -> frames [B, T, 3, 8 h, 8 w] in [0, 1] in the weights' dtype, T = 4 F (4 F - 3 at a clip's start), and the next
        state. The state given is not changed and may be used again.

        into: tensors like those of a state of this stream, and others than the state given, which take the next one.
        Raises ValueError for another shape, or a state that is not of this stream.
        """
        return self.decode_passes(latents, state, self.pass_frames, lambda s: FeatureCache(s, self.time_axis, into))

    def decode_passes(
        self, latents: Tensor, state: State | None, frames: int, new_cache: Callable[[State | None], FeatureCache]
    ) -> tuple[Tensor, State]:
        """`decode` in passes of `frames` latent frames, each with a new cache of the state before it."""
        check_video("latents", latents, self.latent_channels)
        return self._run(self._decode, latents.split(frames, dim=1), state, new_cache)

    def frames_of(self, latent_frames: int, first: bool) -> int:
        """Pixel frames that a chunk decodes to: 4 a latent frame, but 1 for the `first` one of a clip.

        Raises ValueError below 1 latent frame.
        """
        check_min("latent_frames", latent_frames)
        return self.temporal_stride * (latent_frames - first) + first

    def latent_frames_of(self, frames: int) -> int:
        """Latent frames of a clip of `frames` pixel frames: 1 + n for 1 + 4 n. Raises ValueError for other lengths."""
        stride = self.temporal_stride
        if frames < 1 or (frames - 1) % stride:
            near = 1 + stride * max(0, round((frames - 1) / stride))
            raise ValueError(f"frames = {frames}: a clip has 1 + {stride} n frames; the nearest is {near}")
        return 1 + (frames - 1) // stride

    def _decode(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        raise NotImplementedError

    def _run(
        self,
        step: Callable[[Tensor, FeatureCache], Tensor],
        pieces: Sequence[Tensor],
        state: State | None,
        new_cache: Callable[[State | None], FeatureCache] | None = None,
    ) -> tuple[Tensor, State]:
        """`step` on one piece after another -> (results along axis 1, the state after the last)."""
        dtype = next(self.parameters()).dtype
        results = []
        for piece in pieces:
            cache = new_cache(state) if new_cache else FeatureCache(state, self.time_axis)
            results.append(step(piece.to(dtype), cache))
            state = tuple(cache.new_state)
        return results[0] if len(results) == 1 else torch.cat(results, dim=1), state
