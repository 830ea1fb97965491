"""A video file, read for a model: upright, at the model's rate and size, one frame at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import ceil
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from dsa_engine.media import geometry
from dsa_engine.media.geometry import UPRIGHT, Orientation

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

JITTER_S = Fraction(1, 1000)  # by which times may be rounded: Matroska's ticks
DECODER_THREADS = 2  # some decoders hold a frame for each


def read_video(path: str | PathLike, height: int, width: int, fps: float, max_frames: int | None = None) -> np.ndarray:
    """The frames of a video at a model's rate and size, uint8 [T, height, width, 3].

    Frame k is the one that is on screen at k / fps seconds, whatever the file's own rate, and whether that is constant;
    T = ceil(duration * fps). The display matrix and the pixel aspect are honoured; each frame is cut in the middle to
    the target's aspect and scaled (`geometry.cover`) before the next one is decoded.

    Args:
        path: of any file that FFmpeg reads.
        height, width: of the frames, in pixels.
        fps: frames per second, above 0.
        max_frames: nothing after so many is decoded; None for all.

    Raises:
        ValueError: with the file's name: it is no video, has no frames, or is cut off or damaged.
        OSError: it cannot be opened.
    """
    frames: list[np.ndarray] = []
    with open_video(path) as (container, stream):
        aspect = stream.sample_aspect_ratio or Fraction(1)
        scaled = None  # of the frame that is on screen
        shown: VideoFrame | None = None
        for frame, time in _timed(container, stream):
            while shown is not None and len(frames) != max_frames and _slot(len(frames), fps) < time:
                scaled = _cover(shown, height, width, aspect) if scaled is None else scaled
                frames.append(scaled)
            if len(frames) == max_frames:
                break
            shown, scaled = frame, None
    if not frames:
        raise ValueError(f"{path}: its video has no frames")
    return np.stack(frames)


def read_frames(path: str | PathLike) -> tuple[np.ndarray, float]:
    """All frames as they are stored, uint8 [T, H, W, 3], and frames per second. Errors as `read_video`'s."""
    with open_video(path) as (container, stream):
        frames = [frame.to_ndarray(format="rgb24") for frame in _decoded(container, stream)]
        rate = stream.average_rate or stream.guessed_rate
    if not frames:
        raise ValueError(f"{path}: its video has no frames")
    if not rate:
        raise ValueError(f"{path}: tells no frame rate")
    return np.stack(frames), float(rate)


def count_frames(path: str | PathLike) -> int:
    """Frames that a video file holds, without decoding them. Errors as `read_video`'s."""
    with open_video(path) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


@contextmanager
def open_video(path: str | PathLike) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video that is not a cover picture; FFmpeg's errors come out with the file's name."""
    import av

    cover = av.stream.Disposition.attached_pic
    try:
        with av.open(str(path)) as container:
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None:
                raise ValueError(f"{path}: holds no video")
            if stream.codec_context is None:
                raise ValueError(f"{path}: its video has a codec that FFmpeg does not know")
            stream.codec_context.thread_count = DECODER_THREADS
            yield container, stream
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # no such file, a folder, no permission
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ValueError(
            f"{path}: is no video that can be read, it is cut off or damaged ({error.strerror})"
        ) from error


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError(f"{container.name}: is cut off or damaged")
        yield from packet.decode()


def _timed(container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame | None, Fraction]]:
    """(frame, seconds from the first one), and at last (None, the end). Times never go back: where a file's do, or
    where it has none, a frame comes one frame of the file's rate after the one before."""
    rate = stream.average_rate or stream.guessed_rate
    usual = 1 / rate if rate else Fraction(0)
    start: Fraction | None = None
    time, length = Fraction(0), usual
    for frame in _decoded(container, stream):
        unit = frame.time_base or stream.time_base
        stamp = None if frame.pts is None or unit is None else frame.pts * unit
        if start is None:
            start = stamp or Fraction(0)
        else:
            after = time + (length or usual)
            now = after if stamp is None else stamp - start
            if now < time:
                start, now = stamp - after, after
            time, before = now, time
            usual = usual or time - before
        length = frame.duration * unit if frame.duration and unit is not None else usual
        yield frame, time
    if start is not None:
        yield None, time + max(length or usual, 2 * JITTER_S)  # a single picture is on screen for a moment


def _slot(index: int, fps: float) -> Fraction:
    """Seconds at which frame `index` of the model is to be on screen, a little later for times that were rounded."""
    return index / Fraction(fps).limit_denominator(1001) + JITTER_S


def _cover(frame: VideoFrame, height: int, width: int, aspect: Fraction) -> np.ndarray:
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    orientation = UPRIGHT if matrix is None else Orientation.from_display_matrix(bytes(matrix))
    h, w = (width, height) if orientation.transpose else (height, width)
    left, top, right, bottom = geometry.cover_box((frame.height, frame.width), (h, w), aspect)
    # a frame more than twice as fine as what is asked for is reduced to that before it becomes RGB
    fine_h, fine_w = max(1.0, (bottom - top) / (2 * h)), max(1.0, (right - left) / (2 * w))
    size = {"width": ceil(frame.width / fine_w), "height": ceil(frame.height / fine_h)}
    picture = frame.reformat(**size, format="rgb24", interpolation="AREA").to_image()
    aspect *= Fraction(frame.width * picture.height, frame.height * picture.width)  # of the reduced pixels
    return geometry.cover(picture, height, width, aspect, orientation)
