"""Rollouts for evaluation against sessions, single clips and a teacher without a cache; scores against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsa_engine import Change, Confidence, Fixed, PerChunk, Pipeline, Relative
from dsa_engine.evaluation import rollouts
from dsa_engine.evaluation.rollouts import (
    EvalRollouts,
    Table,
    chunk_kinds,
    ground_truth,
    group_by_prompt_switches,
    held_out,
    mean_scores,
    prompt_switches,
    roll_out,
    roll_out_teacher,
    tabulate,
    trace,
)
from dsa_engine.sampling.noise import SeededNoise
from dsa_engine.sampling.schedule import warp
from dsa_engine.shapes.world import Caption
from dsa_engine.training.teacher_forcing import teacher_forced

RED, UP = Caption("red", "circle", "sideways"), Caption("red", "circle", "vertical")
BLUE, JUMP = Caption("blue", "cross", "still"), Caption("blue", "cross", "jumping")
# six chunks slide the window of three; the switches come at different times
CLIPS = [[RED] * 6, [RED] * 3 + [BLUE] * 3, [BLUE] * 6, [UP] * 3 + [RED] * 2 + [BLUE], [BLUE] * 3 + [UP] * 3]


def test_clips_are_alike_when_they_switch_at_the_same_chunks():
    assert group_by_prompt_switches(map(prompt_switches, CLIPS), 2) == [[0, 2], [1, 4], [3]]
    assert group_by_prompt_switches(map(prompt_switches, CLIPS), 1) == [[0], [2], [1], [4], [3]]


@pytest.mark.parametrize("batch", [1, 2])
def test_each_clip_is_rolled_as_a_session_of_its_own(pipe, batch):
    after_one = roll_out(pipe, CLIPS, Fixed(1), seed=7).confidence.min(axis=2)
    policy = Confidence(float(np.median(after_one)))  # so that about half of the chunks stop there
    rolled = roll_out(pipe, CLIPS, policy, seed=7, batch=batch)
    for i, clip in enumerate(CLIPS):
        with pipe.session(str(clip[0]), num_frames=18, step_policy=policy, seed=7 + i) as session:
            for k, caption in enumerate(clip):
                if k and caption != clip[k - 1]:
                    session.update(str(caption))
                chunk = session.next_chunk()
                assert rolled.steps[i, k] == chunk.steps
                np.testing.assert_allclose(rolled.confidence[i, k], chunk.confidence, atol=1e-4)
                frames = rolled.frames[i, 3 * k : 3 * k + 3].astype(int)
                assert np.abs(frames - chunk.frames).max() <= 1  # of 255: the rounding of another batch size
    assert len(np.unique(rolled.steps)) > 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_switch_resets_only_the_clips_that_switch_and_want_it(pipe, first):
    """All clips at once, without a recache: then each has the numbers of a session of its own."""
    policies = [Relative(on_prompt_switch=("keep", "reset")[(first + i) % 2]) for i in range(len(CLIPS))]
    rolled = roll_out(pipe, CLIPS, policies, seed=7, recache=False)
    for i, (clip, policy) in enumerate(zip(CLIPS, policies)):
        with pipe.session(str(clip[0]), num_frames=18, step_policy=policy, seed=7 + i) as session:
            for k, caption in enumerate(clip):
                switched = k > 0 and caption != clip[k - 1]
                if switched:
                    session.update(str(caption), recache=False)
                assert rolled.steps[i, k] == session.next_chunk().steps
                assert rolled.steps[i, k] == 4 or not (switched and policy.on_prompt_switch == "reset")


def test_without_a_switch_all_at_once_is_the_same(pipe):
    clips = [clip[:1] * 4 for clip in CLIPS]
    once, apart = roll_out(pipe, clips, "fixed:2"), roll_out(pipe, clips, Fixed(2), batch=2)
    assert np.abs(once.frames.astype(int) - apart.frames).max() <= 1


def test_each_clip_may_have_a_policy_of_its_own_and_steps_name_their_clips(pipe):
    counts = [[1, 2, 3, 4, 1, 2], [4, 4, 4, 1, 1, 1], [2] * 6, [3, 1, 3, 1, 3, 1], [1] * 6]
    seen = np.zeros((5, 6, 4), int)

    def count(step):
        seen[step.rows, step.chunk, step.index - 1] += 1

    rolled = roll_out(pipe, CLIPS, [PerChunk(c) for c in counts], on_step=count, batch=2)
    assert rolled.steps.tolist() == counts
    assert (seen == (np.arange(4) < np.array(counts)[..., None])).all()
    with pytest.raises(ValueError, match="2 policies for 5 clips"):
        roll_out(pipe, CLIPS, [Fixed(1)] * 2)


class Bare:
    """A decoder that shows the latents themselves."""

    @staticmethod
    def decode(latents, state):
        return latents, None


def naive_teacher(pipe, captions, steps, shift, guidance, seed):
    """Euler along sigma without a cache: all clean chunks so far go through the model at every step.

    With recaching, the whole past of a chunk is under that chunk's prompt.
    """
    model, text = pipe.engine.dit, pipe.engine.text
    frames, context = pipe.config.chunk_frames, pipe.config.window // pipe.config.chunk_frames - 1
    chunks, clips = len(captions[0]), len(captions)
    sigmas = [warp(s, shift) for s in np.linspace(1, 0, steps + 1)]
    video = torch.zeros(clips, 0, frames, 16, 8, 8)
    for i in range(chunks):
        seeds = range(seed, seed + clips)
        x = SeededNoise(seeds, (frames, 16, 8, 8), torch.device("cpu"), torch.float32).initial(i)
        told, null = text.encode([str(clip[i]) for clip in captions]), text.null(clips)

        def velocity(x, sigma, words, i=i, video=video):
            noisy = torch.cat((video, x[:, None]), dim=1)
            level, words = torch.full((clips, i + 1), sigma), words[:, None].expand(-1, i + 1, -1, -1)
            out = teacher_forced(model, noisy, noisy, level, words, words, context)
            return out.velocity.unflatten(0, (clips, i + 1))[:, i]

        for sigma, after in zip(sigmas, sigmas[1:]):
            v, u = velocity(x, float(sigma), told), velocity(x, float(sigma), null)
            x = x + (after - sigma) * (u + guidance * (v - u))
        video = torch.cat((video, x[:, None]), dim=1)
    return video.flatten(1, 2)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_teacher_equals_euler_steps_without_a_cache(pipe, close, monkeypatch, guidance):
    monkeypatch.setattr(pipe.engine, "decoder", Bare)
    monkeypatch.setattr(rollouts, "to_uint8", lambda latents: latents.numpy())
    clips = [[RED] * 4, [BLUE] * 2 + [UP] * 2, [RED, UP, UP, JUMP]]
    rolled = roll_out_teacher(pipe, clips, steps=5, shift=3.0, guidance=guidance, seed=11, batch=2)
    expected = naive_teacher(pipe, clips, 5, 3.0, guidance, 11)
    close(torch.from_numpy(rolled.frames), expected, 2e-4)
    assert (rolled.steps == 5).all() and rolled.confidence.shape == (3, 4, 3)


def test_the_teacher_needs_steps(pipe):
    with pytest.raises(ValueError, match="steps=0: must be a whole number"):
        roll_out_teacher(pipe, [[RED]], steps=0)


def test_a_trace_shows_what_the_policies_will_read(pipe):
    """On the first chunk, where nothing came before: both rules, applied to the trace, count as their rollouts do."""
    clips = [[clip[0]] for clip in held_out(6)]
    rolled, seen = trace(pipe, clips, seed=3, batch=4)
    assert (rolled.steps == 4).all()
    np.testing.assert_allclose(seen.confidence[:, :, -1], rolled.confidence, atol=1e-6)
    np.testing.assert_allclose(seen.change[:, :, -1], seen.distance[:, :, -1])  # x_4 is the last estimate
    sure, change = seen.confidence.min(axis=3)[:, 0], seen.change.max(axis=3)[:, 0]
    sure_at, calm_at = np.median(sure[:, :2]), np.median(change)
    by_confidence = [next((k for k in (1, 2, 3) if row[k - 1] >= sure_at), 4) for row in sure]
    by_change = [next((k for k in (2, 3) if row[k - 2] <= calm_at), 4) for row in change]
    assert roll_out(pipe, clips, Confidence(float(sure_at)), 3, batch=4).steps[:, 0].tolist() == by_confidence
    assert roll_out(pipe, clips, Change(float(calm_at)), 3, batch=4).steps[:, 0].tolist() == by_change
    assert len({*by_confidence}) > 1 and len({*by_change}) > 1


def test_distances_of_a_trace_are_those_of_the_steps(pipe):
    seen, steps = trace(pipe, CLIPS[:2], seed=3, batch=1)[1], []
    roll_out(pipe, CLIPS[1:2], Fixed(4), 4, on_step=steps.append)
    estimates = [s.x0[0] for s in steps if s.chunk == 5]
    for k in range(3):
        for kept, other in ((seen.distance, estimates[3]), (seen.change, estimates[k + 1])):
            expected = (estimates[k] - other).square().mean(dim=(1, 2, 3))
            torch.testing.assert_close(torch.from_numpy(kept[1, 5, k]), expected, rtol=1e-3, atol=1e-5)


def test_a_model_without_a_head_cannot_be_traced(pipe, monkeypatch):
    monkeypatch.setattr(pipe.engine, "head", None)
    with pytest.raises(ValueError, match="no confidence head"):
        trace(pipe, [[RED]])
    with pytest.raises(ValueError, match="needs a confidence head"):
        roll_out(pipe, [[RED]], Confidence(0.5))
    assert roll_out(pipe, [[RED] * 2], Change(1e9)).steps.tolist() == [[2, 2]]


def test_kinds_of_chunks():
    found = chunk_kinds([RED, RED, UP, BLUE, JUMP, JUMP, BLUE])
    assert found == ["first", "same", "soft", "cut", "jumping", "jumping", "soft"]


def test_ground_truth_scores_as_the_metric_promises():
    """Through the shipped codec every real clip is valid, moves as told and never leaps."""
    pipe, clips = Pipeline.from_pretrained("shapes"), [[RED, RED, UP, BLUE, JUMP], [JUMP, RED, UP, UP, RED]]
    table = tabulate(clips, ground_truth(pipe, clips, seed=5))
    assert table.valid.all() and table.motion.all() and (table.steps == 0).all()
    assert table.hard.tolist() == [[True, False, False, True, True], [True, True, False, False, False]]
    assert (np.isnan(table.leap) == table.hard[..., None]).all() and np.nanmax(table.leap) < 3.6
    moved = np.linalg.norm(table.xy[0, 1, 0] - table.xy[0, 0, 2])
    assert table.leap[0, 1, 0] == pytest.approx(moved)
    other = tabulate(clips, ground_truth(pipe, clips, seed=6))
    assert np.abs(other.xy - table.xy).max() > 3


def test_a_summary_against_plain_loops():
    rng = np.random.default_rng(0)
    clips, chunks, frames = 5, 4, 3
    shape = (clips, chunks, frames)
    kind = rng.choice(["first", "cut", "jumping", "soft", "same"], size=shape[:2])
    hard = np.isin(kind, ["first", "cut", "jumping"])
    table = Table(
        valid=rng.random(shape) < 0.8,
        fit=rng.random(shape),
        texture=rng.random(shape),
        xy=rng.random((*shape, 2)),
        leap=np.where(hard[..., None], np.nan, 10 * rng.random(shape)),
        motion=rng.random(shape[:2]) < 0.5,
        steps=rng.integers(1, 5, size=shape[:2]),
        kind=kind,
        hard=hard,
    )
    places = [(b, n) for b in range(clips) for n in range(chunks)]
    easy = [p for p in places if kind[p] in ("soft", "same")]

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    expected = {
        "hard": 1 - len(easy) / len(places),
        "steps": mean(table.steps[p] for p in places),
        "steps_easy": mean(table.steps[p] for p in easy),
        "steps_hard": mean(table.steps[p] for p in places if p not in easy),
        "valid": mean(table.valid[(*p, f)] for p in places for f in range(frames)),
        "valid_easy": mean(table.valid[(*p, f)] for p in easy for f in range(frames)),
        "valid_hard": mean(table.valid[(*p, f)] for p in places if p not in easy for f in range(frames)),
        "clip": mean(all(table.valid[b, n, f] for n in range(chunks) for f in range(frames)) for b in range(clips)),
        "motion": mean(table.motion[p] for p in places),
        "mse": mean(table.fit[(*p, f)] for p in places for f in range(frames)),
        "texture": mean(table.texture[(*p, f)] for p in places for f in range(frames)),
        "steady": mean(table.leap[(*p, f)] < 5 for p in easy for f in range(frames)),
    }
    assert mean_scores(table) == pytest.approx(expected)


def test_quality_of_clips_without_easy_chunks_is_nan_where_there_is_nothing():
    frames = np.zeros((1, 3, 64, 64, 3), np.uint8)
    found = mean_scores(tabulate([[RED]], EvalRollouts(frames, np.array([[2]]), np.full((1, 1, 3), np.nan))))
    assert found["valid"] == 0 and found["steps"] == found["steps_hard"] == 2 and found["hard"] == 1
    assert all(math.isnan(found[name]) for name in ("steps_easy", "valid_easy", "steady"))
