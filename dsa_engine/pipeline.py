"""`Pipeline`: load a model, turn prompts into video. The arguments' names are diffusers' where diffusers has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_engine import pipeline_inputs
from dsa_engine.engine.rollout import Rollout
from dsa_engine.engine.session import Chunk, Session
from dsa_engine.loaded_model import LoadedModel
from dsa_engine.pipeline_inputs import EncodedVideo
from dsa_engine.pipeline_outputs import VideoOutput, convert_latents
from dsa_engine.sampling.denoise import Denoised, Step
from dsa_engine.sampling.noise import Renoise, check_seed
from dsa_engine.sampling.policy import Fixed, Policy
from dsa_engine.sampling.schedule import TIMESTEPS


class Pipeline(LoadedModel):
    """A loaded model. Make one with `Pipeline.from_pretrained`."""

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
        """Generate whole clips, one per prompt, as one batch; rows that stop early leave the batch.

        Args:
            prompt: one or several.
            negative_prompt: must be None, and guidance_scale 1.0: a distilled model has its guidance built in.
            height, width: pixels; default the model's own.
            num_frames: pixel frames, those of image or video included.
            num_inference_steps: the most steps a chunk may take.
            generator: gives its initial seed.
            seed: of the first clip; later clips count up.
            latents: noise [B, F, C, H, W] instead of drawing it.
            prompt_embeds: [B, L, text_dim] instead of a prompt.
            image: that the clip begins with: a file's path, or any form of `media.preprocess.to_video_tensor`.
            video: frames that the clip begins with and continues, or with strength the video to change, of which
                num_frames takes the first; of a file the frames at the model's rate (`media.video.read_video`).
            output_type: "np" float [B, T, H, W, C] in [0, 1], "pt" [B, T, C, H, W], "pil" lists of images, "latent"
                [B, F, C, h, w].
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": x0}) after every step.
            strength: in (0, 1]: video is noised to the last round(strength * steps) levels and denoised again; the
                lower, the more of it stays.
            renoise: as in `generate_latents`.
            step_policy: "dsa", "relative", "fixed", one of the model's presets (`config.presets`, such as "fast"), a
                `Policy`, or its command-line form such as "fixed:4"; default "dsa" if the model has a confidence head.
            min_steps, max_steps: of "dsa" and "relative".
            confidence_threshold: of "dsa".
            commit: "clean" or "exit_step" (RolloutConfig).

        Returns:
            The clips; a given image or video is in them as the codec reconstructs it.
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
                self.engine, len(embeds), size, num_frames, image, video, strength, self.frames, self.fps
            )
        elif any(x is not None for x in (height, width, num_frames, image, video)):
            raise ValueError("height, width, num_frames, image and video: with latents these count alone")
        else:
            clip = pipeline_inputs.Clip(*pipeline_inputs.check_latents(self.engine, latents, len(embeds)))
        pipeline_inputs.check_renoise(self.engine, renoise, len(embeds), clip.generated, clip.size)
        start = time.perf_counter()
        rollout = self.engine.rollout(
            embeds,
            height=clip.size[0],
            width=clip.size[1],
            frames=clip.frames,
            policy=policy,
            seeds=seeds,
            config=pipeline_inputs.override_config(self.config, commit=commit),
            initial_noise=latents,
            renoise=renoise,
            given=clip.given,
            init_latents=clip.init_latents,
            strength=clip.strength,
        )
        chunks, first_chunk = self._roll(rollout, clip.generated // self.config.chunk_frames, callback_on_step_end)
        result = torch.cat([*([] if clip.given is None else [clip.given]), *(c.latents for c in chunks)], dim=1)
        confidence = None
        if chunks[0].confidence is not None:
            confidence = torch.stack([c.confidence for c in chunks], dim=1).tolist()
        return VideoOutput(
            frames=convert_latents(self.engine, result, output_type),
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
                rollout.accept(chunks[-1].latents, chunks[-1].confidence)
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
        """A rollout with all randomness given: clean latents [B, F, C, H, W] for the noise `latents`.

        Args:
            latents: noise [B, F, C, H, W].
            prompt_embeds: [B, L, text_dim], zero-padded to text_len.
            renoise: the noise that chunks are re-noised with: a tensor [B, F, C, H, W] (the same after every step) or
                [S - 1, B, F, C, H, W] (one per step but the last), or renoise(chunk, step) ->
                [B, chunk_frames, C, H, W], both from 0, step being the one just taken. None draws it from `seed`.
            step_policy, seed, commit: as in a call.
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
        """Open a live stream.

        Args:
            prompt: the first one.
            prompt_embeds: [1, L, text_dim] instead.
            height, width: pixels; default the model's own.
            num_frames: pixel frames until it ends; None: endless.
            seed: of its noise.
            step_policy, num_inference_steps, min_steps, max_steps, confidence_threshold: as in a call.
            image, video, strength: as in a call; the stream yields only the frames after what it began with, and ends
                with a video that it changes.
            window, sink: latent frames of this session's cache.
            rope, commit: of RolloutConfig.
        """
        embeds = pipeline_inputs.encode_prompt(self.engine, prompt, prompt_embeds)
        if len(embeds) != 1:
            raise ValueError(f"{len(embeds)} prompts: a session is one stream; open one session per prompt")
        config = pipeline_inputs.override_config(self.config, window=window, sink=sink, rope=rope, commit=commit)
        policy = pipeline_inputs.resolve_policy(
            self.engine, step_policy, num_inference_steps, min_steps, max_steps, confidence_threshold, strength
        )
        clip = self._session_clip(height, width, num_frames, image, video, strength)
        return self.engine.session(
            prompt,
            embeds,
            height=clip.size[0],
            width=clip.size[1],
            frames=clip.frames,
            fps=self.fps,
            policy=policy,
            seed=check_seed(seed),
            config=config,
            given=clip.given,
            init_latents=clip.init_latents,
            strength=clip.strength,
        )

    def encode_video(self, video: Any, height: int | None = None, width: int | None = None) -> EncodedVideo:
        """A video, or a list of one image, encoded once: give it as `image` or `video` to as many sessions as you like.

        Args:
            video: as in a call.
            height, width: pixels; default the model's own.
        """
        size = self._size(height, width)
        pixels = pipeline_inputs.given_pixels(self.engine, "video", video, 1, size, self.fps)
        return pipeline_inputs.encode_given(self.engine, pixels)

    def check_session(
        self,
        prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int = 0,
        image: Any = None,
    ) -> None:
        """Raises the ValueError that `session` would raise for these arguments, without opening one or encoding the
        image."""
        check_seed(seed)
        self.engine.encode([prompt])
        if image is not None:
            size = self._size(height, width)
            pixels = pipeline_inputs.given_pixels(self.engine, "image", image, 1, size, self.fps)
            image = EncodedVideo(pixels, frames=1)  # only its length is looked at
        self._session_clip(height, width, num_frames, image)

    def _session_clip(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        image: Any = None,
        video: Any = None,
        strength: float | None = None,
    ) -> pipeline_inputs.Clip:
        size = self._size(height, width)
        return pipeline_inputs.resolve_clip(self.engine, 1, size, num_frames, image, video, strength, None, self.fps)

    def stream(self, prompt: str, num_frames: int | None = None, **options) -> Iterator[Chunk]:
        """`session(...).chunks()`: each chunk is decoded while the next one is denoised. Leaving the loop early frees
        everything.
        """
        return self.session(prompt, num_frames=num_frames, **options).chunks()

    def warmup(self, progress: Callable[[int, int], None] | None = None, graphs: bool = True) -> float:
        """Generate one chunk and discard it, so that the first real one is not slow; returns the seconds it took.

        Args:
            progress: called with (done, total) after each CUDA graph.
            graphs: on a CUDA device, also capture the graphs of sessions of the default size and window (and of the
                default length if the window is the whole clip). For one clip that takes longer than it saves.
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
                convert_latents(self.engine, latents, "pt")
        return time.perf_counter() - start
