"""MP4 files, read and written chunk by chunk. Frames are uint8 [T, H, W, 3]."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dsa_engine.files import atomic_write, check_output_path
from dsa_engine.media import h264
from dsa_engine.media.video import read_frames

CRF = 16  # x264's quality: 18 passes for transparent, and flat synthetic colours show errors sooner than film


class Mp4Writer:
    """H.264 (yuv420p, BT.709) in an MP4 file, chunk by chunk:

        with Mp4Writer("clip.mp4", fps=12, scale=4) as video:
            video.write(frames)

    fps: frames per second; scale: each pixel becomes scale x scale pixels; threads: of the encoder, None for its own
    choice (the file's bytes depend on their number, and on nothing else). The file appears when the block ends well.
    Raises ValueError for a path that does not end in .mp4, fps or scale that are not above 0, or a clip of no frames.
    """

    def __init__(self, path: str | Path, fps: float, scale: int = 1, threads: int | None = None):
        self.path = check_output_path(path, ".mp4")
        if isinstance(scale, bool) or not isinstance(scale, (int, np.integer)) or scale < 1:
            raise ValueError(f"scale={scale!r}: must be a whole number of at least 1, e.g. 4")
        self.fps, self.scale, self.threads = h264.frame_rate(fps), int(scale), threads
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Mp4Writer:
        import av

        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self.path))
            # faststart: the index comes first, so a browser plays the file while it is still loading
            options = {"movflags": "+faststart"}
            self._container = stack.enter_context(av.open(str(temporary), "w", format="mp4", options=options))
            stack.push(self._finish)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._exits.__exit__(*error)
        self._container = self._stream = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [T, H, W, 3]. Raises ValueError for other arrays, another size than before, or one that
        is odd after scaling; RuntimeError outside the `with` block."""
        if self._container is None:
            raise RuntimeError(f"{self.path}: not open; write inside `with Mp4Writer(...) as video:`")
        frames = h264.check_frames(frames)
        frames = frames.repeat(self.scale, axis=1).repeat(self.scale, axis=2)
        size = frames.shape[1:3]
        if self._stream is None:
            self._stream = self._open(*size)
        if size != (self._stream.height, self._stream.width):
            before = f"{self._stream.height}x{self._stream.width}"
            raise ValueError(f"frames of {size[0]}x{size[1]} (scaled) after {before}: a clip must have one size")
        for array in frames:
            self._container.mux(self._stream.encode(h264.to_yuv(array)))

    def _open(self, height: int, width: int):
        if height % 2 or width % 2:
            raise ValueError(
                f"frames of {height}x{width} after scaling by {self.scale}: H.264 needs even sides; "
                f"the nearest legal scale is {self.scale + 1}"
            )
        options = {"crf": str(CRF)}
        return h264.add_stream(self._container, self.fps, height, width, options, self.threads)

    def _finish(self, kind, *_) -> None:
        if kind is None:
            if self._stream is None:
                raise ValueError(f"{self.path}: no frames were written; a clip needs at least one")
            self._container.mux(self._stream.encode())


def write_mp4(path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, scale: int = 1) -> None:
    """Write a clip: frames uint8 [T, H, W, 3], or an iterable of such chunks. Errors as `Mp4Writer`'s."""
    with Mp4Writer(path, fps, scale) as video:
        for chunk in [frames] if isinstance(frames, np.ndarray) else frames:
            video.write(chunk)


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """(frames uint8 [T, H, W, 3] as they are stored, frames per second); for a model's rate and size `read_video`.

    Raises FileNotFoundError, or ValueError for what is no video, with the file's name.
    """
    return read_frames(path)
