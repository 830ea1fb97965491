"""A loaded model's components, and which of them live on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dsa_engine.checkpoints.inspect import CheckpointInfo
from dsa_engine.config import RolloutConfig
from dsa_engine.models import memory_estimate
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.offload import OffloadedCodec
from dsa_engine.models.umt5 import UMT5

logger = logging.getLogger(__name__)

# Pairs (confidence of a frame, mean squared latent distance to its full-step estimate that it stands for).
Calibration = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ModelComponents:
    """Everything a pipeline needs."""

    name: str
    dit: CausalDiT
    rollout: RolloutConfig
    head: ConfidenceHead | None = None
    decoder: Any = None  # a `VideoCodec`, or None
    text: Any = None  # a `TextEncoder`, or None
    height: int | None = None  # pixels
    width: int | None = None
    frames: int = 81  # pixel frames of a clip
    fps: float = 16.0
    calibration: Calibration = ()  # empty where it was never measured
    info: CheckpointInfo | None = None  # of a public checkpoint

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        """The modules that take memory, under the names of `memory_estimate`."""
        return {"generator": self.dit, "confidence": self.head, "vae": self.decoder, "text": self.text}


def apply_offload(
    model: ModelComponents,
    offload: str | Sequence[str] | None,
    rollout: RolloutConfig | None = None,
    sessions: int = 1,
    cache: torch.dtype | None = None,
) -> ModelComponents:
    """The same model with the components that `offload` names on the CPU, on the device only while they are used.

    Args:
        model: the DiT and its KV cache always stay on the device.
        offload: "text": umT5, a layer at a time for a new prompt (no other text encoder is offloaded). "vae": the
            decoder's weights and the states of its streams, a latent frame at a time. "auto": the first of
            `memory_estimate.PLACEMENTS` that fits the device's free memory, which is logged; nothing where the device
            is not CUDA. None: nothing.
        rollout: for "auto": of the sessions; None: the model's own.
        sessions: for "auto": how many, at the model's own video size.
        cache: for "auto": dtype of the KV cache; None: the DiT's.
    """
    device = model.dit.device
    if offload == "auto":
        chosen = _pick_offload(model, rollout or model.rollout, sessions, cache)
    else:
        chosen = memory_estimate.parse_offload(offload)
    if "text" in chosen and isinstance(model.text, UMT5):
        model.text.enable_offload()
    if "vae" in chosen and model.decoder is not None and not isinstance(model.decoder, OffloadedCodec):
        model = replace(model, decoder=OffloadedCodec(model.decoder, device))
    return model


def _pick_offload(
    model: ModelComponents, rollout: RolloutConfig, sessions: int, cache: torch.dtype | None
) -> tuple[str, ...]:
    device, stride = model.dit.device, getattr(model.decoder, "spatial_stride", 8)
    if device.type != "cuda":
        logger.info("offload nothing: %s is where it would go", device)
        return ()
    frames = model.decoder.latent_frames_of(model.frames) if model.decoder else (model.frames - 1) // 4 + 1
    workload = memory_estimate.Workload(
        (model.height or 480) // stride, (model.width or 832) // stride, frames, sessions, model.dit.dtype, cache
    )
    sizes = memory_estimate.footprints(model.modules)
    needs = {
        name: memory_estimate.predict(model.dit.config, rollout, workload, offload=name, **sizes).peak
        - memory_estimate.CUDA_CONTEXT_BYTES
        for name in memory_estimate.PLACEMENTS
    }
    weights = memory_estimate.measure(model.modules)["weights"].values()
    on_device = sum(sizes_by_device.get(str(device), 0) for sizes_by_device in weights)
    return memory_estimate.pick_offload(needs, memory_estimate.free_bytes(device) + on_device)
