"""Images and videos that are given: every form of them, their scaling, and what the shipped model makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dsa_engine import Pipeline
from dsa_engine.cli import main
from dsa_engine.media import mp4, preprocess
from dsa_engine.shapes import metrics

PROMPT = "a red circle moves sideways on black"


@pytest.fixture(scope="module")
def shapes() -> Pipeline:
    return Pipeline.from_pretrained("shapes", device="cpu")


@pytest.fixture(scope="module")
def clip(shapes) -> np.ndarray:
    """Twelve frames, uint8 [T, H, W, 3]."""
    return (shapes(PROMPT, seed=3, num_frames=12).frames[0] * 255).round().astype(np.uint8)


def forms(array):
    """The same frame or frames in every form."""
    channels_first = torch.from_numpy(np.moveaxis(array, -1, -3).copy())
    yield array
    yield array.astype(np.float32) / 255
    yield channels_first
    yield channels_first.float() / 255
    yield Image.fromarray(array) if array.ndim == 3 else [Image.fromarray(frame) for frame in array]
    if array.ndim == 4:
        yield list(array)


def test_every_form_of_an_image_and_of_a_video_is_the_same_tensor():
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(frames).movedim(-1, -3).float() / 255
    for given in forms(frames[0]):
        torch.testing.assert_close(preprocess.to_video_tensor("image", given, 1, (6, 8)), expected[None, :1])
    for given in forms(frames):
        torch.testing.assert_close(preprocess.to_video_tensor("video", given, 1, (6, 8)), expected[None])
        torch.testing.assert_close(
            preprocess.to_video_tensor("image", given, 5, (6, 8)), expected[:, None]
        )  # one a prompt
    both = preprocess.to_video_tensor("video", np.stack((frames, frames[::-1])), 2, (6, 8))
    torch.testing.assert_close(both, torch.stack((expected, expected.flip(0))))


def test_another_size_is_scaled_to_cover_and_cut_at_the_centre():
    ramp = np.tile(np.linspace(0, 1, 40, dtype=np.float32)[None, :, None], (10, 1, 3))  # brightness is the column
    wide = preprocess.to_video_tensor("image", ramp, 1, (10, 20))[0, 0, 0]
    torch.testing.assert_close(wide, torch.linspace(10 / 39, 29 / 39, 20).expand(10, -1))  # the middle half, untouched
    half = preprocess.to_video_tensor("image", ramp, 1, (5, 20))[0, 0, 0]
    inner = torch.linspace(0.5 / 39, 38.5 / 39, 20)[2:-2]  # every column the mean of two; cubic at the ends
    torch.testing.assert_close(half[:, 2:-2], inner.expand(5, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "name, given, messages",
    [
        ("image", "cat.png", ["image of type str", "PIL"]),
        ("image", np.zeros((6, 8), np.uint8), ["[6, 8]"]),
        ("image", np.zeros((6, 8, 4), np.uint8), ["[1, 1, 4, 6, 8]", "[H, W, 3]"]),
        ("image", np.full((6, 8, 3), 200.0), ["0 to 200", "uint8"]),
        ("image", np.full((6, 8, 3), np.nan), ["nan", "[0, 1]"]),
        ("image", np.zeros((3, 6, 8, 3), np.uint8), ["3 for 2 prompts"]),
        ("video", [], ["at least one"]),
        ("video", [np.zeros((6, 8, 3)), np.zeros((6, 9, 3))], ["all alike"]),
        ("video", np.zeros((0, 6, 8, 3), np.uint8), ["[1, 0, 3, 6, 8]"]),
    ],
)
def test_what_is_no_image_is_told_what_one_is(name, given, messages):
    with pytest.raises(ValueError, match=name) as error:
        preprocess.to_video_tensor(name, given, 2, (6, 8))
    assert [m for m in messages if m not in str(error.value)] == [], error.value


def test_an_image_begins_the_clip(shapes, clip):
    """Its first frame is the codec's copy of the image, and the shape goes on from where it stood."""
    made = shapes("a red circle moves up and down on black", image=clip[6], num_frames=13, seed=4)
    frames = made.frames[0]
    assert frames.shape == (13, 64, 64, 3) and len(made.steps_per_chunk[0]) == 4
    assert np.abs(frames[0] - clip[6] / 255).max() < 0.15
    places = np.stack([centre(frame) for frame in frames])
    assert np.abs(places[1] - centre(clip[6] / 255)).max() < 6  # a step of its own, not a new place
    assert np.ptp(places[:, 0]) > 3 * np.ptp(places[:, 1])  # rows change: it does what the prompt says


def test_a_video_is_gone_on_from(shapes, clip):
    made = shapes(PROMPT, video=clip, num_frames=24, seed=5).frames[0]
    assert np.abs(made[:12] - clip / 255).max() < 0.3 and np.abs(made[:12] - clip / 255).mean() < 0.01
    places = np.stack([centre(frame) for frame in made])
    assert np.abs(np.diff(places, axis=0)).max() < 6  # no jump at the seam, nor anywhere


def test_strength_says_how_much_of_a_video_stays(shapes, clip):
    """A blue circle is asked for: the colour changes, and from strength 1 down the place comes to be the video's."""
    prompt, distance = PROMPT.replace("red", "blue"), {}
    for strength in (0.25, 0.5, 1.0):
        made = shapes(prompt, video=clip, strength=strength, seed=6).frames[0]
        assert made.shape == clip.shape
        assert (made[..., 2].max((1, 2)) > 0.5).all() and made[..., 0].mean() < 0.2 * made[..., 2].mean()
        distance[strength] = np.mean([np.abs(centre(a) - centre(b / 255)).max() for a, b in zip(made, clip)])
    assert max(distance[0.25], distance[0.5]) < 3 < distance[1.0]


def centre(frame) -> np.ndarray:
    """Centre of brightness (row, column) of a frame in [0, 1] on black."""
    weight = frame.max(-1) * (frame.max(-1) > 0.2)
    return np.array([(weight.sum(1) * np.arange(64)).sum(), (weight.sum(0) * np.arange(64)).sum()]) / weight.sum()


@pytest.mark.parametrize("options", [{"image": 6}, {"video": slice(None)}, {"video": slice(None), "strength": 0.5}])
def test_a_session_makes_the_frames_of_the_call(shapes, clip, options):
    """The same latents chunk by chunk, after the opening; also after a reset and from a snapshot."""
    options = {k: clip[v] if k != "strength" else v for k, v in options.items()}
    count = 12 if "strength" in options else 13 if "image" in options else 24
    whole = shapes(PROMPT, num_frames=count, seed=9, **options).frames[0]
    with shapes.session(PROMPT, num_frames=count, seed=9, **options) as session:
        opening, start = session.prefix_frames(), session.snapshot()
        made = [chunk.frames for chunk in iter_chunks(session)]
        pts = 0 if opening is None else len(opening) / session.fps
        shown = np.concatenate([*([] if opening is None else [opening]), *made])
        np.testing.assert_allclose(shown / 255, whole, atol=0.51 / 255 + 1e-4)
        for back in (session.reset, lambda: session.restore(start)):
            back()
            again = session.next_chunk()
            assert np.array_equal(again.frames, made[0]) and again.pts == pytest.approx(pts)


def iter_chunks(session):
    while not session.exhausted:
        yield session.next_chunk()


def test_one_image_for_each_prompt(shapes, clip):
    images = np.stack((clip[0], clip[6]))
    both = shapes([PROMPT, PROMPT], image=images, num_frames=4, seed=1).frames
    alone = [shapes(PROMPT, image=p, num_frames=4, seed=1 + i).frames[0] for i, p in enumerate(images)]
    np.testing.assert_allclose(both, np.stack(alone), atol=1e-3)


@pytest.mark.parametrize(
    "options, messages",
    [
        ({"image": 0, "video": 0}, ["one or the other"]),
        ({"strength": 0.5}, ["give video too"]),
        ({"video": 0, "strength": 0.0}, ["strength=0.0", "above 0"]),
        ({"video": 0, "strength": 1.5}, ["strength=1.5", "nearest is 1.0"]),
        ({"video": 0, "strength": 0.5, "num_frames": 24}, ["num_frames=24", "nearest is 12"]),
        ({"video": 0, "strength": 0.5, "step_policy": "fixed:4"}, ["n=4", "from 1 to 2"]),
        ({"image": 0, "num_frames": 12}, ["num_frames=12", "after the 1 given", "nearest is 13"]),
        ({"video": 1, "strength": 0.5}, ["video of 11 frames", "nearest is 12"]),
    ],
)
def test_what_does_not_fit_is_refused(shapes, clip, options, messages):
    given = {"image": [clip[0]], "video": [clip, clip[:11]]}
    options = {k: given[k][v] if k in given else v for k, v in options.items()}
    with pytest.raises(ValueError) as error:
        shapes(PROMPT, **options)
    assert [m for m in messages if m not in str(error.value)] == [], error.value


def test_the_command_line_takes_files(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mp4.write_mp4("in.mp4", clip, 12.0)
    Image.fromarray(clip[6]).save("in.png")
    runs = {
        ("--image", "in.png", "--frames", "13"): 13,
        ("--video", "in.mp4", "--frames", "24"): 24,
        ("--video", "in.mp4", "--strength", "0.5"): 12,
    }
    for extra, count in runs.items():
        assert main(["generate", PROMPT, "-o", "out.mp4", "--scale", "1", "--json", *extra]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == count
        frames, _ = mp4.read_mp4("out.mp4")
        assert len(frames) == count
        if "--strength" not in extra:
            first = clip[6] if "--image" in extra else clip[0]
            assert np.abs(frames[0].astype(int) - first).mean() < 8
    for extra, message in (
        (("--image", "in.mp4"), "12 frames"),
        (("--image", "in.png", "--video", "in.mp4"), "one or the other"),
        (("--image", "none.png"), "none.png"),
    ):
        assert main(["generate", PROMPT, "-o", "new.mp4", *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new.mp4").exists()


def test_the_continuation_is_valid_by_the_measure_of_the_quality_benchmark(shapes, clip):
    made = shapes(PROMPT, video=clip, num_frames=24, seed=5).frames[0]
    scores = metrics.score(made, PROMPT)
    assert scores.valid[12:].mean() > 0.9 and scores.motion[4:].all()
