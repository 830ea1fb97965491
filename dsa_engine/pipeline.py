"""`Pipeline`: load a model, turn prompts into video. The arguments' names are diffusers' where diffusers has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsa_engine import pipeline_inputs
from dsa_engine.checkpoints.components import Calibration, apply_offload
from dsa_engine.checkpoints.inspect import CheckpointInfo
from dsa_engine.checkpoints.load import load_components, replace_head
from dsa_engine.config import RolloutConfig
from dsa_engine.engine.device import current, on_device
from dsa_engine.engine.engine import SESSIONS, Engine
from dsa_engine.engine.rollout import Rollout
from dsa_engine.engine.session import Chunk, Session, to_uint8
from dsa_engine.models.fp8 import E4M3, quantize_linears
from dsa_engine.models.fp8 import quantization as named_quantization
from dsa_engine.sampling.denoise import Denoised, Step
from dsa_engine.sampling.noise import Renoise, check_seed
from dsa_engine.sampling.policy import Fixed, Policy
from dsa_engine.sampling.schedule import TIMESTEPS, Schedule

GLOBAL = -1  # as a window: the whole clip, Self-Forcing's local_attn_size = -1
SMALL = 2**17  # activations of a chunk: shapes has 2^13, Wan 1.3B 2^23


@dataclass(frozen=True)
class VideoOutput:
    """frames in the asked output type; per clip and chunk: steps_per_chunk [B][N], confidence [B][N][F] or None;
    timings: seconds of the whole call and to the first chunk's latents."""

    frames: Any
    steps_per_chunk: list[list[int]]
    confidence: list[list[list[float]]] | None
    timings: dict[str, float]


def changed(config: RolloutConfig, **changes) -> RolloutConfig:
    """The config with some fields changed and checked; None leaves a field as it is, window GLOBAL is no window."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if changes.get("window") == GLOBAL:
        changes["window"] = None
    return replace(config, **changes)


class Pipeline:
    """A loaded model. Make one with `Pipeline.from_pretrained`."""

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
        self.quantization = quantization  # as `from_pretrained` was told
        self.calibration = calibration  # (confidence, expected error) by rising confidence, empty: never measured

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "shapes",
        *,
        head: str | Path | None = None,
        family: str | None = None,
        lora: str | Path | None = None,
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
    ) -> Pipeline:
        """Load a model.

        model: "shapes" (the small model in the package), a folder of this project's format, or a checkpoint of the Wan
        family: a file (`.safetensors`, `.pt`, an index of shards) or a folder of Wan's or diffusers' layout. What it
        was recognised as is in `pipe.found`.
        Of a checkpoint: family, such as "self-forcing" or "longlive", says whose chunks, window and schedule it gets
        where its config and name do not; lora: an adapter to merge; vae, text: the file or folder of a video VAE (Wan's
        or TAEHV; or "wan", "taehv", the kind to look for near the model) and of a text encoder (umT5, or prompts
        encoded before), or the modules themselves. None takes what lies in the model's own folder, False nothing.
        Without a VAE and a text encoder it serves `generate_latents`.
        head: a confidence head's file, as `dsa-engine train --recipe head` writes it; it takes the place of the model's
        own, and its threshold, presets and calibration that of the model's.
        device: default "cuda" where there is one, else "cpu". dtype (or torch_dtype): default bfloat16 on CUDA, float32
        elsewhere. window, sink: latent frames of the KV cache (RolloutConfig), window=-1 for global attention; rope:
        where the sink is seen, "absolute" or "relative"; shift, steps: the noise schedule. None leaves what the model's
        config says. max_sessions: cache slots of a pool, made when the first session opens; None: 4, or as many as fit
        what a CUDA device then has free, where those are fewer, which is said. deterministic: a session's bits never
        depend on which others run beside it, at the price of batching. offload: parts of "text" and "vae" that live on
        the CPU and are on the device only where they are at work, or "auto": as few as the device's free memory asks
        for (`models.memory`).
        quantization: "fp8", or only its halves "fp8-linear" (products) and "fp8-cache" (keys and values), see
        `models.fp8`; it needs compute capability 8.9, or a CPU, where it is a slow way to see FP8's numbers.
        Raises FileNotFoundError or ValueError naming the file and what was expected of it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: torch {torch.__version__} sees no CUDA device; use device='cpu'")
        dtype = dtype or torch_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        fp8 = named_quantization(quantization, device)  # before anything is read
        with current(device):
            parts = load_components(model, device=device, dtype=dtype, family=family, lora=lora, vae=vae, text=text)
            if fp8.linear:
                quantize_linears(parts.dit)
        if head is not None:
            parts = replace_head(parts, head)
        steps = None if steps is None else tuple(steps)
        config = changed(
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
        """How far a frame's estimate is expected to be from where all steps would have taken it.

        confidence: of a frame after fewer steps than all, in (0, 1), or several (after all of them the distance is 0).
        The error is the mean squared distance of latents, whose variance is about 1, as measured on held-out rollouts;
        linear between the points of `calibration`, and beyond its ends that of the end.
        Raises ValueError for values outside [0, 1], and where the head was never calibrated.
        """
        if not self.calibration:
            raise ValueError(f"model {self.name!r} has no calibration; `dsa-engine train --recipe head` measures one")
        if not all(0 <= value <= 1 for value in np.ravel(confidence)):
            raise ValueError(f"confidence={confidence}: must be within [0, 1]; nearest is {np.clip(confidence, 0, 1)}")
        return np.interp(confidence, *zip(*self.calibration)).tolist()

    @property
    def cpu_threads(self) -> int:
        """Threads that pay on a CPU, for `torch.set_num_threads`; the pipeline itself never sets this global.

        A small model's products are over before a second thread has woken up, and on a busy machine it waits for it at
        every one of them: one thread below SMALL activations a chunk, else torch's own count.
        """
        height, width = self._size()
        tokens = self.engine.dit.config.tokens_per_frame(height, width) * self.config.chunk_frames
        return 1 if tokens * self.engine.dit.config.dim < SMALL else torch.get_num_threads()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        image: Any = None,
        video: Any = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[Pipeline, int, float, dict], Any] | None = None,
        *,
        strength: float | None = None,
        renoise: Renoise | None = None,
        step_policy: str | Policy | None = None,
        min_steps: int | None = None,
        max_steps: int | None = None,
        confidence_threshold: float | None = None,
        commit: str | None = None,
    ) -> VideoOutput:
        """Whole clips, one per prompt, denoised as one batch; rows that stop early leave the batch.

        num_frames: pixel frames. num_inference_steps: the ceiling of steps a chunk may take. seed: of the first clip,
        later clips count up; `generator` gives its initial seed.
        image: the picture that the clip begins with; video: the frames that it begins with and goes on from, num_frames
        counting them too; with strength in (0, 1] the video is made anew instead, from its latents noised to the last
        round(strength * steps) levels: the lower, the more of it stays. Forms and scaling as `given_frames.pixels`.
        What was given is in the result as the codec gives it back.
        latents: noise [B, F, C, H, W] instead of drawing it; renoise: as in `generate_latents`.
        output_type: "np" float [B, T, H, W, C] in [0, 1], "pt" [B, T, C, H, W], "pil" lists of images, "latent"
        [B, F, C, h, w].
        step_policy: "dsa", "fixed", one of the model's presets (`config.presets`, such as "fast"), a `Policy`, or its
        command-line form such as "fixed:4"; default "dsa" where the model has a confidence head.
        commit: "clean" or "exit_step" (RolloutConfig).
        callback_on_step_end(pipe, step, timestep, {"latents": x0}) is called after every step.
        """
        if guidance_scale != 1.0 or negative_prompt is not None:
            raise ValueError(
                f"guidance_scale={guidance_scale}, negative_prompt={negative_prompt!r}: a distilled few-step model has "
                "its guidance built in; only guidance_scale=1.0 without a negative prompt is possible"
            )
        pipeline_inputs.check_output_type(self.engine, output_type)
        embeds = pipeline_inputs.encode_prompt(self.engine, prompt, prompt_embeds)
        policy = pipeline_inputs.resolve_policy(
            self.engine, step_policy, num_inference_steps, min_steps, max_steps, confidence_threshold, strength
        )
        seeds = pipeline_inputs.make_seeds(seed, generator, len(embeds))
        if latents is None:
            size = self._size(height, width)
            clip = pipeline_inputs.resolve_clip(
                self.engine, len(embeds), size, num_frames, image, video, strength, self.frames
            )
        elif any(x is not None for x in (height, width, num_frames, image, video)):
            raise ValueError("height, width, num_frames, image and video: with latents these count alone")
        else:
            clip = pipeline_inputs.Clip(*pipeline_inputs.check_latents(self.engine, latents, len(embeds)))
        pipeline_inputs.check_renoise(self.engine, renoise, len(embeds), clip.made, clip.size)
        start = time.perf_counter()
        rollout = self.engine.rollout(
            embeds,
            height=clip.size[0],
            width=clip.size[1],
            frames=clip.frames,
            policy=policy,
            seeds=seeds,
            config=changed(self.config, commit=commit),
            initial_noise=latents,
            renoise=renoise,
            given=clip.given,
            init_latents=clip.init_latents,
            strength=clip.strength,
        )
        chunks, first_chunk = self._roll(rollout, clip.made // self.config.chunk_frames, callback_on_step_end)
        result = torch.cat([*([] if clip.given is None else [clip.given]), *(c.latents for c in chunks)], dim=1)
        confidence = None
        if chunks[0].confidence is not None:
            confidence = torch.stack([c.confidence for c in chunks], dim=1).tolist()
        return VideoOutput(
            frames=self._decode(result, output_type),
            steps_per_chunk=[list(row) for row in zip(*(c.steps for c in chunks))],
            confidence=confidence,
            timings={"total": time.perf_counter() - start, "first_chunk": first_chunk},
        )

    def _roll(
        self, rollout: Rollout, count: int, callback: Callable[[Pipeline, int, float, dict], Any] | None
    ) -> tuple[list[Denoised], float]:
        """All chunks of a rollout, which is then closed, and the seconds until the first was there."""

        def on_step(step: Step) -> None:
            callback(self, step.index - 1, TIMESTEPS * step.sigma, {"latents": step.x0})

        chunks, first_chunk, start = [], 0.0, time.perf_counter()
        try:
            for _ in range(count):
                chunks.append(rollout.denoise(on_step if callback else None))
                rollout.accept(chunks[-1].latents)
                first_chunk = first_chunk or time.perf_counter() - start
        finally:
            rollout.close()
        return chunks, first_chunk

    def generate_latents(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        renoise: Renoise | None = None,
        step_policy: str | Policy | None = None,
        seed: int = 0,
        commit: str | None = None,
    ) -> Tensor:
        """A rollout with everything random given from outside: clean latents [B, F, C, H, W] for the noise `latents`.

        prompt_embeds [B, L, text_dim], zero-padded to text_len. renoise: the noise that a chunk is re-noised with, as a
        tensor [B, F, C, H, W] (the same after every step) or [S - 1, B, F, C, H, W] (one for each step but the last),
        or renoise(chunk, step) -> [B, chunk_frames, C, H, W], both counted from 0: step is the one just taken.
        None draws it from `seed`.
        """
        return self(
            latents=latents,
            prompt_embeds=prompt_embeds,
            renoise=renoise,
            step_policy=step_policy,
            seed=seed,
            commit=commit,
            output_type="latent",
        ).frames

    def session(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        step_policy: str | Policy | None = None,
        num_inference_steps: int | None = None,
        min_steps: int | None = None,
        max_steps: int | None = None,
        confidence_threshold: float | None = None,
        image: Any = None,
        video: Any = None,
        strength: float | None = None,
        window: int | None = None,
        sink: int | None = None,
        rope: str | None = None,
        commit: str | None = None,
    ) -> Session:
        """A live stream (see `Session`). num_frames: pixel frames until it ends; None is endless.

        image, video, strength: as in a call; a stream gives only the frames that come after what it began with, and
        ends with the video that it makes anew. window, sink: this session's cache (latent frames); rope, commit: of
        RolloutConfig.
        """
        embeds = pipeline_inputs.encode_prompt(self.engine, prompt, prompt_embeds)
        if len(embeds) != 1:
            raise ValueError(f"{len(embeds)} prompts: a session is one stream; open one session per prompt")
        config = changed(self.config, window=window, sink=sink, rope=rope, commit=commit)
        seed = check_seed(seed)
        policy = pipeline_inputs.resolve_policy(
            self.engine, step_policy, num_inference_steps, min_steps, max_steps, confidence_threshold, strength
        )
        clip = pipeline_inputs.resolve_clip(
            self.engine, 1, self._size(height, width), num_frames, image, video, strength, None
        )
        return self.engine.session(
            prompt,
            embeds,
            height=clip.size[0],
            width=clip.size[1],
            frames=clip.frames,
            fps=self.fps,
            policy=policy,
            seed=seed,
            config=config,
            given=clip.given,
            init_latents=clip.init_latents,
            strength=clip.strength,
        )

    def stream(self, prompt: str, num_frames: int | None = None, **options) -> Iterator[Chunk]:
        """Chunks as they are made (`Session.chunks`), each decoded beside the denoising of the next; options as for
        `session`. Leaving the loop early frees everything."""
        return self.session(prompt, num_frames=num_frames, **options).chunks()

    def warmup(self, progress: Callable[[int, int], None] | None = None, graphs: bool = True) -> float:
        """Make one chunk and throw it away; returns the seconds it took. The first real chunk is then a usual one.

        On a CUDA device the graphs of sessions of the default size and window are captured as well, of the default
        length where the window is the whole clip; progress(done, of) is called after each. graphs=False leaves them
        out: for one clip they take longer to capture than they save.
        """
        start = time.perf_counter()
        model, cuda = self.engine.dit.config, self.device.type == "cuda"
        embeds, policy = torch.zeros(1, 1, model.text_dim), Fixed(self.max_steps)
        if graphs and cuda:
            self.engine.capture(**self._usual(), progress=progress)
        if self.engine.decoder is not None and cuda:
            frames = self.frames if self.config.window is None else None  # in the pool that was captured
            with self.session(prompt_embeds=embeds, num_frames=frames, step_policy=policy) as session:
                session.next_chunk()
            self.warm_decoder()
        else:
            noise = torch.zeros(1, self.config.chunk_frames, model.in_dim, *self._size())
            latents = self.generate_latents(noise, embeds, step_policy=policy)
            if self.engine.decoder is not None:
                self._decode(latents, "pt")
        return time.perf_counter() - start

    def make_room(self, wanted: int) -> int:
        """Slots for up to `wanted` sessions of the default size and window from now on (`max_sessions`): as many as fit
        what a CUDA device has free, all of them elsewhere. Before anything is opened or warmed up; at least 1."""
        fit = wanted if self.device.type != "cuda" else self.engine.fitting(**self._usual())
        self.engine.max_sessions = max(1, min(wanted, fit))
        return self.engine.max_sessions

    def _usual(self) -> dict[str, Any]:
        """What `Engine.capture` takes, for sessions of the default size and window, and of the default length where the
        window is the whole clip."""
        (height, width), config = self._size(), self.config
        whole = config.window is None and self.engine.decoder is not None
        frames = pipeline_inputs.latent_frames(self.engine, self.frames) if whole else config.chunk_frames
        return {"height": height, "width": width, "frames": frames, "config": config}

    def warm_decoder(self) -> None:
        """Decode two chunks of nothing as sessions of the default size do. For a thread that decodes and is not the one
        that called `warmup`: what is chosen and loaded at first use is each thread's own."""
        height, width = self._size()
        self.engine.warm_decoder(height=height, width=width, config=self.config)

    def close(self) -> None:
        """Free the cache pools. The pipeline can still be used: the next session allocates anew."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Latent height and width of a pixel size, the model's own where none is given."""
        height = self.height if height is None else height
        width = self.width if width is None else width
        return pipeline_inputs.latent_size(self.engine, height, width)

    @on_device
    @torch.inference_mode()
    def _decode(self, latents: Tensor, output_type: str):
        if output_type == "latent":
            return latents
        pixels, _ = self.engine.decoder.decode(latents, None)
        if output_type == "pt":
            return pixels.float().clamp(0, 1)
        if output_type == "np":
            return pixels.float().clamp(0, 1).movedim(2, -1).cpu().numpy()
        from PIL import Image

        return [[Image.fromarray(frame) for frame in clip] for clip in to_uint8(pixels)]
