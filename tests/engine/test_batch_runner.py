"""Sessions run together against each alone: same steps, same frames, whatever comes and goes in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import Confidence, Fixed, PerChunk, Pipeline
from dsa_engine.engine import model_runner as inputs_module
from dsa_engine.engine.batch_runner import BatchRunner

PROMPTS = ["a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"]
POLICIES = [PerChunk([4, 1, 2, 3]), Confidence(0.5), PerChunk([1, 3, 1, 2])]


@pytest.fixture(scope="module", params=[False, True], ids=["batched", "deterministic"])
def pipe(request, untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=request.param, max_sessions=6)


def opened(pipe, which=range(3)):
    return [pipe.session(PROMPTS[i], seed=i, step_policy=POLICIES[i], num_frames=12) for i in which]


def in_plain_loops(sessions):
    """Sessions whose chunks `denoise_chunk` makes."""
    for session in sessions:
        session.rollout.inputs = None
    return sessions


@pytest.fixture(scope="module")
def alone(pipe):
    chunks = []
    for session in opened(pipe):
        with session:
            chunks.append([session.next_chunk() for _ in range(4)])
    return chunks


def check(pipe, made, expected):
    """Without determinism, by a level of the uint8 frames and 1e-4 of latents of variance one."""
    for a, b in zip(made, expected, strict=True):
        assert (a.index, a.steps, a.pts, a.prompt) == (b.index, b.steps, b.pts, b.prompt)
        if pipe.engine.deterministic:
            assert a.latents.equal(b.latents) and np.array_equal(a.frames, b.frames) and a.confidence == b.confidence
        else:
            assert (a.latents - b.latents).abs().max() < 1e-4
            assert np.abs(a.frames.astype(int) - b.frames).max() <= 1
            assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


@settings(max_examples=6)
@given(data=st.data(), capacity=st.sampled_from([1, 2, 3, 8]))
def test_together_they_make_what_each_makes_alone(pipe, alone, data, capacity):
    """Sessions ask for their chunks at random times; any capacity, down to one row, where commits go alone."""
    sessions, runner = opened(pipe), BatchRunner(capacity)
    made = {id(session): [] for session in sessions}
    waiting = list(sessions)
    while waiting or len(runner):
        for session in list(waiting):
            if data.draw(st.booleans()) or not len(runner):
                runner.add(session)
                waiting.remove(session)
        for session in runner.forward():
            made[id(session)].append(session.finish())
            if not session.exhausted:
                waiting.append(session)
    for session, expected in zip(sessions, alone):
        check(pipe, made[id(session)], expected)
        session.close()


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_a_past_that_is_made_anew_shares_the_forwards(pipe, capacity):
    """All switch their prompt before their third chunk and again before their fourth; against the plain loop, which
    replays each past by itself. Two chunks are replayed, then three (the window), the last with the first step."""
    sessions, plain = opened(pipe), in_plain_loops(opened(pipe))
    runner, forwards = BatchRunner(capacity), 0
    made = {id(session): [] for session in sessions}
    for index in range(4):
        for i, session in enumerate(sessions):
            if index >= 2:
                session.update(PROMPTS[(i + index) % 3])
            runner.add(session)
        while len(runner):
            forwards += index == 3
            for session in runner.forward():
                made[id(session)].append(session.finish())
    for i, (session, other) in enumerate(zip(sessions, plain)):
        expected = []
        for index in range(4):
            if index >= 2:
                other.update(PROMPTS[(i + index) % 3])
            expected.append(other.next_chunk())
        check(pipe, made[id(session)], expected)
        session.close()
        other.close()
    if capacity == 8:
        assert forwards == 2 + max(made[id(session)][3].steps for session in sessions)


@pytest.mark.parametrize("fault", [0, 1, 2])
def test_a_replay_that_is_given_up_in_the_middle_is_begun_again(pipe, fault):
    """After `fault` forwards of a chunk whose past is replayed the session is taken away and comes back."""
    (session,), (plain,) = opened(pipe, [0]), in_plain_loops(opened(pipe, [0]))
    for one in (session, plain):
        for _ in range(3):
            one.next_chunk()
        one.update(PROMPTS[1])
    runner = BatchRunner()
    runner.add(session)
    for _ in range(fault):
        runner.forward()
    runner.remove(session)
    runner.add(session)
    while not (done := runner.forward()):
        pass
    check(pipe, [done[0].finish()], [plain.next_chunk()])
    session.close()
    plain.close()


def test_one_that_stops_early_makes_room_at_once(pipe):
    """Capacity 2, three first chunks of 1, 2 and 2 steps: the third starts in the forward after the first is done."""
    sessions = [pipe.session(PROMPTS[i], seed=i, step_policy=Fixed(n)) for i, n in enumerate((1, 2, 2))]
    runner, done = BatchRunner(capacity=2), []
    for session in sessions:
        runner.add(session)
    while len(runner):
        done.append([sessions.index(session) for session in runner.forward()])
    assert sum(map(len, done)) == 3 and 0 in done[0] and len(done) == 3  # five steps of two a forward
    for session in sessions:
        session.close()


@pytest.mark.parametrize("policy", [Confidence(0.5), PerChunk([3, 1, 2, 2])], ids=str)
def test_a_forward_asks_the_device_once_whoever_is_in_it(pipe, monkeypatch, policy):
    """Six sessions: one read of all stop flags after each forward that decides, none after others, and no session is
    asked by itself."""
    sessions = [pipe.session(PROMPTS[i % 3], seed=i, step_policy=policy, num_frames=12) for i in range(6)]
    runner, reads, numbers, deciding = BatchRunner(12), [], [], 0
    read, tolist = inputs_module.read, torch.Tensor.tolist
    monkeypatch.setattr(inputs_module, "read", lambda x: reads.append(x.shape) or read(x))
    for _ in range(4):
        for session in sessions:
            runner.add(session)
        while len(runner):
            deciding += any(chunk.forward.decide for chunk in runner._active.values())
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.Tensor, "tolist", lambda x: tolist(x.is_floating_point() and numbers.append(x) or x)
                )
                made = runner.forward()
            for session in made:
                session.finish()
    assert len(reads) == deciding and (deciding > 0) == isinstance(policy, Confidence)
    assert reads == [(pipe.engine.max_sessions + 1, 4)] * deciding
    assert [x.shape for x in numbers] == reads  # no other confidences or flags are told to the host
    for session in sessions:
        session.close()


def test_a_session_that_leaves_in_the_middle_disturbs_nobody(pipe, alone):
    stays, leaves = opened(pipe, [0, 1])
    runner = BatchRunner()
    for session in (stays, leaves):
        runner.add(session)
    runner.forward()
    runner.remove(leaves)
    leaves.close()
    made = []
    while len(made) < 4:
        finished = runner.forward()
        made += [session.finish() for session in finished]
        if finished and len(made) < 4:
            runner.add(stays)
    check(pipe, made, alone[0])
    stays.close()


def test_a_failed_forward_can_be_tried_again(pipe, alone, monkeypatch):
    [session] = opened(pipe, [0])
    made = [session.next_chunk()]
    runner = BatchRunner()
    runner.add(session)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.engine.dit.blocks[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.forward()
    while len(made) < 4:
        for session in runner.forward():
            made.append(session.finish())
            if not session.exhausted:
                runner.add(session)
    check(pipe, made, alone[0])
    session.close()


def test_what_cannot_be_added_says_why(pipe):
    runner, first, other = BatchRunner(), *opened(pipe, [0, 1])
    wide = pipe.session(PROMPTS[2], window=12)
    runner.add(first)
    with pytest.raises(ValueError, match="already waits or runs"):
        runner.add(first)
    with pytest.raises(ValueError, match="another engine, size or window"):
        runner.add(wide)
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.add(other)
    assert len(runner) == 1
    for session in (first, wide):
        session.close()


def test_an_empty_runner_has_nothing_to_do():
    assert BatchRunner().forward() == []
