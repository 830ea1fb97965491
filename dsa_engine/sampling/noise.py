"""Counter-based noise: the same seed, chunk and step give the same values whatever else runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch

from dsa_engine import ops

Renoise: TypeAlias = torch.Tensor | Callable[[int, int], torch.Tensor]


def check_seed(seed: int) -> int:
    """A seed is an integer in [0, 2^64). Raises ValueError with the nearest."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed={seed!r}: must be an integer from 0 to 2^64 - 1, e.g. 0")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: must be from 0 to 2^64 - 1; nearest is {0 if seed < 0 else 2**64 - 1}")
    return int(seed)


class SeededNoise:
    """Each row's noise from its own seed (`ops.gaussian`): step 0 is a chunk's first, step k what follows step k."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        bits = [check_seed(seed) for seed in seeds]
        self.seeds = torch.tensor([b - 2**64 if b >= 2**63 else b for b in bits], device=device)

    def initial(self, chunk: int) -> torch.Tensor:
        return self._draw(self.seeds, chunk, 0)

    def renoise(self, chunk: int, step: int, rows: Sequence[int]) -> torch.Tensor:
        return self._draw(self.seeds if len(rows) == len(self.seeds) else self.seeds[list(rows)], chunk, step)

    def draw_chunk(self, chunk: int, count: int) -> torch.Tensor:
        seeds = self.seeds.repeat_interleave(count)
        step = torch.arange(count, device=self.device).repeat(len(self.seeds))
        noise = ops.gaussian(seeds, torch.full_like(seeds, chunk), step, self.shape)
        return noise.unflatten(0, (-1, count)).to(self.dtype)

    def _draw(self, seeds: torch.Tensor, chunk: int, step: int) -> torch.Tensor:
        chunk, step = (torch.full_like(seeds, value) for value in (chunk, step))
        return ops.gaussian(seeds, chunk, step, self.shape).to(self.dtype)


class Noise(Protocol):
    """Where a rollout's noise comes from."""

    def initial(self, chunk: int) -> torch.Tensor:
        """[B, F, C, H, W] to start chunk `chunk` from."""

    def renoise(self, chunk: int, step: int, rows: Sequence[int]) -> torch.Tensor:
        """[len(rows), F, C, H, W] after `step` steps (1, 2, ...)."""

    def draw_chunk(self, chunk: int, count: int) -> torch.Tensor:
        """All noise of a chunk of at most `count` steps: [B, count, F, C, H, W], the initial noise first."""


class SDEditNoise:
    """Starts from a video's latents [B, F_total, C, H, W] noised to level sigma instead of pure noise."""

    def __init__(self, noise: Noise, init_latents: torch.Tensor, sigma: float):
        self.noise, self.init_latents, self.sigma = noise, init_latents, sigma
        self.renoise = noise.renoise

    def initial(self, chunk: int) -> torch.Tensor:
        return self._mix(chunk, self.noise.initial(chunk))

    def draw_chunk(self, chunk: int, count: int) -> torch.Tensor:
        noise = self.noise.draw_chunk(chunk, count)
        return torch.cat((self._mix(chunk, noise[:, 0])[:, None], noise[:, 1:]), dim=1)

    def _mix(self, chunk: int, noise: torch.Tensor) -> torch.Tensor:
        frames = noise.shape[1]
        level = noise.new_full(noise.shape[:2], self.sigma, dtype=torch.float32)
        clean = self.init_latents[:, chunk * frames : (chunk + 1) * frames].to(noise)
        return ops.renoise(clean, noise, level)


class ExternalNoise:
    """Noise from the caller, so that another implementation's rollout can be compared value by value.

    latents: [B, F_total, C, H, W]; renoise: as in `Pipeline.generate_latents`. What is None comes from `fallback`.
    """

    def __init__(self, fallback: SeededNoise, latents: torch.Tensor | None, renoise: Renoise | None):
        self.fallback, self.latents, self.external = fallback, latents, renoise
        self.frames = fallback.shape[0]

    def initial(self, chunk: int) -> torch.Tensor:
        if self.latents is None:
            return self.fallback.initial(chunk)
        return self._to_device(self.latents[:, self._span(chunk)])

    def renoise(self, chunk: int, step: int, rows: Sequence[int]) -> torch.Tensor:
        if self.external is None:
            return self.fallback.renoise(chunk, step, rows)
        if callable(self.external):
            noise = self.external(chunk, step - 1)
            expected = [len(self.fallback.seeds), *self.fallback.shape]
            if not isinstance(noise, torch.Tensor) or list(noise.shape) != expected:
                got = list(noise.shape) if isinstance(noise, torch.Tensor) else type(noise).__name__
                raise ValueError(f"renoise({chunk}, {step - 1}) gave {got}: must be a tensor of shape {expected}")
        else:
            noise = (self.external if self.external.ndim == 5 else self.external[step - 1])[:, self._span(chunk)]
        return self._to_device(noise[list(rows)])

    def draw_chunk(self, chunk: int, count: int) -> torch.Tensor:
        if self.latents is None and self.external is None:
            return self.fallback.draw_chunk(chunk, count)
        rows = range(len(self.fallback.seeds))
        return torch.stack((self.initial(chunk), *(self.renoise(chunk, k, rows) for k in range(1, count))), dim=1)

    def _span(self, chunk: int) -> slice:
        return slice(chunk * self.frames, (chunk + 1) * self.frames)

    def _to_device(self, noise: torch.Tensor) -> torch.Tensor:
        return noise.to(self.fallback.device, self.fallback.dtype)
