"""Arguments of `Pipeline`, checked and converted to what the engine takes.

Every function raises ValueError with the value, the rule and the nearest legal value, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsa_engine.checks import check_choice
from dsa_engine.config import RolloutConfig, nearest
from dsa_engine.engine.engine import Engine
from dsa_engine.media import preprocess
from dsa_engine.media.image import read_image
from dsa_engine.media.video import read_video
from dsa_engine.sampling.noise import Renoise, check_seed
from dsa_engine.sampling.policy import Confidence, Fixed, Policy, Relative, parse_policy
from dsa_engine.sampling.schedule import Schedule

GLOBAL = -1  # as a window: the whole clip, Self-Forcing's local_attn_size = -1
OUTPUT_TYPES = ("np", "pt", "pil", "latent")
WAN_STRIDE = 8  # pixels per latent pixel without a decoder


def override_config(config: RolloutConfig, **changes) -> RolloutConfig:
    """The config with some fields changed and checked; None leaves a field as it is, window GLOBAL means no window."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if changes.get("window") == GLOBAL:
        changes["window"] = None
    return replace(config, **changes)


def encode_prompt(engine: Engine, prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> Tensor:
    """Prompt embeddings [B, L, text_dim], encoded or given."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either a prompt or prompt_embeds" + ("" if prompt is None else ", not both"))
    if prompt_embeds is None:
        return engine.encode(prompt if isinstance(prompt, (list, tuple)) else [prompt])
    model = engine.dit.config
    shape = list(prompt_embeds.shape) if isinstance(prompt_embeds, Tensor) else type(prompt_embeds).__name__
    fits = isinstance(shape, list) and len(shape) == 3 and shape[2] == model.text_dim and shape[1] <= model.text_len
    if not fits:
        raise ValueError(
            f"prompt_embeds of shape {shape}: must be a tensor [B, L, {model.text_dim}] with L at most {model.text_len}"
        )
    return prompt_embeds


def check_output_type(engine: Engine, output_type: str) -> None:
    """Check that the pipeline can return this form."""
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if output_type != "latent" and engine.decoder is None:
        raise ValueError(f"output_type={output_type!r}: this pipeline has no decoder; only 'latent' is possible")


def make_seeds(seed: int | None, generator: torch.Generator | None, batch: int) -> list[int]:
    """One seed per clip, counting up from the seed or from the generator's initial one."""
    if generator is not None and seed is not None:
        raise ValueError(f"seed={seed} with a generator: give one or the other")
    first = check_seed(generator.initial_seed() if generator is not None else 0 if seed is None else seed)
    return [(first + i) % 2**64 for i in range(batch)]


def default_threshold(engine: Engine) -> float:
    """The threshold of step_policy="dsa": the model's own, 0.5 where it was never calibrated."""
    return 0.5 if engine.config.threshold is None else engine.config.threshold


def resolve_policy(
    engine: Engine,
    named: str | Policy | None,
    num_inference_steps: int | None = None,
    min_steps: int | None = None,
    max_steps: int | None = None,
    threshold: float | None = None,
    strength: float | None = None,
) -> Policy:
    """The step policy that a name ("dsa", "relative", "fixed", a preset, "fixed:4"), an object or the separate knobs
    mean.

    strength: of video to video, which leaves fewer levels to take (`Schedule`).
    """
    config, presets = engine.config, engine.config.presets
    bounds = 1 if min_steps is None else min_steps, num_inference_steps if max_steps is None else max_steps
    limit = len(Schedule(config.steps, config.shift, 1.0 if strength is None else strength))
    chosen = parse_policy(named) if isinstance(named, str) and ":" in named else named
    if isinstance(chosen, Policy):
        knobs = dict(
            num_inference_steps=num_inference_steps,
            min_steps=min_steps,
            max_steps=max_steps,
            confidence_threshold=threshold,
        )
        given = [name for name, value in knobs.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)}: already said by step_policy={chosen}; give one or the other")
    elif named == "fixed" or (named is None and engine.head is None and threshold is None):
        chosen = Fixed(limit if num_inference_steps is None else num_inference_steps)
    elif named == "relative":
        if threshold is not None:
            raise ValueError(
                f"confidence_threshold={threshold}: step_policy='relative' compares a chunk with the one before and "
                "has none; leave it out, or use 'dsa'"
            )
        chosen = Relative(*bounds)
    elif named in ("dsa", None, *presets):
        own = presets.get(named, default_threshold(engine))
        chosen = Confidence(own if threshold is None else threshold, *bounds)
    else:
        names = ", ".join(("dsa", "fixed", *presets, "relative"))
        raise ValueError(f"step_policy={named!r}: must be one of {names}, a Policy, or e.g. 'fixed:4'")
    chosen.check(limit)
    if chosen.signal == "confidence" and engine.head is None:
        raise ValueError(
            f"step_policy={named!r}: {type(chosen).__name__} needs a confidence head and this model has none; "
            "use Fixed, PerChunk or Change, or train a head for it: "
            "dsa-engine train --recipe head --model FILE --prompts FILE"
        )
    return chosen


def latent_size(engine: Engine, height: int | None, width: int | None) -> tuple[int, int]:
    """Latent height and width. Pixel sizes must be multiples of the decoder's stride times the patch."""
    stride = WAN_STRIDE if engine.decoder is None else engine.decoder.spatial_stride
    unit = stride * engine.dit.config.patch_size[1]
    if height is None or width is None:
        raise ValueError("this model has no default size: give height and width")
    if height % unit or width % unit or height < unit or width < unit:
        raise ValueError(
            f"size {height}x{width}: height and width must be multiples of {unit}; nearest is "
            f"{nearest(height, unit)}x{nearest(width, unit)}"
        )
    return height // stride, width // stride


def latent_frames(engine: Engine, frames: int, given: int = 0) -> int:
    """Latent frames of a clip of `frames` pixel frames: `given` latent frames, and then whole chunks."""
    if engine.decoder is None:
        raise ValueError("this pipeline has no decoder: use generate_latents, or give latents; their shape counts")
    chunk = engine.config.chunk_frames
    whole = isinstance(frames, (int, np.integer)) and not isinstance(frames, bool) and frames >= 1
    near = whole_chunks(engine, frames if whole else 1, given)
    if not whole:
        raise ValueError(f"num_frames={frames!r}: must be a whole number of at least 1; nearest is {near}")
    if near != frames:
        after = f" after the {engine.decoder.frames_of(given, True)} given" if given else ""
        raise ValueError(
            f"num_frames={frames}: must come out as whole chunks of {chunk} latent frames{after}; nearest is {near}"
        )
    return engine.decoder.latent_frames_of(int(frames))


def whole_chunks(engine: Engine, frames: float, given: int = 0) -> int:
    """The pixel frame count nearest to `frames` that is `given` latent frames and at least one whole chunk."""
    first, later = (engine.decoder.frames_of(engine.config.chunk_frames, is_first) for is_first in (True, False))
    first = engine.decoder.frames_of(given, True) + later if given else first
    return first + max(0, round((frames - first) / later)) * later


def whole_chunks_within(engine: Engine, frames: int) -> int:
    """The most pixel frames of at most `frames` that are whole chunks. Raises ValueError below one chunk."""
    first, later = (engine.decoder.frames_of(engine.config.chunk_frames, is_first) for is_first in (True, False))
    if frames < first:
        raise ValueError(f"video of {frames} frames: with strength must be at least one chunk, {first}")
    return first + (frames - first) // later * later


class EncodedVideo(NamedTuple):
    """Frames that were encoded once, to be given as `image` or `video` as often as one likes.

    latents: [B, F, C, h, w]; frames: pixel frames they are of.
    """

    latents: Tensor
    frames: int


class Clip(NamedTuple):
    """A clip to generate: all its latent frames, None if endless; latent size; what was given, as in
    `Engine.rollout`."""

    frames: int | None
    size: tuple[int, int]
    given: Tensor | None = None
    init_latents: Tensor | None = None
    strength: float = 1.0

    @property
    def generated(self) -> int:
        """Latent frames to generate: all but those given."""
        return self.frames - (0 if self.given is None else self.given.shape[1])


def given_pixels(
    engine: Engine, name: str, given: Any, batch: int, size: tuple[int, int], fps: float, max_frames: int | None = None
) -> Tensor:
    """An `image` or a `video`, also as a file's path, as float32 [batch, T, 3, H, W] in [0, 1].

    size: latent; fps: at which a video file's frames are taken; max_frames: the first of a video, None for all.
    """
    if engine.decoder is None:
        raise ValueError(f"{name}: this pipeline has no VAE to encode it with; load it with vae=...")
    height, width = (side * engine.decoder.spatial_stride for side in size)
    if isinstance(given, (str, PathLike)):
        if name == "image":
            given = read_image(given, height, width)
        else:
            given = read_video(given, height, width, fps, max_frames)
    return preprocess.to_video_tensor(name, given, batch, (height, width))


def encode_given(engine: Engine, pixels: Tensor) -> EncodedVideo:
    """Pixels [B, T, 3, H, W] in [0, 1] as latents. Raises ValueError for a number of frames that the VAE has not."""
    engine.decoder.latent_frames_of(pixels.shape[1])
    return EncodedVideo(engine.encode_frames(pixels), pixels.shape[1])


def resolve_clip(
    engine: Engine,
    batch: int,
    size: tuple[int, int],
    num_frames: int | None,
    image: Any,
    video: Any,
    strength: float | None,
    default: int | None,
    fps: float = 1.0,
) -> Clip:
    """The clip to generate.

    Args:
        engine, batch, size: latent height and width.
        num_frames: pixel frames, None for the default.
        image, video: in any form of `media.preprocess`, a file's path, or an `EncodedVideo`.
        strength: of a video that is to be changed; num_frames then takes the first frames of the video.
        default: pixel frames if num_frames is None, None for no end.
        fps: of the model, at which a video file is read.
    """
    if image is not None and video is not None:
        raise ValueError("image and video: give one or the other")
    if strength is not None and video is None:
        raise ValueError(f"strength={strength}: says how much of a video stays; give video too")
    if image is None and video is None:
        count = default if num_frames is None else num_frames
        return Clip(None if count is None else latent_frames(engine, count), size)
    name, source = ("image", image) if video is None else ("video", video)
    if strength is not None:
        Schedule(engine.config.steps, engine.config.shift, strength)
        if num_frames is not None:
            latent_frames(engine, num_frames)
    if isinstance(source, EncodedVideo):
        pixels, count = None, source.frames
    else:
        pixels = given_pixels(engine, name, source, batch, size, fps, None if strength is None else num_frames)
        count = pixels.shape[1]
    if strength is not None:
        if num_frames is not None and num_frames > count:
            near = whole_chunks_within(engine, count)
            raise ValueError(f"num_frames={num_frames} with strength: the video has {count}; nearest is {near}")
        if num_frames is not None and pixels is not None:
            pixels, count = pixels[:, :num_frames], num_frames
        near = whole_chunks(engine, count)
        if near != count:
            raise ValueError(
                f"video of {count} frames: with strength must be whole chunks; nearest is {near}, or with "
                f"num_frames={whole_chunks_within(engine, count)} its first ones"
            )
        latents = (source if pixels is None else encode_given(engine, pixels)).latents
        return Clip(latent_frames(engine, count), size, init_latents=latents, strength=strength)
    given = engine.decoder.latent_frames_of(count)
    if num_frames is None and default is not None:
        num_frames = whole_chunks(engine, default + (count if name == "video" else 0), given)
    total = None if num_frames is None else latent_frames(engine, num_frames, given)
    return Clip(total, size, given=(source if pixels is None else encode_given(engine, pixels)).latents)


def check_latents(engine: Engine, noise: Tensor, batch: int) -> tuple[int, tuple[int, int]]:
    """Check noise [B, F, C, H, W] given for `batch` prompts; returns F and (H, W)."""
    model, chunk = engine.dit.config, engine.config.chunk_frames
    if not isinstance(noise, Tensor):
        raise ValueError(f"latents: must be a tensor [B, F, C, H, W], not {type(noise).__name__}")
    if not noise.is_floating_point():
        raise ValueError(f"latents of dtype {noise.dtype}: must be floating point, e.g. {engine.dit.dtype}")
    shape = list(noise.shape)
    if noise.ndim != 5 or shape[2] != model.in_dim or shape[1] % chunk or 0 in shape:
        near = [shape[0], nearest(shape[1], chunk), model.in_dim, *shape[3:]] if noise.ndim == 5 else None
        raise ValueError(
            f"latents of shape {shape}: must be [B, F, C, H, W] with F a multiple of {chunk} and C = {model.in_dim}"
            + (f"; nearest is {near}" if near else "")
        )
    model.tokens_per_frame(shape[3], shape[4])
    if shape[0] != batch:
        raise ValueError(f"latents of {shape[0]} clips with {batch} prompts: must be as many; nearest is {batch}")
    return shape[1], (shape[3], shape[4])


def check_renoise(engine: Engine, given: Renoise | None, batch: int, frames: int, size: tuple[int, int]) -> None:
    """Check a re-noising tensor; what a callable returns is checked when it does."""
    if given is None or callable(given):
        return
    clip = [batch, frames, engine.dit.config.in_dim, *size]
    legal = [clip, [len(engine.config.steps) - 1, *clip]]
    if not isinstance(given, torch.Tensor) or list(given.shape) not in legal or not given.is_floating_point():
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"renoise {got}: must be a floating-point tensor of shape {legal[0]} or {legal[1]}, or a callable"
        )
