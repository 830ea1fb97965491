"""Small video files with the properties that phones and recorders give them, written by PyAV alone."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MS = Fraction(1, 1000)


def write_video(path, frames, rate=12, times_ms=None, pixel_aspect=None, matrix=None, options=None) -> Path:
    """frames: uint8 [H, W, 3] each; times_ms: when each is shown, instead of a constant rate; matrix: (a, b, c, d) of
    the display matrix (MP4); options: of x264."""
    path = Path(path)
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", "bf": "0"} | (options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times_ms is not None:
            stream.codec_context.time_base = MS
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if matrix is not None:
        set_display_matrix(path, *matrix)
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """In the track header: x = a p + c q, y = b p + d q (ISO/IEC 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # version 0
    one = 1 << 16
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def greys(count: int, height=32, width=32) -> list[np.ndarray]:
    """Frames that say their number: `numbers` reads it back."""
    return [np.full((height, width, 3), 20 + 4 * i, np.uint8) for i in range(count)]


def numbers(frames: np.ndarray) -> list[int]:
    return np.round((frames.mean((1, 2, 3)) - 20) / 4).astype(int).tolist()


def quadrants(height: int, width: int) -> np.ndarray:
    """Another colour in each quarter, so that no two of the eight orientations look alike."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, width // 2 :] = (220, 30, 30)
    pixels[height // 2 :, : width // 2] = (30, 220, 30)
    pixels[height // 2 :, width // 2 :] = (200, 200, 200)
    return pixels
