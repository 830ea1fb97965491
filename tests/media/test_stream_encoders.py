"""Chunks as bytes: decoded again by another library, and read by a parser of boxes of the test's own."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsa_engine.media.stream_encoders import FORMATS, encoder


def clip(count, height, width, seed=0):
    """Frames with a patch that moves over a smooth ground."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    for t in range(count):
        ground = np.stack([rows * 200 / height, columns * 200 / width, np.full(rows.shape, 20.0 * (seed % 7))], -1)
        left = (3 * t + seed) % width
        ground[height // 4 : height // 2, left : left + 8] = (230, 40, 40)
        frames[t] = ground.astype(np.uint8)
    return frames


def parse(data):
    """[(kind, body)], by ISO/IEC 14496-12: a 32-bit length that counts itself, four letters, the rest."""
    found, at = [], 0
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8].decode("ascii")
        assert 8 <= length <= len(data) - at, f"box {kind!r} of {length} bytes in {len(data) - at}"
        found.append((kind, data[at + 8 : at + length]))
        at += length
    return found


def inside(data, *path):
    for kind in path:
        data = dict(parse(data))[kind]
    return data


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [frame.pts * stream.time_base for frame in frames]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times, stream.codec_context


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


def chunks_of(frames, lengths):
    edges = np.cumsum([0, *lengths])
    return [frames[a:b] for a, b in zip(edges, edges[1:])]


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    size=st.sampled_from([(64, 64), (48, 80), (34, 66)]),
    fps=st.sampled_from([12.0, 16.0, 24.0, 29.97]),
    seed=st.integers(0, 20),
)
def test_m4s_payloads_make_one_clip_of_all_frames(lengths, size, fps, seed):
    frames = clip(sum(lengths), *size, seed)
    make = encoder("m4s", fps, size[1], size[0])
    payloads = [make.encode(chunk) for chunk in chunks_of(frames, lengths)]
    shown, times, context = decoded(b"".join(p.data for p in payloads))
    assert shown.shape == frames.shape
    assert psnr(shown, frames) > 25 and min(psnr(a, b) for a, b in zip(shown, frames)) > 22
    period = 1 / Fraction(fps).limit_denominator(1001)
    assert all(abs(time - i * period) < Fraction(1, 1000) for i, time in enumerate(times))
    assert context.pix_fmt == "yuv420p" and context.colorspace == 1 and context.color_range == 1
    for i, payload in enumerate(payloads):
        kinds = [kind for kind, _ in parse(payload.data)]
        assert kinds == (["ftyp", "moov"] if i == 0 else []) + ["moof", "mdat"]
        assert payload.lengths is None


def test_each_m4s_fragment_holds_its_chunk_whole():
    """Nothing waits for the next chunk: as many samples as frames, from where the one before ended."""
    lengths, at = [3, 1, 5, 3], 0
    make = encoder("m4s", 12.0, 64, 64)
    scale = None
    for number, chunk in enumerate(chunks_of(clip(12, 64, 64), lengths), 1):
        data = make.encode(chunk).data
        if scale is None:
            scale = int.from_bytes(inside(data, "moov", "trak", "mdia", "mdhd")[12:16], "big")
        moof = inside(data, "moof")
        assert int.from_bytes(dict(parse(moof))["mfhd"][4:8], "big") == number
        fragment = dict(parse(dict(parse(moof))["traf"]))
        assert int.from_bytes(fragment["trun"][4:8], "big") == len(chunk)
        assert int.from_bytes(fragment["tfdt"][4:12], "big") == at * scale // 12
        at += len(chunk)


def test_m4s_says_its_codec_in_the_header():
    first = encoder("m4s", 12.0, 64, 64).encode(clip(1, 64, 64)).data
    entry = inside(first, "moov", "trak", "mdia", "minf", "stbl", "stsd")[8:]
    assert entry[4:8] == b"avc1"
    avcc = dict(parse(entry[86:]))["avcC"]
    assert avcc[0] == 1 and avcc[1] in (66, 77, 100)  # version; baseline, main, high
    assert int.from_bytes(entry[32:34], "big") == 64 == int.from_bytes(entry[34:36], "big")


@pytest.mark.parametrize("color", [(230, 40, 40), (40, 200, 60), (40, 70, 255)])
def test_m4s_colors_are_those_of_bt709(color):
    """ITU-R BT.709, limited range: Y = 16 + 219 (.2126 R + .7152 G + .0722 B) and so on, R, G, B in [0, 1]."""
    frames = np.broadcast_to(np.uint8(color), (2, 64, 64, 3)).copy()
    with av.open(io.BytesIO(encoder("m4s", 12.0, 64, 64).encode(frames).data)) as container:
        planes = next(container.decode(video=0)).to_ndarray()  # [96, 64]: Y over U over V
    red, green, blue = (value / 255 for value in color)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
    for plane, value in zip((planes[:64], planes[64:80], planes[80:]), expected):
        assert abs(plane.astype(float) - value).max() < 3


def test_m4s_can_be_entered_every_two_seconds_at_a_chunk():
    make = encoder("m4s", 12.0, 64, 64)
    data = b"".join(make.encode(chunk).data for chunk in chunks_of(clip(75, 64, 64), [3] * 25))
    with av.open(io.BytesIO(data)) as container:
        keys = [i for i, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe]
    assert {0, 24, 48, 72} <= set(keys)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_jpeg_images_lie_one_after_another(lengths):
    frames = clip(sum(lengths), 40, 72)
    make = encoder("jpeg", 12.0, 72, 40)
    for chunk in chunks_of(frames, lengths):
        data, sizes = make.encode(chunk)
        assert len(sizes) == len(chunk) and sum(sizes) == len(data)
        for frame, at, size in zip(chunk, np.cumsum([0, *sizes]), sizes):
            shown = np.asarray(Image.open(io.BytesIO(data[at : at + size])))
            assert shown.shape == frame.shape and psnr(shown, frame) > 30


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20))
def test_rgb24_is_exact(count, height, width):
    frames = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    data, sizes = encoder("rgb24", 12.0, width, height).encode(frames)
    assert np.array_equal(np.frombuffer(data, np.uint8).reshape(frames.shape), frames)
    assert sizes == [height * width * 3] * count


@pytest.mark.parametrize("format", FORMATS)
def test_other_frames_are_refused(format):
    make = encoder(format, 12.0, 64, 48)
    good = clip(1, 48, 64)
    for wrong in (clip(1, 64, 48), good.astype(np.float32), good[0], good[:0], None):
        with pytest.raises(ValueError, match="frames"):
            make.encode(wrong)
    assert make.encode(good).data  # and it goes on


def test_impossible_encoders_are_refused():
    with pytest.raises(ValueError, match="must be one of m4s, jpeg, rgb24"):
        encoder("gif", 12.0, 64, 64)
    with pytest.raises(ValueError, match="even sides"):
        encoder("m4s", 12.0, 63, 64)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            encoder("m4s", fps, 64, 64)
