"""Video files: what is written decodes, with PyAV itself, to what went in; a failure leaves no trace."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest

from dsa_engine.media.mp4 import Mp4Writer, read_mp4, write_mp4
from dsa_engine.shapes.world import render_clip


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    prompts = ["a red circle moves sideways"] * 3 + ["a blue square jumps on navy"] * 2
    return render_clip(np.random.default_rng(0), prompts).frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, of the worst frame."""
    errors = ((a.astype(float) - b) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / errors.max())


def decoded(path) -> tuple[np.ndarray, object]:
    """By PyAV alone, not through `read_mp4`."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_rgb().to_ndarray() for frame in container.decode(stream)])
        return frames, SimpleNamespace(
            rate=stream.average_rate, codec=stream.codec_context.name, pixels=stream.codec_context.pix_fmt
        )


def left_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("scale", [2, 4])
def test_a_clip_decodes_to_what_was_written(tmp_path, clip, scale):
    path = tmp_path / "new" / "folder" / "clip.mp4"
    write_mp4(path, clip, fps=12, scale=scale)
    frames, facts = decoded(path)
    assert (facts.rate, facts.codec, facts.pixels) == (12, "h264", "yuv420p")
    expected = np.kron(clip, np.ones((1, scale, scale, 1), dtype=np.uint8))
    assert frames.shape == expected.shape
    assert psnr(frames, expected) > 38
    assert left_in(path.parent) == ["clip.mp4"]


def test_without_scaling_only_the_coarser_colour_is_lost(tmp_path, clip):
    """Half the colour resolution of yuv420p costs edges of one pixel most of their quality; smooth colours nothing."""
    y, x = np.mgrid[:64, :48]
    smooth = np.stack([np.stack([y * 3 + t, x * 4, 255 - y * 2], axis=-1) for t in range(4)]).astype(np.uint8)
    write_mp4(tmp_path / "smooth.mp4", smooth, fps=16)
    assert psnr(decoded(tmp_path / "smooth.mp4")[0], smooth) > 35


def test_colours_do_not_shift(tmp_path):
    """The matrix that encodes (BT.709) is the one the file names: red at 601 in place of 709 is off by more than 20."""
    colors = [(230, 40, 40), (40, 200, 60), (40, 70, 255), (255, 255, 255), (0, 0, 0)]
    frames = np.array(colors, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
    write_mp4(tmp_path / "c.mp4", frames, fps=5)
    back, _ = decoded(tmp_path / "c.mp4")
    assert np.abs(back.astype(int) - frames).max() <= 4
    with av.open(str(tmp_path / "c.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_chunks_give_the_file_of_the_whole(tmp_path, clip):
    write_mp4(tmp_path / "whole.mp4", clip, 12)
    write_mp4(tmp_path / "chunks.mp4", (clip[i : i + 4] for i in range(0, len(clip), 4)), 12)
    with Mp4Writer(tmp_path / "writer.mp4", 12) as writer:
        writer.write(clip[:1])
        writer.write(clip[1:])
    whole = decoded(tmp_path / "whole.mp4")[0]
    for name in ("chunks.mp4", "writer.mp4"):
        assert np.array_equal(decoded(tmp_path / name)[0], whole)


DISC = """
import sys, numpy as np
from dsa_engine.media.mp4 import Mp4Writer
from dsa_engine.media.stream_encoders import Mp4Encoder
noise = np.random.default_rng(0).normal(128, 1, (24, 96, 96, 3))
t, y, x = np.ogrid[:24, :96, :96]
noise[(x - 20 - 2 * t) ** 2 + (y - 32) ** 2 < 150] += 80
with Mp4Writer(sys.argv[1], 12, threads=1) as video:
    video.write(noise.astype(np.uint8))
with open(sys.argv[2], "wb") as stream:
    stream.write(Mp4Encoder(12, 96, 96).encode(noise.astype(np.uint8)).data)
"""


def test_a_file_depends_on_its_frames_alone(tmp_path):
    """Not on what the memory that malloc gives held before: glibc fills it with another byte in every run. Nor on the
    instructions that torch takes, which are not all that x264 may."""
    files = []
    for filling, instructions in (("0", None), ("77", "default"), ("200", "avx2"), ("13", None)):
        paths = [tmp_path / f"{filling}.{suffix}" for suffix in ("mp4", "m4s")]
        environment = os.environ | {"MALLOC_PERTURB_": filling}
        environment |= {"ATEN_CPU_CAPABILITY": instructions} if instructions else {}
        subprocess.run([sys.executable, "-c", DISC, *map(str, paths)], env=environment, check=True)
        files.append([path.read_bytes() for path in paths])
    assert all(file == files[0] for file in files)


@pytest.mark.parametrize("fps", [1, 12.0, 24000 / 1001, 60])
def test_frame_rate(tmp_path, clip, fps):
    write_mp4(tmp_path / "a.mp4", clip[:3], fps)
    frames, read = read_mp4(tmp_path / "a.mp4")
    assert read == pytest.approx(fps, rel=1e-9)
    assert np.array_equal(frames, decoded(tmp_path / "a.mp4")[0])


def test_index_comes_first_and_the_usual_rights_hold(tmp_path, clip):
    """So a browser can play it while it loads; and a temporary file's private mode must not stick."""
    write_mp4(tmp_path / "a.mp4", clip, 12)
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.mp4").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


GRAY = np.full((2, 16, 16, 3), 90, dtype=np.uint8)


@pytest.mark.parametrize(
    "frames, options, message",
    [
        (GRAY[:, :15], {}, "nearest legal scale is 2"),
        (GRAY[:, :, :13], {"scale": 3}, "nearest legal scale is 4"),
        (GRAY, {"scale": 0}, "scale=0"),
        (GRAY, {"scale": 1.5}, "scale=1.5"),
        (GRAY, {"fps": 0}, "fps=0"),
        (GRAY, {"fps": -3}, "fps=-3"),
        (GRAY, {"fps": float("nan")}, "fps=nan"),
        (GRAY, {"fps": float("inf")}, "fps=inf"),
        (GRAY, {"fps": "12"}, "fps='12'"),
        (GRAY.astype(np.float32), {}, "float32"),
        (GRAY[0], {}, r"\[16, 16, 3\]"),
        (GRAY[..., :2], {}, r"\[2, 16, 16, 2\]"),
        (GRAY[:0], {}, "at least one frame"),
        ([], {}, "no frames were written"),
        ([GRAY.tolist()], {}, "list"),
        ([GRAY, GRAY[:, :8]], {}, r"8x16 \(scaled\) after 16x16"),
        (GRAY, {"path": "clip.avi"}, "must end in .mp4, as in clip.mp4"),
        (GRAY, {"path": "clip"}, "must end in .mp4"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, frames, options, message):
    options = {"path": "clip.mp4", "fps": 12, **options}
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / options.pop("path"), frames, **options)
    assert left_in(tmp_path) == []


def test_a_folder_is_no_target(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_mp4(tmp_path / "clip.mp4", GRAY, 12)
    assert left_in(tmp_path / "clip.mp4") == []


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_keeps_the_old_file(tmp_path, clip, failure):
    path = tmp_path / "clip.mp4"
    write_mp4(path, GRAY, 12)
    old = path.read_bytes()

    def chunks():
        yield clip[:6]
        raise failure

    with pytest.raises(type(failure)):
        write_mp4(path, chunks(), 12)
    assert path.read_bytes() == old
    assert left_in(tmp_path) == ["clip.mp4"]


def test_no_half_file_is_ever_seen_under_the_name(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    with Mp4Writer(path, 12) as writer:
        writer.write(clip)
        assert not path.exists()
        assert len(left_in(tmp_path)) == 1
    assert left_in(tmp_path) == ["clip.mp4"]


def test_a_folder_that_cannot_be_made_is_an_error_on_entry(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Mp4Writer(tmp_path / "file" / "clip.mp4", 12).__enter__()


def test_a_writer_writes_only_while_it_is_open(tmp_path):
    writer = Mp4Writer(tmp_path / "clip.mp4", 12)
    with pytest.raises(RuntimeError, match="not open"):
        writer.write(GRAY)
    with writer:
        writer.write(GRAY)
    with pytest.raises(RuntimeError, match="not open"):
        writer.write(GRAY)
    assert len(decoded(tmp_path / "clip.mp4")[0]) == 2


def test_reading_what_is_not_there_or_no_video(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mp4(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    with pytest.raises(ValueError):
        read_mp4(tmp_path / "text.mp4")
