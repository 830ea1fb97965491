"""The measure of the toy world: truth scores 1 however it is disturbed, anything else 0; against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.shapes import metrics, world
from dsa_engine.shapes.world import HIGH, LOW, MOTIONS, SHAPES, SLOTS, Caption

CIRCLE = Caption("red", "circle", "still")


def told(clip: world.Clip) -> list[Caption]:
    return [caption for caption in clip.captions for _ in range(len(clip.frames) // len(clip.captions))]


@pytest.fixture(scope="module")
def clips() -> list[world.Clip]:
    """Every motion often, and every event."""
    rng = np.random.default_rng(0)
    return [world.sample_clip(rng, cut=0.3, soft=0.3, weights=dict.fromkeys(MOTIONS, 1)) for _ in range(30)]


def blurred(frames: np.ndarray) -> np.ndarray:
    padded = np.pad(frames / 255, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[:, i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9


@pytest.mark.parametrize(
    "disturbed, off",
    [
        (lambda frames, rng: frames, 0.08),
        (lambda frames, rng: torch.from_numpy(frames), 0.08),
        (lambda frames, rng: frames / 255 + rng.normal(0, 0.1, frames.shape), 0.25),
        (lambda frames, rng: blurred(frames), 0.2),
    ],
    ids=["truth", "tensor", "noise", "blur"],
)
def test_the_truth_is_valid_and_moves_right(clips, disturbed, off):
    rng = np.random.default_rng(1)
    for clip in clips:
        scores = metrics.score(disturbed(clip.frames, rng), told(clip))
        assert scores.valid.all() and scores.motion.all()
        assert np.abs(scores.xy - clip.xy).max() < off


@pytest.mark.parametrize("slot", ["color", "shape", "background"])
def test_a_caption_wrong_in_one_slot_of_the_look_is_never_valid(clips, slot):
    for clip in clips[:10]:
        for word in SLOTS[slot]:
            wrong = [replace(caption, **{slot: word}) for caption in told(clip)]
            expected = [a == b for a, b in zip(wrong, told(clip))]
            assert metrics.score(clip.frames, wrong).valid.tolist() == expected


def test_a_wrong_motion_word_is_never_right():
    rng = np.random.default_rng(2)
    for shown in MOTIONS:
        clip = world.render_clip(rng, [replace(CIRCLE, motion=shown)] * 6)
        for word in MOTIONS:
            right = metrics.score(clip.frames, replace(CIRCLE, motion=word)).motion
            if (shown, word) == ("jumping", "still"):  # alike within a chunk, not from chunk to chunk
                assert right.tolist() == [True] + [False] * 5
            else:  # a chance jump to the same place is a jump
                assert (right == (shown == word or (shown, word) == ("still", "jumping"))).all()


def test_a_jump_or_a_cut_between_chunks_is_not_counted_as_motion():
    """But an unannounced one is: the frame before the chunk belongs to the path."""
    a, b = world.render(CIRCLE, [20, 20, 20, 40, 40, 40], [20.0] * 6), replace(CIRCLE, motion="jumping")
    assert metrics.score(a, CIRCLE).motion.tolist() == [True, False]
    assert metrics.score(a, b).motion.tolist() == [True, True]
    cut = replace(CIRCLE, color="blue")
    a[3:] = world.render(cut, 40.0, 20.0)
    assert metrics.score(a, [CIRCLE] * 3 + [cut] * 3).motion.tolist() == [True, True]


def test_an_empty_or_a_doubled_frame_is_not_valid():
    for caption in (Caption(*look, "black") for look in [("red", "circle", "still"), ("blue", "triangle", "still")]):
        frames = world.render(caption, [20.0] * 3, [20.0] * 3)
        frames[1] = 0
        frames[2] |= world.render(caption, 45.0, 45.0)
        scores = metrics.score(frames, caption)
        assert scores.valid.tolist() == [True, False, False] and scores.motion.tolist() == [False]


@given(st.sampled_from(SHAPES), st.floats(LOW, HIGH), st.floats(LOW, HIGH), st.integers(0, 99))
def test_the_fit_is_that_of_a_plain_search(shape, x, y, seed):
    """Against drawings at every eighth of a pixel around the place, both smoothed: at most the plain error."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (64, 64, 3))
    caption = Caption("green", shape, "still", "gray")
    frame = world.render(caption, x, y) / 255 + noise
    scores = metrics.score(frame[None], caption)
    rx, ry = np.round(x * 8) / 8, np.round(y * 8) / 8
    shifts = np.arange(-2, 3) / 8
    near = [(rx + dx, ry + dy) for dx in shifts for dy in shifts]
    drawn = blurred(world.render(caption, *np.transpose(near)))
    inside = np.s_[2:-2, 2:-2]  # away from the frame's edge, whose smoothing differs
    errors = np.square(drawn - blurred((frame * 255)[None]))[(slice(None), *inside)].mean(axis=(1, 2, 3))
    assert scores.fit[0] == pytest.approx(errors.min(), rel=0.1, abs=3e-5)
    assert np.hypot(*(scores.xy[0] - (x, y))) < 0.25


def test_texture_is_the_variance_inside_the_shape():
    frames = world.render(CIRCLE, [30.0, 30.0], [30.0, 30.0]) / 255
    frames[1, ::2] *= 0.5  # stripes halve every other row: variance of {c, c / 2} is c^2 / 16
    scores = metrics.score(frames, CIRCLE)
    assert scores.texture == pytest.approx([0, np.mean((np.array([230, 40, 40]) / 255) ** 2) / 16], rel=0.02, abs=1e-9)


@pytest.mark.parametrize(
    "path, right",
    [
        ([(0, 0), (3, 0), (6, 0)], {"sideways"}),
        ([(0, 0), (0, -3), (0, -6)], {"vertical"}),
        ([(0, 0), (3, -3), (6, -6)], {"diagonal"}),
        ([(0, 0), (0.1, 0), (0, 0.2)], {"still", "jumping"}),
        ([(0, 0), (3, 1), (6, 2)], set()),  # neither pure nor mixed
        ([(0, 0), (0.7, 0), (1.4, 0)], set()),  # neither still nor moving
        ([(0, 0), (9, 0), (9, 0)], set()),  # a leap
        ([(0, 0)], set(MOTIONS)),
    ],
)
def test_which_words_a_path_fulfils(path, right):
    assert {motion for motion in MOTIONS if metrics.moves_as(motion, np.array(path, float))} == right


def test_psnr_has_its_closed_form():
    frames = np.full((2, 64, 64, 3), 100, np.uint8)
    assert metrics.psnr(frames, frames) == math.inf
    assert metrics.psnr(frames, frames + 51) == pytest.approx(20 * math.log10(5))  # 51 / 255 is a fifth
    assert metrics.psnr(frames / 255, torch.from_numpy(frames + 51)) == pytest.approx(20 * math.log10(5))
    with pytest.raises(ValueError, match="same shape"):
        metrics.psnr(frames, frames[:1])


def test_what_cannot_be_scored_is_refused():
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    for bad, caption, chunk, message in [
        (frames[0], CIRCLE, 3, "frames of shape"),
        (frames[:, :32], CIRCLE, 3, "frames of shape"),
        (frames.astype(np.int32), CIRCLE, 3, "frames of torch.int32"),
        (frames, [CIRCLE] * 2, 3, "2 captions for 3 frames"),
        (frames, "a red dog rests", 3, "nearest"),
        (frames, CIRCLE, 0, "chunk_frames=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.score(bad, caption, chunk)
