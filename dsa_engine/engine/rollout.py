"""A rollout: B clips that advance chunk by chunk in step on the KV cache. Latents only; `Session` adds pixels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_engine.config import RolloutConfig
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT, TextKV
from dsa_engine.sampling.cache import KVCache
from dsa_engine.sampling.denoise import Denoised, Step, commit_chunk, denoise_chunk
from dsa_engine.sampling.noise import Noise
from dsa_engine.sampling.policy import Policy
from dsa_engine.sampling.schedule import Schedule


class Rollout:
    """Owns everything a clip's latents depend on: cache slots, prompt keys and values, noise, policies, position.

    A chunk is committed (its clean keys and values written) only when the next one is wanted: the first frames leave
    earlier, and the last chunk of a clip is never committed at all. State changes only after the forward that it
    belongs to has succeeded, and a forward writes only frames that are evicted anyway, so a failed step can be tried
    again with the same result.
    """

    def __init__(
        self, dit: CausalDiT, head: ConfidenceHead | None, cache: KVCache, config: RolloutConfig,
        noise: Noise, policies: Sequence[Policy], text_kv: TextKV, given: Tensor | None = None, strength: float = 1.0,
    ):  # fmt: skip
        """given: clean latents [B, G, C, H, W] that the clip begins with; strength: of the Schedule."""
        self.dit, self.head, self.cache, self.config, self.noise = dit, head, cache, config, noise
        self.schedule = Schedule(config.steps, config.shift, strength)
        self.given = given
        self.fresh = [policy.start(len(self.schedule)) for policy in policies]  # what `restart` goes back to
        self.policies = copy.deepcopy(self.fresh)
        self.slot: Tensor | None = cache.acquire(len(policies))
        self.text_kv = text_kv
        self.commit_seconds = 0.0  # of the last `denoise`
        self._begin()

    def _begin(self) -> None:
        self.index = 0  # of the next chunk to be made
        self.position = 0  # of its first frame
        self.past: list[tuple[int, Tensor]] = []  # (first frame, latents) of the chunks that a recache would replay
        if self.given is not None:
            size = self.config.chunk_frames
            short = self.given.shape[1] % size  # a picture is one frame: what is no whole chunk comes first
            for latents in self.given.split([short] * bool(short) + [size] * (self.given.shape[1] // size), dim=1):
                self._remember(latents)
        self.committed = True
        self.stale = bool(self.past)  # the cache has yet to be made, or was made under an earlier prompt

    @torch.inference_mode()
    def denoise(self, on_step: Callable[[Step], None] | None = None) -> Denoised:
        """Commit the previous chunk, then denoise the next one. It counts only when it is taken with `accept`."""
        start = time.perf_counter()
        self.settle()
        self.commit_seconds = time.perf_counter() - start
        return denoise_chunk(
            self.dit,
            self.head,
            self.noise.initial(self.index),
            chunk=self.index,
            sigmas=self.schedule.sigmas,
            policies=self.policies,
            renoise=lambda step, rows: self.noise.renoise(self.index, step, rows),
            text_kv=self.text_kv,
            rows=self.cache.rows(self.slot, self.config.chunk_frames),
            on_step=on_step,
        )

    def accept(self, latents: Tensor) -> None:
        """Move on to the next chunk."""
        self._remember(latents)
        self.index, self.committed = self.index + 1, False

    def _remember(self, latents: Tensor) -> None:
        """Append to the past. Kept of it: the chunks that hold the sink and those that fill the ring."""
        self.past.append((self.position, latents))
        self.position += latents.shape[1]
        ring = [i for i, (first, _) in enumerate(self.past) if first >= self.cache.sink]
        if sum(self.past[i][1].shape[1] for i in ring[1:]) >= self.cache.window - self.cache.sink:
            del self.past[ring[0]]

    def switch(self, text_kv: TextKV, recache: bool = True) -> None:
        """Go on under another prompt. With `recache` the past's keys and values are made anew under it."""
        if not recache:
            self.settle()  # what was made under the old prompt is committed under it
        self.text_kv = text_kv
        self.stale = self.stale or (recache and bool(self.past))

    @torch.inference_mode()
    def settle(self) -> None:
        """Bring the cache up to date: commit what is not committed, or replay the whole window after a switch."""
        if self.stale:
            self.cache.clear(self.slot)
            for position, latents in self.past:
                self.cache.seek(self.slot, position)
                self._commit(latents, "clean")
        elif not self.committed:
            self._commit(self.past[-1][1], self.config.commit)
        self.stale, self.committed = False, True

    def _commit(self, latents: Tensor, mode: str) -> None:
        frames = latents.shape[1]
        if mode == "clean":  # "exit_step" keeps what the last denoising step has written
            commit_chunk(self.dit, latents, self.text_kv, self.cache.rows(self.slot, frames))
        self.cache.advance(self.slot, frames)

    def save(self) -> dict[str, Any]:
        """A copy of the whole state; `load` brings it back, here or in a rollout made alike."""
        return {
            "cache": self.cache.save(self.slot),
            "policies": copy.deepcopy(self.policies),
            "past": list(self.past),
            **{name: getattr(self, name) for name in _PLAIN_STATE},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.cache.load(self.slot, state["cache"])
        self.policies = copy.deepcopy(state["policies"])
        self.past = list(state["past"])
        for name in _PLAIN_STATE:
            setattr(self, name, state[name])

    def restart(self) -> None:
        """Back to the first chunk, under the prompt in force."""
        self.cache.clear(self.slot)
        self.policies = copy.deepcopy(self.fresh)
        self._begin()

    def close(self) -> None:
        """Give the cache slots back. Harmless when done twice."""
        if self.slot is not None:
            self.cache.release(self.slot)
            self.slot, self.past = None, []


# Replaced, never written to: no copy needed.
_PLAIN_STATE = ("text_kv", "noise", "given", "index", "position", "committed", "stale")
