"""How many sessions a pool gets on a CUDA device."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch

from dsa_engine.config import RolloutConfig
from dsa_engine.models import memory_estimate
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3
from dsa_engine.models.interfaces import VideoCodec
from dsa_engine.models.offload import OffloadedCodec

logger = logging.getLogger(__name__)


class PoolShape(NamedTuple):
    """What sessions must have in common to share a pool: frames of window, sink and headroom, the RoPE mode,
    latent size, frames of a chunk."""

    window: int
    sink: int
    rope: str
    headroom: int
    height: int
    width: int
    frames: int


def fitting_sessions(
    dit: CausalDiT, decoder: VideoCodec, config: RolloutConfig, shape: PoolShape, fp8_cache: bool
) -> int:
    """How many more sessions of a pool fit the CUDA device's free memory."""
    rolling = None if shape.headroom == 0 else shape.window
    config = replace(config, window=rolling, sink=shape.sink, rope=shape.rope, chunk_frames=shape.frames)
    load = memory_estimate.Workload(
        shape.height, shape.width, shape.window, dtype=dit.dtype, cache=E4M3 if fp8_cache else None
    )
    away = isinstance(decoder, OffloadedCodec)  # its weights are not on the device yet, all others are
    weights = {
        "generator": 0,
        "confidence": 0,
        "vae": memory_estimate.module_bytes(decoder) if away else 0,
        "text": 0,
    }
    return memory_estimate.count_sessions(
        dit.config,
        config,
        load,
        memory_estimate.free_bytes(dit.device) + memory_estimate.CUDA_CONTEXT_BYTES,
        text=None,
        weights=weights,
        vae=memory_estimate.vae_footprint(decoder),
        offload=("vae",) if away else (),
    )


def choose_slots(device: torch.device, max_sessions: int, requested: bool, fit: int) -> int:
    """Slots of a new pool where `fit` sessions fit; logs where those are fewer than `max_sessions`, which `requested`
    overrides."""
    if fit >= max_sessions:
        return max_sessions
    free = memory_estimate.format_bytes(memory_estimate.free_bytes(device))
    if requested:
        logger.warning(
            "max_sessions=%d: memory may run out, for %s is free on %s and that is for %d; nearest is %d",
            max_sessions,
            free,
            device,
            fit,
            max(fit, 1),
        )
        return max_sessions
    logger.warning(
        "places for %d sessions instead of %d: %s is free on %s, and that is for %d; a smaller window, "
        "quantization='fp8-cache', offload='auto' or vae='taehv' leave more",
        max(fit, 1),
        max_sessions,
        free,
        device,
        fit,
    )
    return max(fit, 1)
