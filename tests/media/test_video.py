"""Videos as models get them: frames by their time, upright, with square pixels, and errors that name the file."""

from __future__ import annotations

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from dsa_engine.media import geometry
from dsa_engine.media.mp4 import read_mp4
from dsa_engine.media.video import count_frames, read_video
from tests.support.media.files import greys, numbers, quadrants, write_video

RATES = [30, 25, 24, 12, 8]
NTSC = [Fraction(24000, 1001), Fraction(30000, 1001)]


# Matroska rounds times to milliseconds
@pytest.mark.parametrize("rate, suffix", [*((r, "mp4") for r in RATES + NTSC), *((r, "mkv") for r in RATES)])
def test_frame_k_is_the_one_on_screen_at_k_over_fps(tmp_path, rate, suffix):
    got = numbers(read_video(write_video(tmp_path / f"a.{suffix}", greys(48), rate), 32, 32, 12))
    rate, ms = Fraction(rate), Fraction(1, 1000)  # times that are a millisecond apart are the same
    assert got == [math.floor((Fraction(k, 12) + ms) * rate) for k in range(math.ceil((48 / rate - ms) * 12))]
    assert numbers(read_mp4(tmp_path / f"a.{suffix}")[0]) == list(range(48))  # all of them, for those who want them


@pytest.mark.parametrize("start", [0, 5000])
def test_a_variable_rate(tmp_path, start):
    """A still for a second, a burst, a still."""
    times = [0, 1000, 1020, 1040, 1060, 2000, 2100]
    path = write_video(tmp_path / "vfr.mkv", greys(7), times_ms=[start + t for t in times])
    shown = [max(i for i, t in enumerate(times) if t <= 100 * k) for k in range(21)]
    assert numbers(read_video(path, 32, 32, 10))[:21] == shown == [0] * 10 + [1] + [4] * 9 + [5]


# (a, b, c, d) of the display matrix -> what it does, by NumPy's own names
MATRICES = {
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),  # a phone held upright
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x.swapaxes(0, 1), 2),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path, matrix):
    stored = quadrants(32, 64)
    path = write_video(tmp_path / "phone.mp4", [stored], matrix=matrix)
    expected = MATRICES[matrix](stored)
    got = read_video(path, *expected.shape[:2], 12)
    assert got.shape == (1, *expected.shape)
    assert np.abs(got[0].astype(int) - expected).mean() < 4


def test_a_turned_video_is_cut_for_the_way_it_is_shown(tmp_path):
    """64 wide and 32 high, shown 32 wide and 64 high: a square takes the middle of the height."""
    stored = quadrants(32, 64)
    path = write_video(tmp_path / "phone.mp4", [stored], matrix=(0, 1, -1, 0))
    got = read_video(path, 32, 32, 12)[0]
    assert np.abs(got.astype(int) - np.rot90(stored, -1)[16:48]).mean() < 4


def test_pixels_that_are_not_square(tmp_path):
    """32x32 stored with pixels twice as wide as high is a picture of 64x32."""
    ramp = np.repeat(np.linspace(0, 248, 32, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    path = write_video(tmp_path / "anamorphic.mp4", [ramp], pixel_aspect=Fraction(2))
    whole = read_video(path, 32, 64, 12)[0]
    assert np.abs(whole.astype(int) - np.asarray(Image.fromarray(ramp).resize((64, 32)))).max() < 6
    square = read_video(path, 32, 32, 12)[0]  # the middle half of the columns
    assert np.abs(square.astype(int) - np.asarray(Image.fromarray(ramp[:, 8:24]).resize((32, 32)))).mean() < 3


@pytest.mark.parametrize("size", [(1080, 1920), (1, 100_000), (7, 5), (64, 64)])
@pytest.mark.parametrize("target", [(480, 832), (64, 64), (832, 480)])
@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(16, 11), Fraction(1, 2)])
def test_the_box_is_the_largest_of_the_targets_aspect(size, target, aspect):
    (h, w), (height, width) = size, target
    left, top, right, bottom = geometry.cover_box(size, target, aspect)
    assert (right - left) * float(aspect) / (bottom - top) == pytest.approx(width / height)
    assert left == pytest.approx(w - right) and top == pytest.approx(h - bottom)  # in the middle
    assert min(left, top) == 0 and 0 <= left < right <= w and 0 <= top < bottom <= h  # as large as can be


def test_only_what_is_asked_for_is_decoded(tmp_path):
    """A file that breaks off can be read up to there; the whole of it is refused by name."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "whole.mp4", noise, 12)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read_video(path, 64, 64, 12)) == 48 == count_frames(path)
    assert (read_video(cut, 64, 64, 12, max_frames=6) == read_video(path, 64, 64, 12)[:6]).all()
    with pytest.raises(ValueError, match=r"cut\.mp4: is .*cut off or damaged"):
        read_video(cut, 64, 64, 12)


def test_a_gif_and_an_apng(tmp_path):
    for name in ("one.gif", "one.png"):
        Image.fromarray(greys(9)[8]).save(tmp_path / name)
        assert set(numbers(read_video(tmp_path / name, 16, 16, 12))) == {8}
    pages = [Image.fromarray(frame) for frame in greys(4)]
    pages[0].save(tmp_path / "four.gif", save_all=True, append_images=pages[1:], duration=250)
    assert numbers(read_video(tmp_path / "four.gif", 32, 32, 8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_every_error_names_the_file(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for name, why in (("text.mp4", "no video"), ("empty.mp4", "no video"), ("sound.wav", "holds no video")):
        for read in (lambda path: read_video(path, 32, 32, 12), read_mp4):
            with pytest.raises(ValueError, match=why) as error:
                read(tmp_path / name)
            assert str(error.value).startswith(f"{tmp_path / name}: ") and "avcodec" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_video(tmp_path / "none.mp4", 32, 32, 12)


@pytest.mark.parametrize("size", [(240, 320), (400, 200), (640, 34)])
def test_a_large_frame_is_reduced_first_and_looks_the_same(tmp_path, size):
    y, x = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([y * 200 / size[0] + 20, x * 200 / size[1] + 20, 0 * x + 90], -1).astype(np.uint8)
    path = write_video(tmp_path / "large.mp4", [smooth], 12)
    expected = ImageOps.fit(Image.fromarray(smooth), (32, 16), Image.Resampling.BICUBIC)
    assert np.abs(read_video(path, 16, 32, 12)[0].astype(int) - np.asarray(expected)).max() <= 6
