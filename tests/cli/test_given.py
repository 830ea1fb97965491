"""`--image` and `--video`: files as phones make them, in the clip's rate, size and whole chunks; encoded once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dsa_engine.engine.engine import Engine
from dsa_engine.pipeline import Pipeline
from tests.support.command_line import OTHER, PROMPT, THIRD, decoded
from tests.support.media.files import greys, quadrants, write_video

COMMON = ("-o", "c.mp4", "--scale", 1, "--steps", "fixed:1")


@pytest.fixture
def encoded(monkeypatch) -> list[np.ndarray]:
    """What the engine encodes: [T, H, W, 3] in [0, 255] each time."""
    seen, real = [], Engine.encode_frames

    def spy(engine, frames):
        seen.append((255 * frames[0].movedim(1, -1)).numpy())
        return real(engine, frames)

    monkeypatch.setattr(Engine, "encode_frames", spy)
    return seen


def numbers(frames) -> list[int]:
    return np.round((frames.mean((1, 2, 3)) - 20) / 4).astype(int).tolist()


@pytest.mark.parametrize("strength", [(), ("--strength", 0.5)])
def test_a_video_is_encoded_once_whatever_the_prompts(facts, tmp_path, encoded, strength):
    write_video(tmp_path / "in.mp4", greys(15), 12)
    at = ("--at", "18f", OTHER, "--at", "24f", THIRD) if not strength else ("--at", "6f", OTHER, "--at", "9f", THIRD)
    said = facts("generate", PROMPT, *COMMON, "--video", "in.mp4", *at, *strength)
    assert said["frames"] == (15 if strength else 30) and len(said["prompts"]) == 3
    assert [numbers(frames) for frames in encoded] == [list(range(15))]


@pytest.mark.parametrize(
    "flags, kept", [((), 45), (("--frames", 12), 12), (("--seconds", 2), 24), (("--seconds", 9), 45)]
)
def test_a_video_to_make_anew_is_cut_to_whole_chunks(run, tmp_path, encoded, flags, kept):
    """47 frames, chunks of 3."""
    write_video(tmp_path / "in.mp4", greys(47), 12)
    code, _, err = run("generate", PROMPT, *COMMON, "--video", "in.mp4", "--strength", 0.5, *flags)
    assert code == 0, err
    assert len(decoded(tmp_path / "c.mp4")[0]) == kept
    assert [numbers(frames) for frames in encoded] == [list(range(kept))]
    assert ("in.mp4: the first 45 of its 47 frames at 12 fps, whole chunks" in err) == (kept == 45)


@pytest.mark.parametrize(
    "count, flags, messages",
    [
        (47, ("--strength", 0.5, "--frames", 48), ["--frames 48", "has 47", "nearest is 45"]),
        (47, ("--strength", 0.5, "--frames", 44), ["--frames 44", "nearest is 45"]),
        (2, ("--strength", 0.5), ["2 frames", "one chunk, 3"]),
        (47, ("--frames", 24), ["in.mp4", "24 frames or more", "more frames"]),
    ],
)
def test_what_does_not_fit_says_what_would(run, tmp_path, count, flags, messages):
    write_video(tmp_path / "in.mp4", greys(count), 12)
    code, _, err = run("generate", PROMPT, *COMMON, "--video", "in.mp4", *flags)
    assert code == 2 and [m for m in messages if m not in err] == [], err
    assert not (tmp_path / "c.mp4").exists()


def test_a_video_of_30_frames_a_second_plays_as_fast_as_before(facts, tmp_path, encoded):
    """One second of it is 12 frames of a model of 12 frames per second."""
    write_video(tmp_path / "in.mp4", greys(30), 30)
    assert facts("generate", PROMPT, *COMMON, "--video", "in.mp4", "--strength", 0.5)["frames"] == 12
    assert [numbers(frames) for frames in encoded] == [[k * 30 // 12 for k in range(12)]]


def test_a_photo_and_a_video_from_a_phone_are_upright(facts, tmp_path, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(quadrants(32, 64)).save(tmp_path / "photo.png", exif=exif)
    write_video(tmp_path / "phone.mp4", [quadrants(32, 64)] * 3, 12, matrix=(0, 1, -1, 0))
    for flags in (("--image", "photo.png"), ("--video", "phone.mp4")):
        facts("generate", PROMPT, *COMMON, *flags)
        expected = np.rot90(quadrants(32, 64), -1)[16:48]
        assert all(np.abs(frame - expected).mean() < 4 for frame in encoded.pop())


def test_python_takes_the_same_files(model, tmp_path, encoded):
    write_video(tmp_path / "in.mp4", greys(30), 30)
    Image.fromarray(quadrants(32, 32)).save(tmp_path / "in.gif")
    with Pipeline.from_pretrained(model, device="cpu") as pipe:
        options = {"step_policy": "fixed:1", "output_type": "latent"}
        by_path = pipe(PROMPT, video=tmp_path / "in.mp4", strength=0.5, num_frames=9, **options)
        assert numbers(encoded.pop()) == [k * 30 // 12 for k in range(9)]
        once = pipe.encode_video([*np.stack(greys(30))[[k * 30 // 12 for k in range(9)]]])
        encoded.clear()
        again = pipe(PROMPT, video=once, strength=0.5, **options)
        assert not encoded and np.abs(np.asarray(by_path.frames) - np.asarray(again.frames)).max() < 0.05
        pipe(PROMPT, image=str(tmp_path / "in.gif"), num_frames=4, **options)
        assert (np.round(encoded.pop()[0]) == quadrants(32, 32)).all()
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            pipe(PROMPT, image="none.png")


def test_a_check_encodes_nothing(model, encoded):
    """A server checks a request before it queues it."""
    with Pipeline.from_pretrained(model, device="cpu") as pipe:
        pipe.check_session(PROMPT, num_frames=4, image=quadrants(32, 32))
        for frames, image, word in ((5, quadrants(32, 32), "nearest is 4"), (4, quadrants(32, 32) * 1.0, "0 to 220")):
            with pytest.raises(ValueError, match=word):
                pipe.check_session(PROMPT, num_frames=frames, image=image)
    assert not encoded


@pytest.mark.parametrize("flag, name", [("--image", "text.png"), ("--image", "cut.jpg"), ("--video", "text.mp4")])
def test_an_error_is_one_sentence_with_the_files_name(run, tmp_path, flag, name):
    (tmp_path / name).write_text("a text" * 100)
    if name == "cut.jpg":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    code, _, err = run("generate", PROMPT, *COMMON, flag, name)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith(f"dsa-engine: error: {name}: is no ") and "avcodec" not in line
    assert "Traceback" not in err and not (tmp_path / "c.mp4").exists()
