"""What a server tells clients about its pipeline."""

from __future__ import annotations

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.types import ModelCard
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.shapes.world import GRAMMAR


def model_card(pipe: Pipeline) -> ModelCard:
    """Raises ValueError for a pipeline without a decoder, a text encoder or a size."""
    engine = pipe.engine
    parts = {"VAE": engine.decoder, "text encoder": engine.text, "size": pipe.height}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise ValueError(
            f"model {pipe.name!r} has no {', no '.join(missing)}: it cannot be served; load it with vae=, text="
        )
    frames_of, chunk = engine.decoder.frames_of, pipe.config.chunk_frames
    return ModelCard(
        name=pipe.name,
        height=pipe.height,
        width=pipe.width,
        fps=pipe.fps,
        frames=pipe.frames,
        steps=pipe.max_steps,
        threshold=engine.config.threshold,
        presets=dict(engine.config.presets),
        prompts=GRAMMAR if isinstance(engine.text, SlotTextEncoder) else None,
        chunks=(frames_of(chunk, True), frames_of(chunk, False)),
    )
