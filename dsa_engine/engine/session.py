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
from dsa_engine.engine.chunk_plan import Forward
from dsa_engine.engine.device import Moment, copied, follow, on_device, stream_of
from dsa_engine.engine.rollout import Rollout
from dsa_engine.models.interfaces import TextKV, VideoCodec
from dsa_engine.sampling.denoise import Denoised, Step


@dataclass(frozen=True)
class Chunk:
    """What one `next_chunk` gives.

    frames: uint8 [T, H, W, 3]; latents [F, C, h, w]; steps: denoising steps taken; confidence: one value in (0, 1) per
    latent frame, None without a head; pts: seconds of the first frame from the clip's start;
    timings: milliseconds of `commit` (the previous chunk's, where it is a forward of its own and does not ride along
    with the first step), `denoise`, `decode` (to pixels on the device) and `total`, their sum: on a CUDA device by its
    own events, for the host is ahead of it; prompt: the one in force.
    """

    index: int
    frames: np.ndarray
    latents: Tensor
    steps: int
    confidence: list[float] | None
    pts: float
    timings: dict[str, float]
    prompt: str | None


class Transition(NamedTuple):
    """On the transition from one prompt's embeddings to another's: from chunk `first` on, the last of so many chunks being all
    the other's."""

    before: Tensor
    after: Tensor
    first: int
    chunks: int
    recache: bool

    def embeds(self, index: int) -> Tensor:
        """Those of a chunk, linear between the two."""
        share = min(1.0, (index - self.first + 1) / self.chunks)
        length = max(self.before.shape[1], self.after.shape[1])  # what is behind a prompt's end is zero
        before, after = (pad(e, (0, 0, 0, length - e.shape[1])) for e in (self.before, self.after))
        return self.after if share == 1.0 else before.lerp(after, share)


@dataclass(frozen=True)
class Snapshot:
    """A session's whole state at a chunk boundary, as `Session.snapshot` takes it and `restore` brings it back."""

    rollout: dict[str, Any]
    decoder: Any
    frames: int
    prompt: str | None
    embeds: Tensor
    transition: Transition | None
    shape: tuple[int, ...] = field(repr=False, default=())


class Times(NamedTuple):
    """When a chunk was begun, by the host's clock and on the device, when it was denoised, and the commit in it."""

    start: float
    begun: Moment
    denoised: Moment
    commit: tuple[Moment, Moment] | None

    def timings(self, decoded: Moment) -> dict[str, float]:
        """`Chunk.timings`, once the host has waited for the frames."""
        commit = 0.0 if self.commit is None else self.commit[1].since(self.commit[0])
        denoise, decode = self.denoised.since(self.begun) - commit, decoded.since(self.denoised)
        parts = {"commit": 1e3 * commit, "denoise": 1e3 * denoise, "decode": 1e3 * decode}
        return parts | {"total": sum(parts.values())}


class PromptEncoder(Protocol):
    """What makes a prompt the model's: the engine."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def text_kv(self, embeds: Tensor) -> TextKV: ...


class Session:
    """A stream that is asked for its next chunk, and can be told a new prompt in between.

    Made by `Pipeline.session`. Not for use from several threads at once. `limit`: latent frames it may make, None for
    an endless stream (which needs a rolling window).
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
        """embeds [1, L, text_dim]: of the prompt; stream: on a CUDA device, where chunks are decoded beside others'
        forwards."""
        self.rollout, self._decoder, self._encoder = rollout, decoder, encoder
        self._embeds, self._transition = embeds, None
        self._limit = limit
        self._begun: tuple[float, Moment] | None = None  # when the chunk that is being made was, as in Times
        self._stream = stream
        self._begin()
        self.fps, self.prompt = fps, prompt

    def _begin(self) -> None:
        given = self.rollout.given
        self._decoder_state: Any = None  # after the frames that were given too: made when the first chunk is decoded
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

    @on_device
    def next_chunk(self, on_step: Callable[[Step], None] | None = None) -> Chunk:
        """Denoise and decode the next chunk. An exception on the transition leaves the session as it was.

        on_step: called after each denoising step, of the plain loop then (`Rollout.denoise`). Raises RuntimeError when
        the session is closed or has made all its frames.
        """
        self._ready()
        return self._finish(self.rollout.denoise(on_step))

    @on_device
    def begin(self) -> tuple[Forward, ...]:
        """The first half of `next_chunk` for a `Runner`: everything is ready for the forwards of the plan returned."""
        self._ready()
        return self.rollout.prepare_chunk()

    @on_device
    def finish(self) -> Chunk:
        """The second half: decode what the forwards have made."""
        return self._finish(self.rollout.result())

    def _ready(self) -> None:
        """For the next chunk, or for another try at it. Raises RuntimeError where there is none."""
        self._check_open()
        if self.exhausted:
            raise RuntimeError(f"the clip is complete: all {self._limit} latent frames that were asked for are there")
        transition = self._transition
        if transition is not None and self.index < transition.first + transition.chunks:
            self._embeds = transition.embeds(self.index)
            self.rollout.set_prompt(self._encoder.text_kv(self._embeds), transition.recache)
        self._begun = time.perf_counter(), Moment(self.device)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks up to the clip's end, each decoded while the next one is denoised: that in a thread of its own, on
        the stream that is current now, and the decoding, on a CUDA device, on the engine's stream for it.

        The chunks are those of `next_chunk`, but the session is one ahead of them: it takes no `update`, `snapshot` or
        `reset` in between, and leaving the loop early closes it.
        """
        return self._chunks(stream_of(self.device))

    def _chunks(self, stream: Any) -> Iterator[Chunk]:
        with self, ThreadPoolExecutor(1, initializer=follow, initargs=(stream,)) as ahead:
            following = ahead.submit(self._denoise)
            while following is not None:
                decode = self._hand_over(*following.result())
                following = None if self.exhausted else ahead.submit(self._denoise)
                yield decode()

    @on_device
    def _denoise(self) -> tuple[Denoised, Times, AbstractContextManager]:
        """The next chunk, and the context in which it can be decoded beside what follows."""
        self._ready()
        return (result := self.rollout.denoise()), self._times(), self._side_stream(result)

    def _times(self) -> Times:
        """Those of the chunk that is denoised now. Before `_side_stream`, whose stream waits for them too."""
        return Times(*self._begun, Moment(self.device), self.rollout.commit_span)

    def _side_stream(self, result: Denoised) -> AbstractContextManager:
        if self.device.type != "cuda":
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        result.latents.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    @on_device
    def detach_decode(self) -> Callable[[], Chunk]:
        """`finish` in two: the chunk counts at once, and the function returned decodes it, in any thread and, on a CUDA
        device, on a stream of its own, beside what others do meanwhile. It is to be called once, and before the next
        chunk is begun.
        """
        result = self.rollout.result()
        return self._hand_over(result, self._times(), self._side_stream(result))

    def _hand_over(self, result: Denoised, times: Times, beside: AbstractContextManager) -> Callable[[], Chunk]:
        index, past = self.index, self._decoder_state
        self.rollout.accept(result.latents)

        def decode() -> Chunk:
            with beside:
                return self._decode(result, index, past, times)

        return decode

    def _finish(self, result: Denoised) -> Chunk:
        times = self._times()
        chunk = self._decode(result, self.index, self._decoder_state, times)
        self.rollout.accept(result.latents)  # cannot fail: the session moves on as a whole or not at all
        return chunk

    @on_device
    def _decode(self, result: Denoised, index: int, past: Any, times: Times) -> Chunk:
        """Frames of a chunk; past: the decoder's state before it. When all is done the session has them behind it."""
        with torch.inference_mode():
            if index == 0 and self.rollout.given is not None:  # here, on the stream that goes on from it
                past = self._decoder.decode(self.rollout.given, None)[1]
            pixels, decoder_state = self._decoder.decode(result.latents, past)
            decoded = Moment(self.device)
            confidence = None if result.confidence is None else copied(result.confidence[0])
            frames = to_uint8(pixels[0])  # waits for all of it
        took = time.perf_counter() - times.start
        chunk = Chunk(
            index=index,
            frames=frames,
            latents=result.latents[0],
            steps=result.steps[0],
            confidence=None if confidence is None else confidence.tolist(),
            pts=self._frames / self.fps,
            timings=times.timings(decoded),
            prompt=self.prompt,
        )
        for policy in self.rollout.policies:
            policy.observe(took, len(frames))
        self._decoder_state = decoder_state
        self._frames += len(frames)
        return chunk

    @on_device
    def prefix_frames(self) -> np.ndarray | None:
        """The frames that the clip was given to begin with, as the decoder gives them back: uint8 [T, H, W, 3]."""
        if self.rollout.given is None:
            return None
        with torch.inference_mode():
            return to_uint8(self._decoder.decode(self.rollout.given, None)[0][0])

    @on_device
    def update(self, prompt: str, recache: bool = True, transition_chunks: int = 0) -> None:
        """Another prompt from the next chunk on.

        recache: make the window's keys and values anew under it, so that the past does not hold on to the old prompt.
        transition_chunks: chunks that the change takes, the last of them all the new prompt's; the embeddings between
        are linear between the two. 0 and 1: at once. Raises ValueError for a prompt that cannot be encoded and a number
        below 0; the session then goes on as before.
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
        self._begin()

    @on_device
    def close(self) -> None:
        """Give the cache slot back; harmless when done twice."""
        self._decoder_state = None  # so that a decoder need not keep it for nobody
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
    pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    host = copied(pixels.movedim(-3, -1).contiguous())
    if not pixels.is_cuda:
        return host.numpy()
    Moment(pixels.device).wait()
    return host.numpy().copy()  # who keeps the frames of a long clip must not keep so much page-locked memory
