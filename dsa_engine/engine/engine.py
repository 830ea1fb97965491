"""The engine: a model's components, the cache pools, and the sessions that are open on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.checks import check_min
from dsa_engine.config import RolloutConfig
from dsa_engine.engine import device_loop
from dsa_engine.engine.capacity import PoolShape, choose_slots, fitting_sessions
from dsa_engine.engine.cuda_graphs import GraphRunner
from dsa_engine.engine.device import Streams, on_device
from dsa_engine.engine.graphed_decoder import GraphedDecoder, why_not_captured
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.engine.rollout import Rollout
from dsa_engine.engine.session import Session, to_uint8
from dsa_engine.kernel_types import CacheScales
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT, DiTOutput
from dsa_engine.models.fp8 import E4M3, cache_scales
from dsa_engine.models.interfaces import TextEncoder, TextKV, VideoCodec
from dsa_engine.models.streaming_vae import StreamingVAE
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.sampling.noise import ExternalNoise, Noise, Renoise, SDEditNoise, SeededNoise
from dsa_engine.sampling.policy import Policy
from dsa_engine.sampling.schedule import TIMESTEPS, Schedule

logger = logging.getLogger(__name__)

SESSIONS = 4  # of a pool by default


class Engine:
    """Opens rollouts and sessions of one model. Imports no server, sets no signal handler, keeps no global state.

    One cache pool serves all sessions of a size and window; its slots are allocated when the first one opens.
    """

    def __init__(
        self,
        dit: CausalDiT,
        head: ConfidenceHead | None,
        decoder: VideoCodec | None,
        text: TextEncoder | None,
        config: RolloutConfig,
        max_sessions: int | None = None,
        deterministic: bool = False,
        fp8_cache: bool = False,
    ):
        """An engine without pools.

        Args:
            dit: the generator.
            head: the confidence head, if any.
            decoder: the video codec; without it there are rollouts, but no sessions.
            text: the text encoder, if prompts are given as text.
            config: the rollout's defaults.
            max_sessions: slots of a pool, even if they exceed the device's free memory (logged). None: SESSIONS, or as
                many as fit if fewer.
            deterministic: a session's bits never depend on which others share its forwards (`ModelRunner`).
            fp8_cache: keys and values in e4m3 instead of the model's dtype.
        """
        if max_sessions is not None:
            check_min("max_sessions", max_sessions)
        self.dit, self.head, self.decoder, self.text = dit, head, decoder, text
        self.config, self.deterministic = config, deterministic
        self.max_sessions, self.asked = max_sessions or SESSIONS, max_sessions is not None
        self.fp8_cache = fp8_cache
        self._scales: CacheScales | None = None  # of the FP8 cache, computed with the first pool
        self._pools: dict[PoolShape, ModelRunner] = {}
        self._fit: dict[PoolShape, int] = {}  # on CUDA: sessions that memory was free for when the pool was allocated
        self._decoders: dict[tuple[int, ...], GraphedDecoder] = {}  # by the shape of a chunk's latents

    @property
    def device(self) -> torch.device:
        return self.dit.device

    @cached_property
    def streams(self) -> Streams | None:
        return Streams.on(self.device)

    @on_device
    def session(
        self,
        prompt: str | None,
        embeds: Tensor,
        *,
        height: int,
        width: int,
        frames: int | None,
        fps: float,
        policy: Policy,
        seed: int,
        config: RolloutConfig,
        given: Tensor | None = None,
        init_latents: Tensor | None = None,
        strength: float = 1.0,
    ) -> Session:
        """Open a stream in the pool of its size and window.

        Args:
            prompt: as text, for `Chunk.prompt`.
            embeds: [1, L, text_dim].
            height, width: latent size.
            frames: latent frames; None: endless, which needs a rolling window.
            fps: frames per second, for `Chunk.pts`.
            policy, seed, config, given, init_latents, strength: as in `rollout`.

        Raises:
            RuntimeError: all slots are taken, or the captured graphs' weights have moved.
        """
        if self.decoder is None:
            raise ValueError("this pipeline has no decoder, so no sessions: use generate_latents")
        shape = self._pool_shape(height, width, frames, config)
        inputs = self._shared(shape)
        self._check_graphs(inputs)
        if inputs.cache.in_use == inputs.cache.slots:
            raise RuntimeError(self._full(shape, inputs.cache.slots))
        noise = with_init_latents(self._noise([seed], height, width, config), init_latents, strength, config)
        rollout = Rollout(
            self.dit, self.head, inputs.cache, config, noise, [policy], self.text_kv(embeds), given, strength, inputs
        )
        decoder = self._decoder_of(self._chunk(height, width, config))
        return Session(rollout, decoder, self, embeds, fps, prompt, frames, self.streams and self.streams.decode)

    @on_device
    def capture(
        self,
        *,
        height: int,
        width: int,
        frames: int | None,
        config: RolloutConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> float:
        """Capture the CUDA graphs of the pool that sessions of this latent size, length and window share, and of their
        video VAE if it streams.

        Returns the seconds it took; progress(done, total) is called after each of the pool's. Raises RuntimeError
        without a CUDA device.
        """
        if self.device.type != "cuda":
            raise RuntimeError(f"CUDA graphs on {self.device}: they need a CUDA device")
        inputs, seconds = self._shared(self._pool_shape(height, width, frames, config)), 0.0
        if inputs.graphs is not None and inputs.graphs.weights_moved():
            logger.warning("the model's weights have moved since its graphs were captured: they are captured again")
            inputs.graphs = None
        if inputs.graphs is None:
            why = device_loop.unavailable()
            if why is not None:
                logger.warning("no loop on the device, single steps are launched instead: %s", why)
            graphs = GraphRunner(inputs, loop_rows=0 if why else 1)
            seconds = graphs.capture(progress, self.streams.capture)
            inputs.graphs = graphs  # only now: after a failure the next call retries
        return seconds + self._capture_decoder(self._chunk(height, width, config))

    def _capture_decoder(self, latents: tuple[int, ...]) -> float:
        """Seconds it took; 0 if done already or not possible."""
        if not isinstance(self.decoder, StreamingVAE) or latents in self._decoders:
            return 0.0
        why = why_not_captured(self.decoder, latents)
        if why is not None:
            logger.warning("the decoder was not captured, its chunks are launched op by op: %s", why)
            return 0.0
        decoder = GraphedDecoder(self.decoder, latents)
        seconds = decoder.capture(not self.deterministic, self.streams and self.streams.decode)
        self._decoders[latents] = decoder
        return seconds

    @on_device
    @torch.inference_mode()
    def warm_decoder(self, *, height: int, width: int, config: RolloutConfig) -> None:
        """Decode a clip's first two chunks like sessions of this latent size, in this thread: cuDNN's plans and
        cuBLAS's handles are per thread."""
        latents, state = self._chunk(height, width, config), None
        decoder = self._decoder_of(latents)
        with nullcontext() if self.streams is None else torch.cuda.stream(self.streams.decode):
            for _ in range(2):
                zeros = torch.zeros(latents, device=self.device, dtype=self.dit.dtype)
                pixels, state = decoder.decode(zeros, state)
                to_uint8(pixels[0])

    def _decoder_of(self, latents: tuple[int, ...]) -> VideoCodec:
        """The codec for chunks of latents of that shape."""
        return self._decoders.get(latents, self.decoder)

    def _chunk(self, height: int, width: int, config: RolloutConfig) -> tuple[int, ...]:
        """Shape of the latents that a session decodes at once."""
        return 1, config.chunk_frames, self.dit.config.in_dim, height, width

    def _shared(self, shape: PoolShape) -> ModelRunner:
        """The pool of all sessions of a shape."""
        if shape not in self._pools:  # unused pools of other shapes are freed first
            kept = {other: pool for other, pool in self._pools.items() if pool.cache.in_use or pool.graphs is not None}
            self._pools = kept
            self._pools[shape] = self._pool(shape, self._slots(shape))
            if self.device.type == "cuda" and len(self._pools) > 1:
                logger.info("%s was not captured: its forwards are launched op by op", shape)
        return self._pools[shape]

    def _check_graphs(self, inputs: ModelRunner) -> None:
        """Raises RuntimeError if a replay would read freed weights. Once per stream, since it takes a millisecond."""
        if inputs.graphs is not None and inputs.graphs.weights_moved():
            raise RuntimeError(
                "the model's weights have moved (to another dtype or device, or quantised) since its CUDA graphs were "
                "captured, which read them where they were: call warmup() again"
            )

    def _slots(self, shape: PoolShape) -> int:
        """Slots of a new pool."""
        if self.device.type != "cuda":
            return self.max_sessions
        fit = self._fit[shape] = self._fitting(shape)
        return choose_slots(self.device, self.max_sessions, self.asked, fit)

    def _full(self, shape: PoolShape, slots: int) -> str:
        """The error message when all slots are taken."""
        fit = self._fit.get(shape)
        more = "make the pipeline with a larger max_sessions"
        if fit is not None:
            more += f" (there was memory for {fit} when the places were made)"
        return f"all {slots} places for sessions are taken: close a session, or {more}"

    def fitting(self, *, height: int, width: int, frames: int | None, config: RolloutConfig) -> int:
        """How many more sessions of this latent size, length and window fit the CUDA device's free memory."""
        return self._fitting(self._pool_shape(height, width, frames, config))

    def _fitting(self, shape: PoolShape) -> int:
        return fitting_sessions(self.dit, self.decoder, self.config, shape, self.fp8_cache)

    @on_device
    def rollout(
        self,
        embeds: Tensor,
        *,
        height: int,
        width: int,
        frames: int,
        policy: Policy | Sequence[Policy],
        seeds: Sequence[int],
        config: RolloutConfig,
        initial_noise: Tensor | None = None,
        renoise: Renoise | None = None,
        given: Tensor | None = None,
        init_latents: Tensor | None = None,
        strength: float = 1.0,
        dit: Callable[..., DiTOutput] | None = None,
        head: nn.Module | None = None,
    ) -> Rollout:
        """A batch of B = len(seeds) clips, to be closed: in the sessions' pool if its graphs are captured and B slots
        are free, else in a pool of its own.

        Args:
            embeds: [B, L, text_dim].
            height, width: latent size.
            frames: latent frames.
            policy: for all clips, or one per clip.
            seeds: one per clip.
            config: chunk length, window, schedule, commit.
            initial_noise, renoise: as `ExternalNoise` takes them.
            given: clean latents [B, G, C, H, W] that the clips begin with, G <= frames.
            init_latents: latents [B, F, C, H, W] of a video that is noised to `strength` (Schedule) and denoised again.
            strength: in (0, 1].
            dit, head: to be called instead of the model's, by the plain loop.
        """
        shape = self._pool_shape(height, width, frames, config)
        if dit is None and head is None:
            inputs = self._pools.get(shape)
            if inputs is None or inputs.graphs is None or inputs.cache.slots - inputs.cache.in_use < len(seeds):
                inputs = self._pool(shape, len(seeds))
            self._check_graphs(inputs)
            cache = inputs.cache
        else:
            inputs, cache = None, self._cache(shape, len(seeds))
        external = ExternalNoise(self._noise(seeds, height, width, config), initial_noise, renoise)
        noise = with_init_latents(external, init_latents, strength, config)
        policies = [policy] * len(seeds) if isinstance(policy, Policy) else policy
        model: Any = dit or self.dit  # called the same way
        head, text_kv = head or self.head, self.text_kv(embeds)
        return Rollout(model, head, cache, config, noise, policies, text_kv, given, strength, inputs)

    def _noise(self, seeds: Sequence[int], height: int, width: int, config: RolloutConfig) -> SeededNoise:
        shape = (config.chunk_frames, self.dit.config.in_dim, height, width)
        return SeededNoise(seeds, shape, self.dit.device, self.dit.dtype)

    def _pool_shape(self, height: int, width: int, frames: int | None, config: RolloutConfig) -> PoolShape:
        """Global attention (window None) is a window of the whole clip. A rolling one has headroom for one more chunk,
        so that the commit can ride along with the next chunk's first step."""
        if config.window is None and frames is None:
            raise ValueError("an endless stream needs a rolling window: give window=..., or the number of frames")
        self.dit.config.tokens_per_frame(height, width)
        size = (height, width, config.chunk_frames)
        if config.window is None:
            return PoolShape(max(frames, config.sink + config.chunk_frames), config.sink, config.rope, 0, *size)
        return PoolShape(config.window, config.sink, config.rope, config.chunk_frames, *size)

    def _pool(self, shape: PoolShape, slots: int) -> ModelRunner:
        """A cache of `slots` slots and the model runner of its sessions."""
        size, levels = (shape.height, shape.width), len(self.config.steps)
        cache = self._cache(shape, slots)
        return ModelRunner(self.dit, self.head, cache, shape.frames, size, levels, self.deterministic)

    def _cache(self, shape: PoolShape, slots: int) -> KVCache:
        model = self.dit.config
        return KVCache(
            model.num_layers,
            model.num_heads,
            model.head_dim,
            model.tokens_per_frame(shape.height, shape.width),
            shape.window,
            shape.sink,
            slots,
            self.dit.device,
            E4M3 if self.fp8_cache else self.dit.dtype,
            shape.rope,
            model.rope_theta,
            shape.headroom,
            self._cache_scales() if self.fp8_cache else None,
        )

    def _cache_scales(self) -> CacheScales:
        """Of every pool: for all noise levels of this engine's rollouts, and the commit's."""
        if self._scales is None:
            levels = Schedule(self.config.steps, self.config.shift).sigmas
            self._scales = cache_scales(self.dit, [0.0, *(TIMESTEPS * sigma for sigma in levels)])
        return self._scales

    @on_device
    @torch.inference_mode()
    def text_kv(self, embeds: Tensor) -> TextKV:
        """Cross-attention keys and values of prompt embeddings [B, L, text_dim]."""
        return self.dit.text_kv(embeds, collapse=True)

    @on_device
    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [B, L, text_dim]. Raises ValueError without a text encoder and for an empty prompt."""
        if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise ValueError(f"prompt={list(prompts)!r}: must be a text that is not empty, or a list of such")
        if self.text is None:
            raise ValueError("this pipeline has no text encoder: give prompt_embeds instead of a prompt")
        return self.text.encode(prompts)

    @on_device
    @torch.inference_mode()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] of pixel frames [B, T, 3, H, W] in [0, 1], in the model's device and dtype."""
        return self.decoder.encode(frames.to(self.dit.device, self.dit.dtype)).to(self.dit.dtype)

    @on_device
    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixel frames [B, T, 3, H, W] in [0, 1] of whole clips' latents [B, F, C, h, w]."""
        return self.decoder.decode(latents, None)[0]

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the shared pools: KV caches and model runners' buffers."""
        return sum(pool.nbytes + pool.cache.nbytes for pool in self._pools.values())

    def close(self) -> None:
        """Drop the cache pools and what was captured. Sessions still open keep theirs alive."""
        self._pools.clear()
        self._fit.clear()
        self._decoders.clear()


def with_init_latents(noise: Noise, init_latents: Tensor | None, strength: float, config: RolloutConfig) -> Noise:
    """The noise to start from, mixed with a video's latents at the first level of `strength`."""
    if init_latents is None:
        return noise
    return SDEditNoise(noise, init_latents, Schedule(config.steps, config.shift, strength).sigmas[0])
