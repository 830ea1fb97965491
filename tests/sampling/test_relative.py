"""`Relative`: the rule against Algorithm 1 as it is written down, on made-up confidences and on those of real runs."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import Confidence, Fixed, Pipeline, Relative
from dsa_engine.engine.batch_runner import BatchRunner
from dsa_engine.kernel_types import REDUCE as NAMES
from dsa_engine.kernel_types import StopRule
from dsa_engine.ops.reference import reduce_confidence, stop_flags
from dsa_engine.sampling.policy import REDUCE
from tests.support.graph_pools import FRAMES, SIZE, pool, random_model

RED, BLUE = "a red circle moves sideways", "a blue square jumps on navy"
LIMIT = 4
EXACT = {"min": min, "mean": lambda values: sum(map(Fraction, values)) / len(values), "max": max}


def algorithm_1(confidence, reduce="min", min_steps=1, max_steps=LIMIT, resets=()):
    """Steps of each chunk. confidence: per chunk and step one value per frame, as far as it was seen; resets: chunks
    that are compared with 1. One step more than was seen where the chunk was to go on."""
    counts, previous = [], 1.0
    for chunk, steps in enumerate(confidence):
        previous = 1.0 if chunk in resets else previous
        for step, values in enumerate(steps, 1):
            value = EXACT[reduce](values)
            if step == max_steps or (step >= min_steps and not value < previous):
                break
        else:
            step += 1
        previous = value
        counts.append(step)
    return counts


@pytest.mark.parametrize(
    "policy, expected",
    [
        (Relative(), [4, 1, 4, 2, 4]),
        (Relative(min_steps=2), [4, 2, 4, 2, 4]),
        (Relative(max_steps=3), [3, 1, 3, 2, 3]),
        (Relative(frame_reduce="max"), [4, 3, 3, 4, 2]),
        (Relative(frame_reduce="mean"), [4, 2, 3, 3, 4]),
    ],
)
def test_a_table_by_hand(policy, expected):
    """Two frames. By the least: the first chunk is left at .6, so .6 of the second is enough, then .55 is not."""
    table = [
        [[0.1, 0.2], [0.3, 0.5], [0.5, 0.6], [0.6, 0.88]],
        [[0.6, 0.7], [0.7, 0.8], [0.8, 0.95], [0.9, 0.95]],
        [[0.4, 0.5], [0.5, 0.9], [0.55, 0.97], [0.55, 0.85]],
        [[0.5, 0.6], [0.6, 0.9], [0.7, 0.95], [0.8, 0.9]],
        [[0.3, 0.4], [0.4, 0.97], [0.5, 0.99], [0.55, 0.99]],
    ]
    options = policy.frame_reduce, policy.min_steps, policy.max_steps or LIMIT
    assert algorithm_1(table, *options) == expected == by_host(policy, table)


def by_host(policy, table):
    """As `denoise_chunk` and `Rollout` ask it."""
    policy, counts = policy.start(LIMIT), []
    for chunk, steps in enumerate(table):
        if chunk:
            policy.follow(table[chunk - 1][counts[-1] - 1])
        counts.append(next(k for k, c in enumerate(steps, 1) if k == LIMIT or policy.should_stop(chunk, k, c, LIMIT)))
    return counts


@cache
def inputs():
    return pool(*random_model(dim=64, ffn_dim=96, num_heads=2, text_len=12), 4)[1]


SLOTS = [2, 0, 3, 1]


def by_device(policies, table):
    """Steps [chunks, rows] by the parameters that the device reads and the rule that its kernels follow; table [chunks,
    steps, rows, frames]."""
    runner, slot, counts = inputs(), torch.tensor(SLOTS[: len(policies)]), []
    before = torch.ones_like(table[0, 0])
    for chunk, steps in enumerate(table):
        noise = torch.zeros(len(policies), LIMIT, FRAMES, 16, SIZE, SIZE)
        rules = [policy.rule(chunk, LIMIT) for policy in policies]
        runner.start_chunk(slot, noise, [0.9, 0.7, 0.5, 0.3], rules, before)
        params = [x[slot] for x in (runner.min_steps, runner.max_steps, runner.reduce, runner.threshold)]
        taken = [torch.full((len(policies),), k, dtype=torch.int32) for k in range(1, LIMIT + 1)]
        flags = torch.stack([stop_flags(c, StopRule(k, *params)) for k, c in zip(taken, steps)])
        last = flags.int().argmax(0)
        counts.append((last + 1).tolist())
        before = steps[last, range(len(policies))]
    return counts


@st.composite
def rules(draw):
    low = draw(st.integers(1, LIMIT))
    high = draw(st.one_of(st.none(), st.integers(low, LIMIT)))
    return Relative(low, high, draw(st.sampled_from(NAMES)))


@given(st.lists(rules(), min_size=1, max_size=4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_host_and_device_follow_algorithm_1(policies, frames, random):
    """Rows with rules of their own; few values, so that many are equal, also as means."""
    shape = 6, LIMIT, len(policies), frames
    table = torch.tensor([random.randint(0, 8) / 8 for _ in range(torch.Size(shape).numel())]).view(shape)
    device = by_device(policies, table)
    for row, policy in enumerate(policies):
        seen = table[:, :, row].tolist()
        expected = algorithm_1(seen, policy.frame_reduce, policy.min_steps, policy.max_steps or LIMIT)
        assert by_host(policy, seen) == expected == [counts[row] for counts in device]


def test_a_chunk_starts_without_a_wait_for_the_device(monkeypatch):
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("the host reads a tensor"))
    noise, confidence = torch.zeros(1, LIMIT, FRAMES, 16, SIZE, SIZE), torch.tensor([[0.75, 0.25]])
    inputs().start_chunk(torch.tensor([1]), noise, [1.0], [Relative(frame_reduce="mean").rule(1, LIMIT)], confidence)
    monkeypatch.undo()
    assert inputs().threshold[1].item() == 0.5


def test_rows_with_a_threshold_keep_theirs():
    table = torch.rand(5, LIMIT, 3, 2)
    policies = [Confidence(0.3), Relative(), Fixed(2)]
    mixed, own = by_device(policies, table), by_device(policies[:1], table[:, :, :1])
    assert [counts[0] for counts in mixed] == [counts[0] for counts in own]
    assert [counts[1] for counts in mixed] == algorithm_1(table[:, :, 1].tolist())
    assert [counts[2] for counts in mixed] == [2] * 5


@pytest.mark.parametrize("frames", range(1, 9))
def test_the_host_reduces_to_the_devices_bits(frames):
    confidence = torch.rand(100, frames)
    for index, name in enumerate(NAMES):
        device = reduce_confidence(confidence, torch.full((100,), index, dtype=torch.int32))
        assert [REDUCE[name](values) for values in confidence.tolist()] == device.tolist()


def test_the_first_chunk_takes_all_steps_unless_it_is_certain():
    nearly = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    assert by_host(Relative(), [[[nearly]] * 4]) == [4] == by_device([Relative()], torch.full((1, 4, 1, 1), nearly))[0]
    assert by_host(Relative(), [[[nearly], [1.0]]]) == [2]


# ---- sessions of an untrained model, whose confidences are as good as random -----------------------------------------


@pytest.fixture(scope="module")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, max_sessions=6)


def take(session, n, seen=None):
    """Steps and confidences of the next chunks. seen: gets the confidences of every step, a list for each chunk."""

    def look(step):
        if step.index == 1:
            seen.append([])
        seen[-1].append(step.confidence[0].tolist())

    chunks = [session.next_chunk(None if seen is None else look) for _ in range(n)]
    return [(chunk.steps, chunk.confidence) for chunk in chunks]


def counts(made):
    return [steps for steps, _ in made]


@pytest.mark.parametrize("plain", [False, True], ids=["plan", "plain loop"])
@pytest.mark.parametrize("policy", [Relative(), Relative(2, 3), *(Relative(frame_reduce=r) for r in ("mean", "max"))])
def test_a_session_follows_algorithm_1(pipe, policy, plain):
    """On the confidences that it has seen; and without a look at them it takes the same steps."""
    seen = []
    with pipe.session(RED, seed=3, step_policy=policy) as session:
        session.rollout.inputs = None if plain else session.rollout.inputs
        made = take(session, 8, seen)
        session.reset()
        assert take(session, 8) == made
    options = policy.frame_reduce, policy.min_steps, policy.max_steps or LIMIT
    assert counts(made) == algorithm_1(seen, *options) and len(set(counts(made))) > 1


@pytest.mark.parametrize("transition", [0, 3])
@pytest.mark.parametrize("how", ["keep", "reset"])
def test_a_prompt_switch_keeps_or_resets_and_counts_once(pipe, how, transition):
    seen = []
    with pipe.session(RED, seed=2, step_policy=Relative(on_prompt_switch=how)) as session:
        made = take(session, 4, seen)
        session.update(BLUE, transition_chunks=transition)
        with pytest.raises(ZeroDivisionError):  # another try at the first chunk is no second switch
            session.next_chunk(lambda step: 1 / 0)
        made += take(session, 1, seen)
        snapshot = session.snapshot()
        rest = take(session, 5, seen)
        session.restore(snapshot)
        assert take(session, 5) == rest
    assert counts(made + rest) == algorithm_1(seen, resets=[4] if how == "reset" else ())
    assert how == "keep" or made[4][0] == LIMIT


def test_the_two_ways_of_a_switch_differ(pipe):
    """Else the test above would prove little."""
    after = {}
    for how in ("keep", "reset"):
        with pipe.session(RED, seed=2, step_policy=Relative(on_prompt_switch=how)) as session:
            take(session, 4)
            session.update(BLUE)
            after[how] = counts(take(session, 2))
    assert after["keep"] != after["reset"]


@pytest.mark.parametrize("bad", [1, 2])
def test_a_failed_chunk_is_compared_with_the_same_value_again(pipe, bad):
    def fail(step):
        if step.index == bad:
            raise ZeroDivisionError

    with (
        pipe.session(RED, seed=3, step_policy="relative") as calm,
        pipe.session(RED, seed=3, step_policy="relative") as hurt,
    ):
        expected, made = take(calm, 6), []
        for count, _ in expected:
            if count >= bad:
                with pytest.raises(ZeroDivisionError):
                    hurt.next_chunk(fail)
            made += take(hurt, 1)
    assert made == expected


def test_a_snapshot_carries_it_into_another_session(pipe):
    with pipe.session(RED, seed=3, step_policy="relative") as one, pipe.session(BLUE, seed=8) as other:
        take(one, 3)
        take(other, 2)
        snapshot = one.snapshot()
        rest = take(one, 5)
        other.restore(snapshot)
        assert take(other, 5) == rest
        one.restore(snapshot)
        assert take(one, 5) == rest


def test_a_slot_that_is_used_again_begins_at_one(untrained):
    pipe = Pipeline.from_pretrained(untrained, device="cpu", max_sessions=1)
    made = []
    for _ in range(2):
        with pipe.session(RED, seed=3, step_policy="relative") as session:
            made.append(take(session, 4))
    assert made[0] == made[1] and made[0][0][0] == LIMIT


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_sessions_that_share_forwards_keep_their_own(pipe, capacity):
    kinds = ["relative", "relative:mean", Relative(on_prompt_switch="reset"), Confidence(0.1)]

    def opened():
        return [pipe.session(RED, seed=i, step_policy=kind, num_frames=18) for i, kind in enumerate(kinds)]

    alone = []
    for session in opened():
        with session:
            alone.append(counts(take(session, 6)))
    sessions, runner = opened(), BatchRunner(capacity)
    made = {id(session): [] for session in sessions}
    for session in sessions:
        runner.add(session)
    while len(runner):
        for session in runner.forward():
            made[id(session)].append(session.finish().steps)
            if not session.exhausted:
                runner.add(session)
    for session in sessions:
        session.close()
    assert list(made.values()) == alone and len({tuple(row) for row in alone}) == len(kinds)


def test_a_batch_of_clips_is_the_sessions(pipe):
    made = pipe([RED, BLUE, RED], seed=5, num_frames=18, step_policy="relative", output_type="latent")
    for row, prompt in enumerate((RED, BLUE, RED)):
        with pipe.session(prompt, seed=5 + row, step_policy="relative", num_frames=18) as session:
            assert made.steps_per_chunk[row] == counts(take(session, 6))


def test_a_chunk_that_counts_needs_its_confidence(pipe):
    with pipe.session(RED, seed=3, step_policy="relative") as session:
        made = session.rollout.denoise()
        with pytest.raises(ValueError, match="confidence=None: Relative"):
            session.rollout.accept(made.latents)
        session.rollout.accept(made.latents, made.confidence)
        assert session.rollout.exit_confidence.equal(made.confidence)
