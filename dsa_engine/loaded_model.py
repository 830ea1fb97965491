"""`LoadedModel`: a model that is loaded and sized; `Pipeline` generates with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from dsa_engine import pipeline_inputs
from dsa_engine.checkpoints.components import Calibration, apply_offload
from dsa_engine.checkpoints.inspect import CheckpointInfo
from dsa_engine.checkpoints.load import find_head, load_components, replace_head
from dsa_engine.config import RolloutConfig
from dsa_engine.engine.device import current
from dsa_engine.engine.engine import SESSIONS, Engine
from dsa_engine.models.fp8 import E4M3, quantize_linears
from dsa_engine.models.fp8 import quantization as named_quantization
from dsa_engine.sampling.schedule import Schedule

SMALL = 2**17  # activations of a chunk: shapes has 2^13, Wan 1.3B 2^23


class LoadedModel:
    """A model with its engine, the size it was made for and what its confidence head was calibrated to."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        height: int | None,
        width: int | None,
        frames: int,
        fps: float,
        calibration: Calibration = (),
        found: CheckpointInfo | None = None,
        quantization: str | None = None,
    ):
        self.engine, self.name, self.found = engine, name, found
        self.height, self.width, self.frames, self.fps = height, width, frames, fps
        self.quantization = quantization  # as given to `from_pretrained`
        self.calibration = calibration  # (confidence, expected error) by rising confidence, empty if never measured

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "shapes",
        *,
        head: str | Path | None = None,
        family: str | None = None,
        lora: str | Path | None = None,
        lora_strength: float | None = None,
        vae: str | Path | nn.Module | bool | None = None,
        text: str | Path | nn.Module | bool | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        window: int | None = None,
        sink: int | None = None,
        rope: str | None = None,
        shift: float | None = None,
        steps: Sequence[float] | None = None,
        chunk_frames: int | None = None,
        max_sessions: int | None = None,
        deterministic: bool = False,
        offload: str | Sequence[str] | None = None,
        quantization: str | None = None,
    ) -> Self:
        """Load a model. None leaves a rollout option as the model's config has it.

        Args:
            model: "shapes" (the small model in the package), a folder of this project's format, or a checkpoint of the
                Wan family: a file (`.safetensors`, `.pt`, an index of shards) or a folder of Wan's or diffusers'
                layout. `pipe.found` says what it was recognised as.
            head: file of a confidence head, as `dsa-engine train --recipe head` writes it, or the name of one that the
                model's folder has as `head-<name>.safetensors` ("token" of "shapes"); replaces the model's own with
                its threshold, presets and calibration.
            family: of a checkpoint whose config and name do not say it, such as "self-forcing" or "longlive": defines
                chunk, window and schedule.
            lora: adapter to merge into a checkpoint, its file or PEFT's folder. Its scale is told by the file: see
                `checkpoints.lora`.
            lora_strength: how much of it is merged; None: 1, as it was trained.
            vae: of a checkpoint: file or folder of a video VAE (Wan's or TAEHV), "wan" or "taehv" (the kind to look for
                near the model), or a module. None: what lies in the model's folder; False: none, for
                `generate_latents` only.
            text: of a checkpoint: file or folder of a text encoder (umT5, or prompts encoded before), or a module; None
                and False as for vae.
            device: default "cuda" if available, else "cpu".
            dtype: default bfloat16 on CUDA, else float32.
            torch_dtype: the same.
            window: latent frames of the KV cache; -1: global attention.
            sink: latent frames that are never evicted.
            rope: where the sink is seen, "absolute" or "relative".
            shift: of the noise schedule.
            steps: raw timesteps of the noise schedule.
            chunk_frames: latent frames of a chunk.
            max_sessions: cache slots of a pool, allocated when the first session opens. None: 4, or as many as fit the
                device's free memory if fewer (logged).
            deterministic: a session's bits never depend on which others run beside it, at the price of batching.
            offload: "text", "vae" or both: kept on the CPU and on the device only while in use; "auto": as few as free
                memory requires (`models.memory_estimate`).
            quantization: "fp8", or its halves "fp8-linear" (GEMMs) and "fp8-cache" (keys and values), see `models.fp8`;
                needs compute capability 8.9, or a CPU, which emulates it slowly.

        Raises:
            FileNotFoundError, ValueError: naming the file and what was expected of it.
        """
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(target)!r}: torch {torch.__version__} sees no CUDA device; use device='cpu'")
        dtype = dtype or torch_dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        fp8 = named_quantization(quantization, target)  # before anything is read
        with current(target):
            options: dict[str, Any] = {"family": family, "vae": vae, "text": text}
            options |= {"lora": lora, "lora_strength": lora_strength}
            parts = load_components(model, device=target, dtype=dtype, **options)
            if fp8.linear:
                quantize_linears(parts.dit)
        if head is not None:
            parts = replace_head(parts, find_head(model, head))
        steps = None if steps is None else tuple(steps)
        config = pipeline_inputs.override_config(
            parts.rollout, window=window, sink=sink, rope=rope, shift=shift, steps=steps, chunk_frames=chunk_frames
        )
        Schedule(config.steps, config.shift)  # a bad schedule is an error now, not at the first prompt
        parts = apply_offload(parts, offload, config, max_sessions or SESSIONS, E4M3 if fp8.cache else None)
        engine = Engine(
            parts.dit, parts.head, parts.decoder, parts.text, config, max_sessions, deterministic, fp8.cache
        )
        return cls(
            engine,
            name=parts.name,
            height=parts.height,
            width=parts.width,
            frames=parts.frames,
            fps=parts.fps,
            calibration=parts.calibration,
            found=parts.info,
            quantization=quantization,
        )

    @property
    def config(self) -> RolloutConfig:
        return self.engine.config

    @property
    def device(self) -> torch.device:
        """Where the model is. It is made current wherever the pipeline or a session of it is called, in any thread."""
        return self.engine.device

    @property
    def max_steps(self) -> int:
        """Length of the step list: the most steps a chunk can take."""
        return len(self.config.steps)

    def expected_error(self, confidence: float | Sequence[float]) -> float | list[float]:
        """Expected mean squared distance of a frame's estimate from where all steps would have taken it.

        Args:
            confidence: of a frame after fewer steps than all, in (0, 1), or several.

        Returns:
            As measured on held-out rollouts, for latents of variance about 1; linear between the points of
            `calibration`, constant beyond its ends.

        Raises:
            ValueError: for values outside [0, 1], and if the head was never calibrated.
        """
        if not self.calibration:
            raise ValueError(f"model {self.name!r} has no calibration; `dsa-engine train --recipe head` measures one")
        if not all(0 <= value <= 1 for value in np.ravel(confidence)):
            raise ValueError(f"confidence={confidence}: must be within [0, 1]; nearest is {np.clip(confidence, 0, 1)}")
        return np.interp(np.asarray(confidence), *np.transpose(self.calibration)).tolist()

    @property
    def cpu_threads(self) -> int:
        """Threads that pay off on a CPU, for `torch.set_num_threads`; the pipeline itself never sets this global.

        A small model's GEMMs are over before a second thread has woken up: one thread below SMALL activations a chunk,
        else torch's own count.
        """
        height, width = self._size()
        tokens = self.engine.dit.config.tokens_per_frame(height, width) * self.config.chunk_frames
        return 1 if tokens * self.engine.dit.config.dim < SMALL else torch.get_num_threads()

    def make_room(self, max_sessions: int) -> int:
        """Slots for up to `max_sessions` sessions of the default size and window from now on: as many as
        fit a CUDA device's free memory, all of them elsewhere, at least 1. Call it before anything is opened.
        """
        fit = max_sessions if self.device.type != "cuda" else self.engine.fitting(**self._usual())
        self.engine.max_sessions = max(1, min(max_sessions, fit))
        return self.engine.max_sessions

    def _usual(self) -> dict[str, Any]:
        """Arguments of `Engine.capture` for sessions of the default size and window, and of the default length if the
        window is the whole clip.
        """
        (height, width), config = self._size(), self.config
        whole = config.window is None and self.engine.decoder is not None
        frames = pipeline_inputs.latent_frames(self.engine, self.frames) if whole else config.chunk_frames
        return {"height": height, "width": width, "frames": frames, "config": config}

    def warm_decoder(self) -> None:
        """Decode two chunks of zeros like sessions of the default size, for a thread that decodes but did not call
        `warmup`: some caches of cuDNN and cuBLAS are per thread.
        """
        height, width = self._size()
        self.engine.warm_decoder(height=height, width=width, config=self.config)

    def close(self) -> None:
        """Free the cache pools. The pipeline can still be used: the next session allocates them again."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Latent height and width of a pixel size, the model's own where none is given."""
        height = self.height if height is None else height
        width = self.width if width is None else width
        return pipeline_inputs.latent_size(self.engine, height, width)
