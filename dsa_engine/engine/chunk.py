"""A chunk of a stream, and how long its stages took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dsa_engine.engine.device import Moment


@dataclass(frozen=True)
class Chunk:
    """The result of one `next_chunk`.

    Attributes:
        index: of the chunk, from 0.
        frames: uint8 [T, H, W, 3].
        latents: [F, C, h, w].
        steps: denoising steps taken.
        confidence: one value in (0, 1) per latent frame; None without a head.
        pts: seconds of the first frame from the clip's start.
        timings: milliseconds per stage, by events on a CUDA device (the host runs ahead of it), else by the clock:
            "commit": the previous chunk's, where it takes a forward of its own; within the first step it counts there.
            "denoise": all steps, recommits of the past after a prompt change included; "step": their mean.
            "decode": latents to pixels, on the device. "copy": pixels to uint8 on the host.
            "total": commit + denoise + decode + copy.
        prompt: the one in force.
    """

    index: int
    frames: np.ndarray
    latents: Tensor
    steps: int
    confidence: list[float] | None
    pts: float
    timings: dict[str, float]
    prompt: str | None


class DenoiseTimes(NamedTuple):
    """A chunk's start on the host's clock and on the device, the end of its steps, and the commit's span in between."""

    start: float
    started: Moment
    denoised: Moment
    commit: tuple[Moment, Moment] | None

    def timings(self, steps: int, decoded: Moment, copied: Moment) -> dict[str, float]:
        """`Chunk.timings`, once the host has waited for the frames."""
        commit = 0.0 if self.commit is None else self.commit[1].since(self.commit[0])
        stages = {
            "commit": commit,
            "denoise": self.denoised.since(self.started) - commit,
            "decode": decoded.since(self.denoised),
            "copy": copied.since(decoded),
        }
        stages = {name: 1e3 * seconds for name, seconds in stages.items()}
        return stages | {"total": sum(stages.values()), "step": stages["denoise"] / steps}
