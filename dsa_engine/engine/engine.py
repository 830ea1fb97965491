"""The engine: a model's parts, the cache pools, and the sessions that are open on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_engine.config import RolloutConfig
from dsa_engine.engine.rollout import Rollout
from dsa_engine.engine.session import Session
from dsa_engine.models.codec import VideoCodec
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT, TextKV
from dsa_engine.models.text import TextEncoder
from dsa_engine.sampling.cache import KVCache
from dsa_engine.sampling.noise import GivenNoise, GuidedNoise, Noise, Renoise, SeededNoise
from dsa_engine.sampling.policy import Policy
from dsa_engine.sampling.schedule import Schedule


class Engine:
    """Opens rollouts and sessions of one model. Imports no server, sets no signal handler, keeps no global state.

    One cache pool serves all sessions of a size and window; its slots are allocated when the first one opens.
    """

    def __init__(
        self, dit: CausalDiT, head: ConfidenceHead | None, decoder: VideoCodec | None, text: TextEncoder | None,
        config: RolloutConfig, max_sessions: int = 4,
    ):  # fmt: skip
        if max_sessions < 1:
            raise ValueError(f"max_sessions={max_sessions}: must be at least 1")
        self.dit, self.head, self.decoder, self.text = dit, head, decoder, text
        self.config, self.max_sessions = config, max_sessions
        self._pools: dict[tuple[int, int, int, str], KVCache] = {}  # by window, sink, tokens a frame and RoPE mode

    def session(
        self, prompt: str | None, embeds: Tensor, *, height: int, width: int, frames: int | None, fps: float,
        policy: Policy, seed: int, config: RolloutConfig, given: Tensor | None = None, guide: Tensor | None = None,
        strength: float = 1.0,
    ) -> Session:  # fmt: skip
        """A stream of latent size height x width; `frames` latent frames, or None for no end (rolling window only).

        given, guide, strength: as for `rollout`.
        """
        if self.decoder is None:
            raise ValueError("this pipeline has no decoder, so no sessions: use generate_latents")
        key = (*self._cache_shape(height, width, frames, config), config.rope)
        if key not in self._pools:  # pools of other shapes that nobody uses make room
            self._pools = {shape: pool for shape, pool in self._pools.items() if pool.in_use}
            self._pools[key] = self._cache(*key, slots=self.max_sessions)
        noise = guided(self._noise([seed], height, width, config), guide, strength, config)
        rollout = Rollout(
            self.dit, self.head, self._pools[key], config, noise, [policy], self.text_kv(embeds), given, strength
        )
        return Session(rollout, self.decoder, lambda text: self.text_kv(self.encode([text])), fps, prompt, frames)

    def rollout(
        self, embeds: Tensor, *, height: int, width: int, frames: int, policy: Policy, seeds: Sequence[int],
        config: RolloutConfig, initial: Tensor | None = None, renoise: Renoise | None = None,
        given: Tensor | None = None, guide: Tensor | None = None, strength: float = 1.0,
    ) -> Rollout:  # fmt: skip
        """A batch of B = len(seeds) clips of `frames` latent frames, on a cache of its own.

        given: clean latents [B, G, C, H, W] that the clips begin with, G <= frames; guide: latents [B, F, C, H, W] of a
        video that is noised to `strength` (Schedule) and made anew.
        """
        cache = self._cache(*self._cache_shape(height, width, frames, config), config.rope, slots=len(seeds))
        noise = GivenNoise(self._noise(seeds, height, width, config), initial, renoise)
        noise = guided(noise, guide, strength, config)
        policies = [policy] * len(seeds)
        return Rollout(self.dit, self.head, cache, config, noise, policies, self.text_kv(embeds), given, strength)

    def _noise(self, seeds: Sequence[int], height: int, width: int, config: RolloutConfig) -> SeededNoise:
        shape = (config.chunk_frames, self.dit.config.in_dim, height, width)
        return SeededNoise(seeds, shape, self.dit.device, self.dit.dtype)

    def _cache_shape(self, height: int, width: int, frames: int | None, config: RolloutConfig) -> tuple[int, int, int]:
        """(window, sink, tokens a frame). Global attention (window None) is a window of the whole clip."""
        if config.window is None and frames is None:
            raise ValueError("an endless stream needs a rolling window: give window=..., or the number of frames")
        window = config.window if config.window is not None else max(frames, config.sink + config.chunk_frames)
        return window, config.sink, self.dit.config.tokens_per_frame(height, width)

    def _cache(self, window: int, sink: int, tokens: int, rope: str, slots: int) -> KVCache:
        model = self.dit.config
        return KVCache(
            model.num_layers,
            model.num_heads,
            model.head_dim,
            tokens,
            window,
            sink,
            slots,
            self.dit.device,
            self.dit.dtype,
            rope,
            model.rope_theta,
        )

    @torch.inference_mode()
    def text_kv(self, embeds: Tensor) -> TextKV:
        """Cross-attention keys and values of prompt embeddings [B, L, text_dim]."""
        return self.dit.text_kv(embeds, collapse=True)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [B, L, text_dim]. Raises ValueError where there is no text encoder or no such prompt."""
        if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
            raise ValueError(f"prompt={list(prompts)!r}: must be a text that is not empty, or a list of such")
        if self.text is None:
            raise ValueError("this pipeline has no text encoder: give prompt_embeds instead of a prompt")
        return self.text.encode(prompts)

    @torch.inference_mode()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] of pixel frames [B, T, 3, H, W] in [0, 1], in the model's device and dtype."""
        return self.decoder.encode(frames.to(self.dit.device, self.dit.dtype)).to(self.dit.dtype)

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the shared cache pools."""
        return sum(pool.nbytes for pool in self._pools.values())

    def close(self) -> None:
        """Drop the cache pools. Sessions still open keep theirs alive."""
        self._pools.clear()


def guided(noise: Noise, guide: Tensor | None, strength: float, config: RolloutConfig) -> Noise:
    """The noise to start from: mixed with the guide's latents at the first level of `strength`."""
    if guide is None:
        return noise
    return GuidedNoise(noise, guide, Schedule(config.steps, config.shift, strength).sigmas[0])
