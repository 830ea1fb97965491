"""What a served stream is compared with: the frames of a session that has the pipeline for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsa_engine import Pipeline

PROMPTS = ("a red circle jumps", "a blue square moves sideways on navy", "a green cross rests")
FRAMES = 12  # four chunks


def session_chunks(
    pipe: Pipeline, prompt: str = PROMPTS[0], changes: Mapping[int, Sequence[str]] | None = None, **options
) -> list[np.ndarray]:
    """Frames by chunk. changes: chunk index -> prompts that the session is told, in order, before that chunk."""
    chunks = []
    with pipe.session(prompt, **{"num_frames": FRAMES, "step_policy": "fixed:2"} | options) as session:
        while not session.exhausted:
            for other in (changes or {}).get(session.index, ()):
                session.update(other)
            chunks.append(session.next_chunk().frames)
    return chunks


def session_frames(pipe: Pipeline, *args, **options) -> np.ndarray:
    """All frames of `session_chunks`, uint8 [T, H, W, 3]."""
    return np.concatenate(session_chunks(pipe, *args, **options))
