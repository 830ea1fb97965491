"""A codec's usual chunk as a function over static buffers: on a CUDA device a graph, one launch per chunk.

Latents, state and frames of a chunk have the same shapes from a clip's second chunk on, so one capture serves every
chunk of every stream. A clip's first chunk, without a state and with fewer frames, has its own.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dsa_engine.models.memory_estimate import format_bytes, free_bytes, vae_footprint
from dsa_engine.models.streaming_vae import State, StreamingVAE
from dsa_engine.models.wan_vae import WanVAE


class BorrowedState:
    """Decoder state that borrows one of the two static buffers; copied out when another stream needs the buffer.
    Immutable, may be reused; a deep copy is a tuple of tensors."""

    def __init__(self, decoder: GraphedDecoder, buffer: int):
        self._decoder, self.buffer = decoder, buffer  # None: copied out
        self.own: State | None = None

    def __deepcopy__(self, memo: dict) -> State:
        return self._decoder.copied(self)


class GraphedDecoder:
    """A `VideoCodec` that decodes chunks of one shape over static buffers, all others as its codec does.

    Two buffers hold a state each: a chunk reads one and writes the other, so nothing is copied between the chunks of a
    stream, and the state before a chunk stays valid until the next. Streams that alternate are copied out and in: two
    copies of a state per switch, 7.6 GB of traffic with the Wan VAE at 480 x 832.

    Until `capture` the function runs eagerly, with the codec's bits. Calls from several threads, and work on several
    CUDA streams, are serialized.
    """

    def __init__(self, codec: StreamingVAE, latents: Sequence[int]):
        """latents: [B, F, C, h, w] of a chunk, which is decoded twice here. Raises ValueError for another codec."""
        if not isinstance(codec, StreamingVAE):
            raise ValueError(f"codec {type(codec).__name__}: must be a StreamingVAE on the device it decodes on")
        self.codec, self.shape = codec, tuple(latents)
        self.spatial_stride, self.temporal_stride = codec.spatial_stride, codec.temporal_stride
        self.latent_channels = codec.latent_channels
        if isinstance(codec, WanVAE):
            codec.to_channels_last()
        weight = next(codec.parameters())
        self._device, self._lock = weight.device, threading.RLock()
        self._done = torch.cuda.Event() if weight.is_cuda else None  # of the last work on the buffers
        self._held: list[weakref.ref[BorrowedState] | None] = [None, None]
        # By the buffer that is read, None for a clip's first chunk.
        self._graphs: dict[int | None, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        with torch.inference_mode():
            self._latents = torch.zeros(self.shape, dtype=weight.dtype, device=weight.device)
            first = codec.decode(self._latents)[1]
            self._states = first, tuple(torch.empty_like(tail) for tail in first)
            self._step(0)
            self._mark()

    # ---- a VideoCodec ------------------------------------------------------------------------------------------------

    def encode(self, frames: Tensor) -> Tensor:
        return self.codec.encode(frames)

    def frames_of(self, latent_frames: int, first: bool) -> int:
        return self.codec.frames_of(latent_frames, first)

    def latent_frames_of(self, frames: int) -> int:
        return self.codec.latent_frames_of(frames)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, state: State | BorrowedState | None = None
    ) -> tuple[Tensor, State | BorrowedState]:
        """As the codec's; also takes the codec's own states."""
        with self._lock:
            self._wait()
            if tuple(latents.shape) != self.shape or not (state is None or self._fits(state)):
                result = self.codec.decode(latents, self._tensors(state))
            else:
                source = None if state is None else self._source(state)
                target = _target(source)
                self._latents.copy_(latents)
                self._evict(target)
                frames = self._run(source)
                held = BorrowedState(self, target)
                self._held[target] = weakref.ref(held)
                result = cast(Any, (frames, held))
            self._mark()
            return result

    # ---- states ------------------------------------------------------------------------------------------------------

    def copied(self, held: BorrowedState) -> State:
        with self._lock:
            self._wait()
            copy = tuple(tail.clone() for tail in self._tensors(held))
            self._mark()
            return copy

    def _tensors(self, state: State | BorrowedState | None) -> State | None:
        if not isinstance(state, BorrowedState):
            return state
        return state.own if state.buffer is None else self._states[state.buffer]

    def _fits(self, state: State | BorrowedState) -> bool:
        """False: the codec raises the error."""
        tensors = self._tensors(state)
        return [t.shape for t in tensors] == [t.shape for t in self._states[0]]

    def _source(self, state: State | BorrowedState) -> int:
        """The buffer that holds a state, copied there if necessary."""
        if isinstance(state, BorrowedState) and state.buffer is not None:
            return state.buffer
        free = [i for i in (0, 1) if self._owner(i) is None]
        source = free[0] if free else 0
        self._evict(source)
        for buffer, tail in zip(self._states[source], self._tensors(state)):
            buffer.copy_(tail)
            if tail.is_cuda:  # it may be freed by a stream that does not wait for this copy
                tail.record_stream(torch.cuda.current_stream(self._device))
        return source

    def _owner(self, buffer: int) -> BorrowedState | None:
        """The state that borrows the buffer, if it is still referenced."""
        return None if self._held[buffer] is None else self._held[buffer]()

    def _evict(self, buffer: int) -> None:
        occupant, self._held[buffer] = self._owner(buffer), None
        if occupant is not None:
            occupant.own, occupant.buffer = tuple(tail.clone() for tail in self._states[buffer]), None

    # ---- running -----------------------------------------------------------------------------------------------------

    def _step(self, source: int | None) -> Tensor:
        """The function: frames of the latents after the state of one buffer, or after none, whose successor goes to
        `_target`."""
        past = None if source is None else self._states[source]
        return self.codec.decode(self._latents, past, self._states[_target(source)])[0]

    def _run(self, source: int | None) -> Tensor:
        if not self._graphs:
            return self._step(source)
        graph, frames = self._graphs[source]
        graph.replay()
        return frames.clone()  # the next replay writes there

    def _wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def _mark(self) -> None:
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    # ---- capturing ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, tune: bool = True, stream: Any = None) -> float:
        """Capture the function, once for each direction and for a clip's first chunk; returns the seconds it took.
        stream: to capture on, None for a new one.

        tune: cuDNN times its convolutions first and takes the fastest, which may be others in another process; else
        those that it deems best. States that are held stay good.
        """
        start = time.perf_counter()
        before = torch.backends.cudnn.benchmark
        with self._lock:
            self._wait()
            for buffer in (0, 1):
                self._evict(buffer)
            self._graphs.clear()
            stream, pool = stream or torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream(self._device))
            torch.backends.cudnn.benchmark = tune
            try:
                with torch.cuda.stream(stream):
                    for source in (0, None):  # what is chosen or loaded at first use must not be captured
                        self._step(source)
                self._graphs = {source: self._capture(source, stream, pool) for source in (0, 1, None)}
            finally:
                torch.backends.cudnn.benchmark = before
            torch.cuda.current_stream(self._device).wait_stream(stream)
            self._mark()
        return time.perf_counter() - start

    def _capture(self, source: int | None, stream, pool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            frames = self._step(source)
        return graph, frames


def _target(source: int | None) -> int:
    """The buffer that takes the state after the one that is read, None for a clip's first chunk."""
    return 0 if source is None else 1 - source


def why_not_captured(codec: StreamingVAE, latents: Sequence[int]) -> str | None:
    """Why the device's free memory does not hold a `GraphedDecoder` of that shape with its graphs; None if it does."""
    size, (batch, frames, _, height, width) = vae_footprint(codec), latents
    pixels = batch * height * width * codec.spatial_stride**2
    passes = min(frames, codec.pass_frames) * codec.temporal_stride
    weight = next(codec.parameters())
    needed, free = round(weight.itemsize * pixels * (2 * size.state + size.work * passes)), free_bytes(weight.device)
    return None if needed <= free else f"it would take {format_bytes(needed)} and {format_bytes(free)} are free"
