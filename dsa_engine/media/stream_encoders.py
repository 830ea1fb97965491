"""A live stream's frames as bytes, a payload for each chunk: fragmented MP4, JPEG images, or raw."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from dsa_engine.checks import check_choice
from dsa_engine.media import h264

CRF = 18  # x264's quality: what a viewer cannot tell from the original
QUALITY = 90  # of JPEG
KEYFRAME_SECONDS = 2.0  # a player that seeks goes back to a keyframe
INIT = (b"ftyp", b"moov")  # boxes that say what the fragments hold


class Payload(NamedTuple):
    """lengths: bytes of each frame's part of `data`, None where frames have no parts of their own."""

    data: bytes
    lengths: list[int] | None = None


class Encoder(ABC):
    """One stream's; not for several threads at once. Frames must be uint8 [T, height, width, 3]."""

    content_type: str

    def __init__(self, fps: float, width: int, height: int):
        self.fps, self.width, self.height = h264.frame_rate(fps), width, height

    def encode(self, frames: np.ndarray) -> Payload:
        """The next chunk, whole. Raises ValueError for other arrays or another size."""
        if h264.check_frames(frames).shape[1:3] != (self.height, self.width):
            height, width = frames.shape[1:3]
            raise ValueError(f"frames of {height}x{width}: this stream's are {self.height}x{self.width}")
        return self._encode(frames)

    @abstractmethod
    def _encode(self, frames: np.ndarray) -> Payload: ...


class Mp4Encoder(Encoder):
    """H.264 (yuv420p, BT.709) in fragments: all payloads one after another are an MP4 file, and each can be given to a
    browser's SourceBuffer as it comes. The first begins with the header (ftyp, moov); each is one fragment (moof,
    mdat) of all the chunk's frames, nothing of it held back: no B-frames, no lookahead, one thread.

    The encoder lives as long as the stream. The muxer, which would keep a fragment open until the next one begins, is
    made anew for each chunk, with the stream's position.
    """

    content_type = "video/mp4"

    def __init__(self, fps: float, width: int, height: int):
        import av

        super().__init__(fps, width, height)
        if height % 2 or width % 2:
            raise ValueError(f"frames of {height}x{width}: m4s needs even sides; use the format jpeg or rgb24")
        # a container that gets no packets: it owns the encoder, and its stream is the pattern of the chunks' streams
        self._owner = av.open(io.BytesIO(), "w", format="mp4")
        options = {"preset": "veryfast", "tune": "zerolatency", "crf": str(CRF), "forced-idr": "1"}
        self._stream = h264.add_stream(self._owner, self.fps, height, width, options, threads=1)
        self._stream.codec_context.time_base = 1 / self.fps
        self._owner.start_encoding()  # opens the encoder, whose header the pattern then has
        self._frames, self._chunks = 0, 0
        self._next_key = 0

    def _encode(self, frames: np.ndarray) -> Payload:
        packets = [packet for array in frames for packet in self._packets(array)]
        if len(packets) != len(frames):
            raise RuntimeError(f"the H.264 encoder gave {len(packets)} packets for {len(frames)} frames")
        data = self._fragment(packets)
        self._chunks += 1
        return Payload(data)

    def _packets(self, array: np.ndarray) -> list:
        import av

        frame = h264.to_yuv(array)
        frame.pts, frame.time_base = self._frames, 1 / self.fps
        if self._frames >= self._next_key:
            frame.pict_type = av.video.frame.PictureType.I
            self._next_key = self._frames + max(1, round(KEYFRAME_SECONDS * self.fps))
        self._frames += 1
        return self._stream.codec_context.encode(frame)

    def _fragment(self, packets: list) -> bytes:
        import av

        file = io.BytesIO()
        flags = "+frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer"
        options = {"movflags": flags, "fragment_index": str(self._chunks + 1), "avoid_negative_ts": "disabled"}
        with av.open(file, "w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(self._stream)
            stream.time_base = 1 / self.fps
            for packet in packets:
                packet.stream, packet.time_base, packet.duration = stream, 1 / self.fps, 1
                container.mux(packet)
        data = file.getvalue()
        return data if self._chunks == 0 else b"".join(box for kind, box in boxes(data) if kind not in INIT)


class JpegEncoder(Encoder):
    """Each frame a JPEG image of its own, one after another."""

    content_type = "image/jpeg"

    def _encode(self, frames: np.ndarray) -> Payload:
        from PIL import Image

        images = []
        for array in frames:
            file = io.BytesIO()
            Image.fromarray(array).save(file, "JPEG", quality=QUALITY, subsampling=0)
            images.append(file.getvalue())
        return Payload(b"".join(images), [len(image) for image in images])


class RawEncoder(Encoder):
    """The frames as they are: red, green, blue, a byte each, rows from the top."""

    content_type = "application/x-raw-rgb"

    def _encode(self, frames: np.ndarray) -> Payload:
        return Payload(frames.tobytes(), [frames[0].nbytes] * len(frames))


FORMATS: dict[str, type[Encoder]] = {"m4s": Mp4Encoder, "jpeg": JpegEncoder, "rgb24": RawEncoder}


def encoder(format: str, fps: float, width: int, height: int) -> Encoder:
    """A new stream's encoder. Raises ValueError for an unknown format, or a size that it cannot have."""
    check_choice("format", format, FORMATS)
    return FORMATS[format](fps, width, height)


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, whole box) of each box at the top of ISO base media data, as the muxer writes them: 32-bit lengths."""
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + length]))
        at += length
    return found
