"""Helpers of the command line's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

from dsa_engine.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
PROMPT, OTHER, THIRD = "a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_rgb().to_ndarray() for f in container.decode(stream)]), float(stream.average_rate)


def by_hand(model: Path, switches: dict[int, str] | None = None, recache: bool = True, **options):
    """What the command should have made, through the session API alone."""
    chunks = []
    with Pipeline.from_pretrained(model) as pipe, pipe.session(PROMPT, **options) as session:
        while not session.exhausted:
            if session.index in (switches or {}):
                session.update(switches[session.index], recache=recache)
            chunks.append(session.next_chunk())
    return chunks


def min_confidences(chunks) -> list[float]:
    return [min(c.confidence) for c in chunks]


def program(folder: Path, *args: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dsa_engine", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)
