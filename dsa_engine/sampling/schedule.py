"""The noise levels of a few-step flow-matching student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TIMESTEPS = 1000  # the model's timestep at pure noise


@dataclass(frozen=True)
class Schedule:
    """sigma_i = shift * s_i / (1 + (shift - 1) * s_i), s_i = steps_i / 1000, pure noise first.

    `steps` are raw timesteps, strictly falling within (0, 1000], the first 1000. Shift 5 warps 1000, 750, 500, 250 to
    1000, 937.5, 833.3, 625 (Self-Forcing training and inference.py); its demo uses shift 8.

    strength: below 1, for video to video, only the last round(strength * n) of the n levels (SDEdit, arXiv 2108.01073):
    what is there is noised to the first of them, and the lower that is, the more of it stays.
    """

    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    strength: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(
                f"strength={self.strength}: must be above 0 and at most 1; nearest is "
                f"{1.0 if self.strength > 1 else round(1 / max(len(self.steps), 1), 3)}"
            )
        if not self.shift > 0:
            raise ValueError(
                f"shift={self.shift}: must be above 0; Self-Forcing uses 5.0, 1.0 leaves the steps as given"
            )
        if not self.steps or self.steps[0] != TIMESTEPS:
            raise ValueError(f"steps={list(self.steps)}: the first must be {TIMESTEPS}, pure noise")
        if any(not 0 < low < high for high, low in zip(self.steps, self.steps[1:])):
            raise ValueError(f"steps={list(self.steps)}: must fall strictly and stay above 0, e.g. 1000, 750, 500, 250")

    def __len__(self) -> int:
        """How many levels there are to denoise at."""
        return max(1, round(self.strength * len(self.steps)))

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(warp(s / TIMESTEPS, self.shift) for s in self.steps[-len(self) :])


def warp(s: Any, shift: float) -> Any:
    """shift * s / (1 + (shift - 1) * s): the timestep shift of SD3, FLUX and Wan. s, a number or a tensor, in [0,
    1]."""
    return shift * s / (1 + (shift - 1) * s)
