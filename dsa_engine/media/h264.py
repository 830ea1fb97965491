"""The H.264 stream of files and live streams alike: libx264, yuv420p, BT.709. Frames are uint8 [T, H, W, 3]."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import OutputContainer
    from av.video.stream import VideoStream

BT709 = 1  # in FFmpeg's enumerations of primaries, transfer and matrix alike
LIMITED_RANGE = 1


def add_stream(
    container: OutputContainer,
    fps: Fraction,
    height: int,
    width: int,
    options: dict[str, str],
    threads: int | None = None,
) -> VideoStream:
    """A new stream of a container. options: of libx264; threads: of the encoder, None for its own choice.

    x264's AVX-512 code (core 165) reads uninitialized memory when it chooses quantizers where an image's macroblocks do
    not fill a vector, so a clip's bytes would change from run to run: AVX2 is used instead. The CPU is asked, as x264
    asks it; torch may be limited to less (ATEN_CPU_CAPABILITY).
    """
    import torch

    no_avx512 = {"x264-params": "asm=avx2"} if torch.cpu._is_avx512_supported() else {}
    stream = container.add_stream("libx264", rate=fps, options=options | no_avx512)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    if threads is not None:
        context.thread_count = threads
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    return stream


def to_yuv(frame: np.ndarray) -> VideoFrame:
    """uint8 [H, W, 3] as the encoder takes it."""
    import av

    rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def frame_rate(fps: float) -> Fraction:
    """Frames per second as H.264 has them. Raises ValueError outside (0, 1000]."""
    if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction)) or not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r}: must be a number above 0 and at most 1000, e.g. 16")
    return Fraction(fps).limit_denominator(1001)


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] as they are. Raises ValueError for anything else."""
    kind = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames {kind}: must be a numpy array uint8 [T, H, W, 3]")
    if 0 in frames.shape:
        raise ValueError(f"frames {kind}: must hold at least one frame of at least one pixel")
    return frames
