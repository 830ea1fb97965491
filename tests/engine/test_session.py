"""Sessions: alone or interleaved, saved or restored, failed or not, a stream gives the same bits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_engine import Budget, Confidence, Fixed
from dsa_engine.engine.batch_runner import BatchRunner

RED, BLUE = "a red circle moves sideways", "a blue square jumps on navy"
POLICY = Confidence(0.1)


def same(one, other) -> bool:
    return (
        one.index == other.index
        and one.steps == other.steps
        and one.confidence == other.confidence
        and one.pts == other.pts
        and one.latents.equal(other.latents)
        and np.array_equal(one.frames, other.frames)
    )


def take(session, n):
    return [session.next_chunk() for _ in range(n)]


@pytest.fixture(scope="module")
def alone(pipe):
    """Seven chunks of two streams, each made with nothing beside it; the second changes its prompt after four."""
    with pipe.session(RED, seed=1, step_policy=POLICY) as session:
        first = take(session, 7)
    with pipe.session(BLUE, seed=2, step_policy=Fixed(3)) as session:
        second = take(session, 4)
        session.update(RED)
        second += take(session, 3)
    return first, second


def test_the_streams_of_this_file_exercise_several_step_counts(alone):
    assert len({chunk.steps for chunk in alone[0]}) >= 2


@settings(max_examples=8)
@given(st.permutations([0] * 7 + [1] * 7))
def test_any_interleaving_gives_each_session_the_bits_it_gives_alone(pipe, alone, order):
    with pipe.session(RED, seed=1, step_policy=POLICY) as a, pipe.session(BLUE, seed=2, step_policy=Fixed(3)) as b:
        got = ([], [])
        for which in order:
            if which and len(got[1]) == 4:
                b.update(RED)
            got[which].append((a, b)[which].next_chunk())
    for mine, expected in zip(got, alone):
        assert all(map(same, mine, expected))


@pytest.mark.parametrize("commit", ["clean", "exit_step"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_restore_repeats_the_chunks_bit_for_bit(pipe, after, commit):
    with pipe.session(RED, seed=3, step_policy=POLICY, commit=commit) as session:
        take(session, after)
        snapshot = session.snapshot()
        first = take(session, 4)
        session.update(BLUE)
        take(session, 2)
        session.restore(snapshot)
        assert session.prompt == RED
        assert all(map(same, take(session, 4), first))
        session.restore(snapshot)  # a snapshot is not used up
        assert all(map(same, take(session, 4), first))


def test_a_snapshot_moves_to_another_session(pipe):
    with pipe.session(RED, seed=3, step_policy=POLICY) as one, pipe.session(BLUE, seed=8) as other:
        take(one, 2)
        take(other, 3)
        other.restore(one.snapshot())
        assert all(map(same, take(one, 3), take(other, 3)))


def test_a_snapshot_before_a_pending_switch_keeps_the_switch(pipe):
    with pipe.session(RED, seed=3, step_policy=POLICY) as session:
        take(session, 2)
        session.update(BLUE)
        snapshot = session.snapshot()
        expected = take(session, 2)
        session.restore(snapshot)
        assert all(map(same, take(session, 2), expected))


def test_a_snapshot_of_another_shape_is_refused(pipe):
    with pipe.session(RED, window=9) as one, pipe.session(RED, window=6) as other:
        with pytest.raises(ValueError, match="same model, size and window"):
            other.restore(one.snapshot())


def test_reset_starts_over(pipe, alone):
    with pipe.session(RED, seed=1, step_policy=POLICY) as session:
        take(session, 5)
        session.reset()
        assert all(map(same, take(session, 7), alone[0]))


def test_update_shows_from_the_next_chunk_on_and_only_then(pipe):
    with pipe.session(RED, seed=1) as session, pipe.session(RED, seed=1) as other:
        assert all(map(same, take(session, 2), take(other, 2)))
        session.update(BLUE)
        changed, unchanged = session.next_chunk(), other.next_chunk()
        assert (changed.prompt, unchanged.prompt) == (BLUE, RED)
        assert not changed.latents.equal(unchanged.latents)


class Boom(Exception):
    pass


def failing_once(function, at: int):
    """The function, but its call number `at` raises."""
    calls = iter(range(10**9))

    def wrapper(*args, **kwargs):
        if next(calls) == at:
            raise Boom
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("at", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("switch", [False, True])
def test_a_failed_forward_leaves_the_session_as_it_was(pipe, monkeypatch, at, switch):
    """Whichever forward fails, in commit, recache or denoising: the second try gives what a first would have."""
    with (
        pipe.session(RED, seed=1, step_policy=Fixed(4)) as quiet,
        pipe.session(RED, seed=1, step_policy=Fixed(4)) as hurt,
    ):
        take(quiet, 4)
        take(hurt, 4)
        if switch:
            quiet.update(BLUE)
            hurt.update(BLUE)
        with monkeypatch.context() as patch:
            block = pipe.engine.dit.blocks[1]
            patch.setattr(block, "forward", failing_once(block.forward, at))
            try:
                hurt.next_chunk()
            except Boom:
                pass
            else:
                assert not switch and at > 4 or switch and at > 6  # fewer forwards than that were made
                return
        assert hurt.index == 4
        assert all(map(same, take(hurt, 3), take(quiet, 3)))


def test_a_failed_decode_leaves_the_session_as_it_was(pipe, monkeypatch, alone):
    with pipe.session(RED, seed=1, step_policy=POLICY) as session:
        take(session, 2)
        with monkeypatch.context() as patch:
            decoder = pipe.engine.decoder
            patch.setattr(decoder, "decode", failing_once(decoder.decode, 0))
            with pytest.raises(Boom):
                session.next_chunk()
        assert all(map(same, take(session, 5), alone[0][2:]))


def test_a_bad_prompt_changes_nothing(pipe, alone):
    with pipe.session(RED, seed=1, step_policy=POLICY) as session:
        take(session, 3)
        with pytest.raises(ValueError, match="nearest"):
            session.update("a purple elephant dances")
        assert session.prompt == RED
        assert all(map(same, take(session, 4), alone[0][3:]))


def test_a_finished_or_closed_session_says_so(pipe):
    session = pipe.session(RED, num_frames=6)
    assert [session.exhausted for _ in range(1)] == [False]
    take(session, 2)
    assert session.exhausted
    with pytest.raises(RuntimeError, match="complete"):
        session.next_chunk()
    session.close()
    session.close()
    for call in (session.next_chunk, session.snapshot, session.reset, lambda: session.update(RED)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_slots_are_given_back(pipe):
    """More sessions than slots, one after another; too many at once are refused, and a closed one makes room."""
    for _ in range(2 * pipe.engine.max_sessions):
        pipe.session(RED, window=12).close()
    sessions = [pipe.session(RED, window=12) for _ in range(pipe.engine.max_sessions)]
    with pytest.raises(RuntimeError, match="max_sessions"):
        pipe.session(RED, window=12)
    sessions[1].close()
    sessions[1] = pipe.session(RED, window=12)
    for session in sessions:
        session.close()


def test_pools_that_nobody_uses_are_dropped(pipe):
    with pipe.session(RED, window=9) as kept:
        for window in range(10, 20):
            pipe.session(RED, window=window).close()
        one_more = pipe.session(RED, window=20)
        rings = [pool.cache.window for pool in pipe.engine._pools.values()]
        one_more.close()
        kept.next_chunk()
    assert sorted(rings) == [9, 20]


def test_leaving_a_stream_early_frees_its_slot(pipe):
    for _ in range(2 * pipe.engine.max_sessions):
        for chunk in pipe.stream(RED, num_frames=30, window=15):
            if chunk.index == 1:
                break
    pipe.session(RED, window=15).close()


def test_a_budget_reports_to_its_own_stream(pipe):
    impossible = Budget(1e9, ceiling=1.0)
    with (
        pipe.session(RED, seed=1, step_policy=impossible) as hurried,
        pipe.session(RED, seed=1, step_policy=Budget(1e-6, 1.0)) as calm,
    ):
        assert [c.steps for c in take(hurried, 5)][1:] == [1, 1, 1, 1]
        assert {c.steps for c in take(calm, 5)} == {4}
        hurried.reset()
        assert hurried.next_chunk().steps == 4  # a stream that starts over is not late
    assert impossible.lag == 0


def test_the_sessions_leave_the_global_random_state_alone(pipe):
    before = torch.random.get_rng_state()
    with pipe.session(RED, seed=1) as session:
        take(session, 2)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("recache", [True, False])
def test_a_change_over_several_chunks_is_that_of_the_embeddings_in_between(pipe, recache):
    """Against sessions that are told the mixed embeddings by hand, chunk by chunk."""
    before, after = (pipe.engine.encode([prompt]) for prompt in (RED, BLUE))
    with (
        pipe.session(RED, seed=1, step_policy=POLICY) as session,
        pipe.session(RED, seed=1, step_policy=POLICY) as other,
    ):
        for one in (session, other):
            take(one, 2)
        session.update(BLUE, recache, transition_chunks=3)
        for share in (1 / 3, 2 / 3, 1.0, None):
            if share is not None:
                mixed = after if share == 1.0 else before + share * (after - before)
                other.rollout.set_prompt(pipe.engine.text_kv(mixed), recache)
            made, expected = session.next_chunk(), other.next_chunk()
            assert (made.latents - expected.latents).abs().max() < 1e-5 and made.prompt == BLUE
        for one in (session, other):  # at once again
            one.update(RED)
        assert (session.next_chunk().latents - other.next_chunk().latents).abs().max() < 1e-5


def test_a_change_over_several_chunks_survives_snapshots_failures_and_resets(pipe, monkeypatch):
    with (
        pipe.session(RED, seed=1, step_policy=POLICY) as session,
        pipe.session(BLUE, seed=1, step_policy=POLICY) as other,
    ):
        take(session, 2)
        session.update(BLUE, transition_chunks=3)
        first = session.next_chunk()
        snapshot = session.snapshot()
        rest = take(session, 3)
        session.restore(snapshot)
        with monkeypatch.context() as patch:
            patch.setattr(pipe.engine.dit.blocks[1], "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.next_chunk()
        assert first.index == 2 and all(map(same, take(session, 3), rest))
        session.restore(snapshot)
        session.reset()  # the prompt in force is the one that it was changing to
        assert all(map(same, take(session, 3), take(other, 3)))


@pytest.mark.parametrize("wrong", [-1, 1.5, True])
def test_a_number_of_transition_chunks_is_checked(pipe, wrong):
    with pipe.session(RED, seed=1, step_policy=POLICY) as session:
        with pytest.raises(ValueError, match=f"transition_chunks.*nearest is {max(0, round(wrong))}"):
            session.update(BLUE, transition_chunks=wrong)
        assert session.prompt == RED


def test_a_chunk_that_is_handed_over_is_decoded_in_any_thread_to_the_same_bits(pipe, alone):
    """Two sessions share a runner; each chunk is decoded in another thread while the other session's is denoised."""
    with pipe.session(RED, seed=1, step_policy=POLICY) as one, pipe.session(BLUE, seed=2, step_policy=Fixed(3)) as two:
        made, runner = (
            {id(one): [], id(two): []},
            BatchRunner(1),
        )  # a row a forward, so that both get what they get alone
        with ThreadPoolExecutor(1) as decoder:
            waiting = {id(session): (session, None) for session in (one, two)}
            while any(len(chunks) < 4 for chunks in made.values()):
                for key, (session, decoded) in list(waiting.items()):
                    if decoded is not None:
                        made[key].append(decoded.result())
                    del waiting[key]
                    if len(made[key]) < 4:
                        runner.add(session)
                for session in runner.forward():
                    index = session.index
                    waiting[id(session)] = session, decoder.submit(session.detach_decode())
                    assert session.index == index + 1
        for chunks, expected in zip(made.values(), alone):
            for chunk, other in zip(chunks, expected[:4]):
                assert np.abs(chunk.frames.astype(int) - other.frames).max() <= 1  # commits alone, not with a step
                assert (chunk.index, chunk.pts, chunk.steps) == (other.index, other.pts, other.steps)
