"""The toy world: its grammar, its drawings against closed forms, its motion against the plain loop."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.shapes import world
from dsa_engine.shapes.world import BACKGROUNDS, COLORS, HIGH, LOW, MOTIONS, SHAPES, SIZE, SPEED, Caption

AREAS = {
    "circle": math.pi * 10**2,
    "square": 17**2,
    "triangle": 3 * math.sqrt(3) / 4 * 12**2,
    "cross": 2 * 20 * 7 - 7**2,
}
EVERY = [Caption(*words) for words in product(COLORS, SHAPES, MOTIONS, BACKGROUNDS)]
captions = st.sampled_from(EVERY)
positions = st.floats(LOW, HIGH)


def mask(shape: str, x: float, y: float) -> np.ndarray:
    """Coverage [H, W] read back from a drawing: the blue channel of blue on black, 255 at full cover."""
    return world.render(Caption("blue", shape, "still"), x, y)[..., 2] / 255


def test_every_caption_has_its_own_prompt_and_tokens():
    assert len({str(c) for c in EVERY}) == len({c.tokens for c in EVERY}) == 6 * 4 * 5 * 3
    assert all(Caption.parse(str(c)) == c for c in EVERY)


def test_the_vocabulary_has_19_ids_each_in_one_slot():
    slots = [set(ids) for ids in zip(*(c.tokens for c in EVERY))]
    assert [len(ids) for ids in slots] == [6, 4, 5, 3]
    assert set.union(*slots) | {world.NULL} == set(range(19)) == set(range(world.VOCABULARY))
    assert world.NULL_TOKENS == (18,) * 4


@pytest.mark.parametrize(
    "prompt",
    ["A red  circle rests.", "the RED circle\trests on black", "red circle rests", "an red circle rests on a black ."],
)
def test_case_spacing_article_and_full_stop_do_not_matter(prompt):
    assert Caption.parse(prompt) == Caption("red", "circle", "still", "black")


@pytest.mark.parametrize(
    "prompt, nearest",
    [
        ("a redd circel rests", "a red circle rests on black"),
        ("a green triangel jumping on grey please", "a green triangle jumps on gray"),
        ("a cyan square moves sidewise on navy", "a cyan square moves sideways on navy"),
        ("on navy, magenta cross moves up & down", "a magenta cross moves up and down on navy"),
    ],
)
def test_another_prompt_is_refused_with_the_nearest_legal_one(prompt, nearest):
    with pytest.raises(ValueError) as error:
        Caption.parse(prompt)
    assert prompt in str(error.value) and world.GRAMMAR in str(error.value)
    assert str(error.value).endswith(nearest)


@given(st.text())
def test_any_text_is_a_caption_or_a_value_error_that_names_a_legal_prompt(text):
    try:
        caption = Caption.parse(text)
    except ValueError as error:
        caption = Caption.parse(str(error).rsplit(": ", 1)[1])
    assert caption in EVERY


@pytest.mark.parametrize("prompt", ["", "  ", "."])
def test_an_empty_prompt_is_called_empty(prompt):
    with pytest.raises(ValueError, match="is empty"):
        Caption.parse(prompt)


def test_a_wrong_word_is_refused():
    with pytest.raises(ValueError, match="color 'rod': .* nearest is 'red'"):
        Caption("rod", "circle", "still")


@given(st.sampled_from(SHAPES), positions, positions)
def test_area_centroid_and_reach_are_those_of_the_plane_figure(shape, x, y):
    m = mask(shape, x, y)
    centres = np.arange(SIZE) + 0.5
    assert m.sum() == pytest.approx(AREAS[shape], rel=0.02)
    assert (m.sum(axis=0) @ centres / m.sum(), m.sum(axis=1) @ centres / m.sum()) == pytest.approx((x, y), abs=0.06)
    away = np.hypot(centres - x, centres[:, None] - y)
    assert m[away > 13].max(initial=0) == 0 and m[away < 3].min(initial=1) == 1


@given(positions, positions)
def test_the_triangle_points_up_and_narrows_evenly(x, y):
    """Width at height h above the base is 2 (18 - h) / sqrt(3)."""
    m = mask("triangle", x, y)
    rows = np.arange(SIZE) + 0.5
    height = (y + 6) - rows
    inside = (height > 1) & (height < 16)
    assert m.sum(axis=1)[inside] == pytest.approx(2 / math.sqrt(3) * (18 - height[inside]), abs=0.25)
    assert m[(height < -0.5) | (height > 19)].max() == 0  # half a px off the flanks is a px above the apex


@given(captions, positions, positions)
def test_only_the_colour_the_background_and_their_mixtures_are_drawn(caption, x, y):
    frame = world.render(caption, x, y).astype(float)
    color, ground = np.array(COLORS[caption.color], float), np.array(BACKGROUNDS[caption.background], float)
    share = (frame - ground) @ (color - ground) / ((color - ground) @ (color - ground))
    assert frame == pytest.approx(ground + share[..., None] * (color - ground), abs=1)
    assert (frame == color).all(-1).sum() > 100 and (frame == ground).all(-1).sum() > 3000


def test_a_batch_of_frames_is_the_frames_one_by_one():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(LOW, HIGH, size=(2, 20))
    shown = [EVERY[i] for i in rng.integers(len(EVERY), size=20)]
    batch = world.render(shown, x, y)
    assert batch.shape == (20, SIZE, SIZE, 3) and batch.dtype == np.uint8
    assert (batch == np.stack([world.render(*one) for one in zip(shown, x, y)])).all()
    with pytest.raises(ValueError, match="3 captions for 20 positions"):
        world.render(shown[:3], x, y)


@given(st.lists(captions, min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**32))
def test_places_follow_the_words(told, n, seed):
    """Against the plain loop: velocity flips at a wall. A jumping chunk, a cut and the first may start anywhere."""
    clip = world.render_clip(np.random.default_rng(seed), told, n)
    assert len(clip.frames) == len(clip.xy) == n * len(told)
    assert clip.xy.min() >= LOW and clip.xy.max() <= HIGH
    for t in range(1, len(clip.xy)):
        caption, event, first = told[t // n], clip.events[t // n], t % n == 0
        if first and (event == "cut" or caption.motion == "jumping"):
            continue
        step = np.abs(clip.xy[t] - clip.xy[t - 1])
        moving = {"sideways": (1, 0), "vertical": (0, 1), "diagonal": (1, 1)}.get(caption.motion, (0, 0))
        for axis in range(2):
            ends = clip.xy[t - 1 : t + 1, axis]
            # around a bounce both ends are near the wall, and the way there and back again is SPEED
            bounced = min((ends - LOW).sum(), (HIGH - ends).sum())
            assert SPEED * moving[axis] == pytest.approx(step[axis]) or SPEED * moving[axis] == pytest.approx(bounced)
    assert all((clip.frames[t] == world.render(told[t // n], *clip.xy[t])).all() for t in range(len(clip.frames)))


@given(st.sampled_from(["sideways", "vertical", "diagonal"]), st.integers(0, 2**32))
def test_a_long_motion_visits_both_walls_and_repeats(motion, seed):
    clip = world.render_clip(np.random.default_rng(seed), [Caption("red", "circle", motion)], 60)
    axes = [0, 1] if motion == "diagonal" else [0 if motion == "sideways" else 1]
    period = 2 * (HIGH - LOW) / SPEED
    assert period == 26
    for axis in axes:
        assert np.ptp(clip.xy[:, axis]) >= HIGH - LOW - SPEED
        assert clip.xy[26:, axis] == pytest.approx(clip.xy[:-26, axis])


def test_events_and_hard_chunks_come_from_the_captions():
    a, b = Caption("red", "circle", "still"), Caption("red", "circle", "vertical")
    told = [a, a, b, Caption("blue", "circle", "vertical"), Caption("blue", "circle", "jumping"), b]
    clip = world.render_clip(np.random.default_rng(0), told)
    assert clip.events == ["first", "same", "soft", "cut", "soft", "cut"]
    assert clip.hard.tolist() == [True, False, False, True, True, True]


def test_the_mix_of_events_and_words_is_the_one_asked_for():
    rng = np.random.default_rng(0)
    clips = [world.sample_captions(rng, 4) for _ in range(3000)]
    later = np.array([world.events_of(c)[1:] for c in clips])
    assert (later == "cut").mean() == pytest.approx(0.15, abs=0.015)
    assert (later == "soft").mean() == pytest.approx(0.10, abs=0.015)
    first = np.array([c[0].motion for c in clips])
    for motion, weight in world.MOTION_WEIGHTS.items():
        assert (first == motion).mean() == pytest.approx(weight, abs=0.03)
    only = world.sample_captions(rng, 50, cut=0.5, soft=0.5, weights={"vertical": 2.0})
    assert {c.motion for c in only} == {"vertical"}


def test_a_pool_is_the_clips_of_its_stream():
    frames, tokens = world.sample_clips(np.random.default_rng(5), 60, chunks=3, chunk_frames=2)
    assert (frames.shape, frames.dtype) == ((60, 6, SIZE, SIZE, 3), np.uint8)
    assert (tokens.shape, tokens.dtype) == ((60, 3, 4), np.int64)
    rng = np.random.default_rng(5)
    for i in range(60):
        clip = world.sample_clip(rng, 3, 2)
        assert (frames[i] == clip.frames).all()
        assert [tuple(t) for t in tokens[i]] == [caption.tokens for caption in clip.captions]


def test_counts_below_one_are_refused():
    rng = np.random.default_rng(0)
    for bad in ({"n": 0}, {"n": 1, "chunks": 0}, {"n": 1, "chunk_frames": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            world.sample_clips(rng, **bad)
    with pytest.raises(ValueError, match="captions=0"):
        world.render_clip(rng, [])
