"""A session: one live stream of video. It owns all of its state; nothing of it lives in a module or a global."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dsa_engine.checks import check_int
from dsa_engine.engine.chunk import Chunk, DenoiseTimes
from dsa_engine.engine.chunk_plan import Forward
from dsa_engine.engine.device import Moment, copied, follow, on_device, stream_of
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.engine.rollout import Rollout
from dsa_engine.models.interfaces import TextKV, VideoCodec
from dsa_engine.sampling.denoise import Denoised, Step
from dsa_engine.sampling.policy import Policy


class Transition(NamedTuple):
    """Linear interpolation between two prompts over `chunks` chunks, from chunk `first` on; the last one uses `after`
    only."""

    before: Tensor
    after: Tensor
    first: int
    chunks: int
    recache: bool

    def embeds(self, index: int) -> Tensor:
        """The embeddings of a chunk."""
        share = min(1.0, (index - self.first + 1) / self.chunks)
        length = max(self.before.shape[1], self.after.shape[1])  # beyond a prompt's end is zero
        before, after = (pad(e, (0, 0, 0, length - e.shape[1])) for e in (self.before, self.after))
        return self.after if share == 1.0 else before.lerp(after, share)


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at a chunk boundary, from `Session.snapshot` for `Session.restore`."""

    rollout: dict[str, Any]
    decoder: Any
    frames: int
    prompt: str | None
    embeds: Tensor
    transition: Transition | None
    shape: tuple[int, ...] = field(repr=False, default=())


class PromptEncoder(Protocol):
    """Encodes prompts for the model; the engine is one."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def text_kv(self, embeds: Tensor) -> TextKV: ...


class Session:
    """A live stream: yields its next chunk on request and accepts another prompt in between.

    Made by `Pipeline.session`. Not thread-safe.
    """

    def __init__(
        self,
        rollout: Rollout,
        decoder: VideoCodec,
        encoder: PromptEncoder,
        embeds: Tensor,
        fps: float,
        prompt: str | None,
        limit: int | None,
        stream: Any = None,
    ):
        """A session that owns its rollout.

        Args:
            rollout: of one row.
            decoder: turns latents into pixels.
            encoder: encodes later prompts.
            embeds: of the prompt, [1, L, text_dim].
            fps: frames per second, for `Chunk.pts`.
            prompt: as text, for `Chunk.prompt`.
            limit: latent frames of the clip; None: endless, which needs a rolling window.
            stream: on a CUDA device, the one to decode on beside others' forwards.
        """
        self.rollout, self._decoder, self._encoder = rollout, decoder, encoder
        self._embeds, self._limit, self._stream = embeds, limit, stream
        self._transition: Transition | None = None
        self._started: tuple[float, Moment] | None = None  # the chunk in the making, as in DenoiseTimes
        self.fps, self.prompt = fps, prompt
        self._start()

    def _start(self) -> None:
        """Before the first chunk."""
        given = self.rollout.given
        self._decoder_state: Any = None  # that of the given frames is made when the first chunk is decoded
        self._frames = 0 if given is None else self._decoder.frames_of(given.shape[1], True)

    @property
    def device(self) -> torch.device:
        return self.rollout.cache.k.device

    @property
    def index(self) -> int:
        """Index of the chunk that comes next."""
        return self.rollout.index

    @property
    def closed(self) -> bool:
        return self.rollout.slot is None

    @property
    def exhausted(self) -> bool:
        """True when the clip has all the frames it was made for."""
        return self._limit is not None and self.rollout.position + self.rollout.config.chunk_frames > self._limit

    @property
    def policy(self) -> Policy:
        """The step policy of this stream, its own copy."""
        return self.rollout.policies[0]

    @property
    def pool(self) -> ModelRunner | None:
        """What sessions share that can be batched together: equal for those, and good as a key."""
        return self.rollout.inputs

    def set_threshold(self, threshold: float) -> None:
        """Change the step policy's confidence threshold (of a `Budget`: its ceiling) from the next chunk on.

        Raises ValueError, with nothing changed, for another policy and for a threshold outside [0, 1].
        """
        self.rollout.policies[0] = self.policy.with_threshold(threshold)

    @on_device
    def next_chunk(self, on_step: Callable[[Step], None] | None = None) -> Chunk:
        """Denoise and decode the next chunk. An exception leaves the session as it was.

        Args:
            on_step: called after each denoising step, before it is decided whether to go on.

        Raises:
            RuntimeError: the session is closed or complete.
        """
        self._begin_chunk()
        return self._finish(self.rollout.denoise(on_step))

    @on_device
    def prepare_chunk(self) -> tuple[Forward, ...]:
        """The first half of `next_chunk` for a `BatchRunner`: prepare the next chunk, return the plan of its forwards.
        `finish` or `detach_decode` is the second."""
        self._begin_chunk()
        return self.rollout.prepare_chunk()

    @on_device
    def finish(self) -> Chunk:
        """Decode what the forwards have generated."""
        return self._finish(self.rollout.result())

    @on_device
    def detach_decode(self) -> Callable[[], Chunk]:
        """`finish` in two: the chunk counts at once, and the function returned decodes it, in any thread and, on a CUDA
        device, on a stream of its own, beside others' forwards. Call it once, before the next chunk is prepared."""
        return self._detach(self.rollout.result())

    def chunks(self) -> Iterator[Chunk]:
        """All chunks up to the clip's end, each decoded while the next one is denoised: the denoising in a thread of
        its own, on the stream that is current now; the decoding, on a CUDA device, on the engine's stream for it.

        The chunks are those of `next_chunk`, but the session is one ahead of them: it takes no `update`, `snapshot` or
        `reset` in between, and leaving the loop early closes it.
        """
        return self._chunks(stream_of(self.device))

    def _chunks(self, stream: Any) -> Iterator[Chunk]:
        with self, ThreadPoolExecutor(1, initializer=follow, initargs=(stream,)) as thread:
            denoising = thread.submit(self._denoise_detached)
            while denoising is not None:
                decode = denoising.result()
                denoising = None if self.exhausted else thread.submit(self._denoise_detached)
                yield decode()

    @on_device
    def _denoise_detached(self) -> Callable[[], Chunk]:
        self._begin_chunk()
        return self._detach(self.rollout.denoise())

    def _begin_chunk(self) -> None:
        """Start the next chunk, or another try at it. Raises RuntimeError where there is none."""
        self._check_open()
        if self.exhausted:
            raise RuntimeError(f"the clip is complete: all {self._limit} latent frames that were asked for are there")
        transition = self._transition
        if transition is not None and self.index < transition.first + transition.chunks:
            self._embeds = transition.embeds(self.index)
            first = self.index == transition.first
            self.rollout.set_prompt(self._encoder.text_kv(self._embeds), transition.recache, first)
        self._started = time.perf_counter(), Moment(self.device)

    def _times(self) -> DenoiseTimes:
        """Of the chunk that is denoised now."""
        seconds, moment = self._started
        return DenoiseTimes(seconds, moment, Moment(self.device), self.rollout.commit_span)

    def _finish(self, result: Denoised) -> Chunk:
        chunk = self._decode(result, self.index, self._times())
        # It cannot fail: the session moves on as a whole or not at all.
        self.rollout.accept(result.latents, result.confidence)
        return chunk

    def _detach(self, result: Denoised) -> Callable[[], Chunk]:
        index, times, side_stream = self.index, self._times(), self._side_stream(result)
        self.rollout.accept(result.latents, result.confidence)

        def decode() -> Chunk:
            with side_stream:
                return self._decode(result, index, times)

        return decode

    def _side_stream(self, result: Denoised) -> AbstractContextManager:
        """The context to decode a result in; its stream waits for what is launched until now."""
        if self.device.type != "cuda":
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        result.latents.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    @on_device
    def _decode(self, result: Denoised, index: int, times: DenoiseTimes) -> Chunk:
        """The chunk's frames; the decoder's state moves on only when all is done."""
        state = self._decoder_state
        with torch.inference_mode():
            if index == 0 and self.rollout.given is not None:  # here, on the stream that goes on from it
                state = self._decoder.decode(self.rollout.given, None)[1]
            pixels, decoder_state = self._decoder.decode(result.latents, state)
            decoded = Moment(self.device)
            confidence = None if result.confidence is None else copied(result.confidence[0])
            frames, fetched = fetch_uint8(pixels[0])  # waits for all of it
        seconds = time.perf_counter() - times.start
        chunk = Chunk(
            index=index,
            frames=frames,
            latents=result.latents[0],
            steps=result.steps[0],
            confidence=None if confidence is None else confidence.tolist(),
            pts=self._frames / self.fps,
            timings=times.timings(result.steps[0], decoded, fetched),
            prompt=self.prompt,
        )
        self.policy.observe(seconds, len(frames))
        self._decoder_state = decoder_state
        self._frames += len(frames)
        return chunk

    @on_device
    def prefix_frames(self) -> np.ndarray | None:
        """The frames that the clip was given to begin with, as decoded again: uint8 [T, H, W, 3]."""
        if self.rollout.given is None:
            return None
        with torch.inference_mode():
            return to_uint8(self._decoder.decode(self.rollout.given, None)[0][0])

    @on_device
    def update(self, prompt: str, recache: bool = True, transition_chunks: int = 0) -> None:
        """Another prompt from the next chunk on.

        Args:
            prompt: the new text.
            recache: recompute the window's keys and values under it, so that the past does not hold on to the old one.
            transition_chunks: chunks over which the embeddings are interpolated linearly, the last one all new; 0 and
                1: at once.

        Raises:
            ValueError: a prompt that cannot be encoded, or a negative count; the session then goes on as before.
        """
        self._check_open()
        check_int("transition_chunks", transition_chunks, 0)
        embeds = self._encoder.encode([prompt])
        if transition_chunks > 1:
            self._transition = Transition(self._embeds, embeds, self.index, transition_chunks, recache)
        else:
            self.rollout.set_prompt(self._encoder.text_kv(embeds), recache)
            self._embeds, self._transition = embeds, None
        self.prompt = prompt

    @on_device
    def snapshot(self) -> Snapshot:
        """A copy of the whole state. It stays good whatever the session does next."""
        self._check_open()
        return Snapshot(
            self.rollout.save(),
            copy.deepcopy(self._decoder_state),
            self._frames,
            self.prompt,
            self._embeds,
            self._transition,
            self._shape,
        )

    @on_device
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session, or of one of the same model, size and window."""
        self._check_open()
        if snapshot.shape != self._shape:
            raise ValueError(
                f"snapshot of a cache {list(snapshot.shape)}: this session's is {list(self._shape)}; "
                "restore into a session of the same model, size and window"
            )
        self.rollout.load(snapshot.rollout)
        self._decoder_state = copy.deepcopy(snapshot.decoder)
        self._frames, self.prompt = snapshot.frames, snapshot.prompt
        self._embeds, self._transition = snapshot.embeds, snapshot.transition

    @on_device
    def reset(self) -> None:
        """Back to the first chunk, under the prompt in force: the same seed gives the same frames again."""
        self._check_open()
        if self._transition is not None:  # to begin with, the prompt that it was going to
            self._embeds, self._transition = self._transition.after, None
            self.rollout.set_prompt(self._encoder.text_kv(self._embeds))
        self.rollout.restart()
        self._start()

    @on_device
    def close(self) -> None:
        """Give the cache slot back; harmless when done twice."""
        self._decoder_state = None  # so that the decoder can drop it
        self.rollout.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.rollout.cache.k[:, 0].shape)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the session is closed; open another with Pipeline.session(...)")


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[..., T, 3, H, W] in [0, 1] -> uint8 [..., T, H, W, 3], rounded to nearest."""
    return fetch_uint8(pixels)[0]


def fetch_uint8(pixels: Tensor) -> tuple[np.ndarray, Moment]:
    """`to_uint8`, and when the frames were on the host."""
    pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    host, fetched = copied(pixels.movedim(-3, -1).contiguous()), Moment(pixels.device)
    fetched.wait()
    # A copy, for a caller that keeps a long clip's frames must not keep as much page-locked memory.
    return host.numpy().copy() if pixels.is_cuda else host.numpy(), fetched
