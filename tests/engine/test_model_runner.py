"""Step inputs and their forward against the plain loop: the same bits row by row, the same numbers in any batch."""

from __future__ import annotations

import pytest
import torch

from dsa_engine import Change, Confidence, Fixed, PerChunk, Relative
from dsa_engine.config import RolloutConfig
from dsa_engine.engine.chunk_plan import RowSpec
from dsa_engine.engine.engine import Engine
from dsa_engine.models.confidence import HEADS, new_head
from dsa_engine.sampling.policy import ExitRule, Policy

SIZE, CHUNKS, FRAMES = 4, 5, 2


class Half(Policy):
    """One of a user's own, which a device cannot ask: it stops at the second step that is surer than the first."""

    signal = "confidence"

    def start(self, limit):
        self.first = None
        return super().start(limit)

    def check(self, limit):
        pass

    def should_stop(self, chunk, step, values, limit):
        self.first = min(values) if step == 1 else self.first
        return step == limit or (step > 1 and min(values) > self.first)


POLICIES = {
    "a policy of the user's": [Half(), Half(), Confidence(0.5)],
    "every count": [PerChunk([1, 2, 3, 4, 1]), PerChunk([4, 3, 2, 1, 2]), PerChunk([2, 4, 1, 3, 3])],
    "one count": [Fixed(3)] * 3,
    "confidence": [Confidence(0.5), Confidence(0.5, min_steps=2), Confidence(0.5, max_steps=3)],
    "the mean, the surest": [Confidence(0.5, frame_reduce="mean"), Confidence(0.55, frame_reduce="max"), Fixed(2)],
    "one never stops": [Confidence(1.0), Confidence(0.0), Confidence(0.5)],
    "relative": [Relative(), Relative(2, frame_reduce="mean"), Relative(max_steps=3, frame_reduce="max")],
    "relative beside a host's": [Relative(), Half(), Relative()],
    "change": [Change(0.5), Change(2.0, min_steps=2), Fixed(1)],
}


@pytest.fixture(params=HEADS)
def head(tiny_config, request):
    """Confidences on both sides of one half."""
    head = new_head(tiny_config, request.param).requires_grad_(False)
    last, std = (head.mlp[2], 1.0) if request.param == "pooled" else (head.out, 0.2)
    torch.nn.init.normal_(last.weight, std=std)
    return head


def rollouts(dit, head, policies, seeds, deterministic=False, **options):
    """One rollout of a row for each policy, all in one pool, as sessions are."""
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, **options)
    engine = Engine(dit, head, None, None, config, len(policies), deterministic)
    shape = engine._pool_shape(SIZE, SIZE, CHUNKS * FRAMES, config)
    inputs = engine._pool(shape, len(policies))
    inputs.cache.k.fill_(float("nan"))
    inputs.cache.v.fill_(float("nan"))
    made = []
    for row, (policy, seed) in enumerate(zip(policies, seeds)):
        embeds = torch.randn(1, 5 + row, 40, generator=torch.Generator().manual_seed(seed))
        roll = engine.rollout(
            embeds, height=SIZE, width=SIZE, frames=CHUNKS * FRAMES, policy=policy, seeds=[seed], config=config
        )
        roll.inputs, roll.cache, roll.slot = inputs, inputs.cache, inputs.cache.acquire(1)
        roll.slots = roll.slot.tolist()
        made.append(roll)
    return made


def together(dit, head, policies, **options):
    """The clips of some policies as one rollout."""
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, **{"commit": "exit_step", **options})
    engine = Engine(dit, head, None, None, config, len(policies), deterministic=True)
    embeds = torch.randn(len(policies), 12, 40, generator=torch.Generator().manual_seed(1))
    sizes = dict(height=SIZE, width=SIZE, frames=CHUNKS * FRAMES)
    return engine.rollout(embeds, policy=policies, seeds=range(len(policies)), config=config, **sizes)


def plain(roll, on_step=None):
    """The next chunk by `denoise_chunk`."""
    roll.inputs = None
    return roll.denoise(on_step)


def same(a, b):
    return a.latents.equal(b.latents) and a.steps == b.steps and a.confidence.equal(b.confidence)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("window, sink, commit", [(None, 0, "clean"), (6, 0, "clean"), (7, 3, "exit_step")])
def test_row_by_row_the_bits_are_those_of_the_plain_loop(tiny_dit, head, name, window, sink, commit):
    """Three sessions in one pool, whose prompts differ in length, each with its own policy."""
    options = dict(window=window, sink=sink, commit=commit)
    ours = rollouts(tiny_dit, head, POLICIES[name], [1, 2, 3], deterministic=True, **options)
    theirs = rollouts(tiny_dit, head, POLICIES[name], [1, 2, 3], **options)
    taken = set()
    for _ in range(CHUNKS):
        for a, b in zip(ours, theirs):
            made, expected = a.denoise(), plain(b)
            assert same(made, expected)
            taken.update(made.steps)
            a.accept(made.latents, made.confidence)
            b.accept(expected.latents, expected.confidence)
    assert name in ("one count", "change") or len(taken) > 1  # else nothing was decided


@pytest.mark.parametrize("name", ["every count", "confidence", "relative", "relative beside a host's", "change"])
def test_a_callback_sees_the_steps_of_the_plain_loop_and_changes_nothing(tiny_dit, head, close, name):
    """Three clips in step: each step's rows, level, input, estimate and confidence."""
    ours, theirs, silent = (together(tiny_dit, head, POLICIES[name]) for _ in range(3))
    for _ in range(CHUNKS):
        seen, expected = [], []
        made, other = ours.denoise(seen.append), plain(theirs, expected.append)
        assert made.steps == other.steps and same(made, silent.denoise())
        for a, b in zip(seen, expected, strict=True):
            assert (a.chunk, a.index, a.sigma, a.rows) == (b.chunk, b.index, b.sigma, b.rows)
            for name in ("x", "x0", "confidence"):
                close(getattr(a, name), getattr(b, name), 1e-4)
        for roll in (ours, theirs, silent):
            roll.accept(made.latents, made.confidence)


def test_a_callback_that_fails_can_be_tried_again(tiny_dit, head):
    """Also after the forward that has committed the previous chunk."""
    ours, theirs = (together(tiny_dit, head, [Fixed(2)] * 3, window=6, commit="clean") for _ in range(2))
    for index in range(CHUNKS):
        with pytest.raises(ZeroDivisionError):
            ours.denoise(lambda step, bad=1 + index % 2: 1 / 0 if step.index == bad else None)
        made, other = ours.denoise(), theirs.denoise()
        assert same(made, other)
        ours.accept(made.latents)
        theirs.accept(other.latents)


@pytest.mark.parametrize("window", [None, 5, 6])
def test_a_commit_that_rides_along_changes_nothing_but_rounding(tiny_dit, head, close, window):
    ours = rollouts(tiny_dit, head, [PerChunk([2, 1, 3, 1, 2])], [4], window=window)[0]
    theirs = rollouts(tiny_dit, head, [PerChunk([2, 1, 3, 1, 2])], [4], window=window)[0]
    sizes, forward = [], ours.inputs.forward
    ours.inputs.forward = lambda rows: sizes.append(len(rows)) or forward(rows)
    for _ in range(CHUNKS):
        made, expected = ours.denoise(), plain(theirs)
        close(made.latents, expected.latents, 1e-5)
        close(made.confidence, expected.confidence, 1e-4)
        ours.accept(expected.latents)
        theirs.accept(expected.latents)
    assert sizes == [1, 1, 2, 2, 1, 1, 2, 2, 1]  # one row more where a chunk begins, and no forward more than steps


def test_sessions_at_different_steps_and_positions_share_a_forward(tiny_dit, head, close):
    """Three sessions a chunk apart, driven by hand through common forwards, against each alone."""
    policies = [PerChunk([2, 3]), PerChunk([3, 2]), PerChunk([4, 1])]
    together, alone = (rollouts(tiny_dit, head, policies, [5, 6, 7], window=6) for _ in range(2))
    for late, (a, b) in enumerate(zip(together, alone)):
        for _ in range(late):
            made = b.denoise()
            b.accept(made.latents)
            a.denoise()
            a.accept(made.latents)
    inputs, plans = together[0].inputs, [list(roll.prepare_chunk()) for roll in together]
    while any(plans):
        forwards = [(roll, plan.pop(0)) for roll, plan in zip(together, plans) if plan]
        commits = [RowSpec(roll.slots[0], commit=True) for roll, forward in forwards if forward.commit]
        inputs.forward(commits + [RowSpec(roll.slots[0], ahead=forward.commit) for roll, forward in forwards])
        for roll, forward in forwards:
            roll.on_forward_done(forward, roll.slots)
    for a, b in zip(together, alone):
        made, expected = a.result(), b.denoise()
        assert made.steps == expected.steps
        close(made.latents, expected.latents, 1e-5)


def test_in_deterministic_mode_company_does_not_change_a_bit(tiny_dit, head):
    policies = [Confidence(0.5)] * 3
    crowd = rollouts(tiny_dit, head, policies, [1, 2, 3], deterministic=True, window=6)
    single = rollouts(tiny_dit, head, policies[:1], [1], deterministic=True, window=6)[0]
    inputs = crowd[0].inputs
    for _ in range(CHUNKS):
        for roll in crowd:
            roll.prepare_chunk()
        for step in range(4):
            commits = [RowSpec(r.slots[0], commit=True) for r in crowd if step == 0 and r.index]
            inputs.forward(commits + [RowSpec(r.slots[0], ahead=step == 0 and r.index > 0) for r in crowd])
        expected = single.denoise()
        index = crowd[0].slot
        assert inputs.x0[index].equal(expected.latents) and inputs.step[index].tolist() == expected.steps
        single.accept(expected.latents)
        for roll in crowd:
            roll.accept(inputs.x0[roll.slot].clone())


def test_a_row_that_has_stopped_stays_as_it_is(tiny_dit, head):
    """What a device-side loop relies on: it runs on until its last row has stopped, past the last level if it must."""
    roll = rollouts(tiny_dit, head, [Fixed(2)], [1])[0]
    made, inputs, slot = roll.denoise(), roll.inputs, roll.slot
    before = [t[slot].clone() for t in (inputs.x, inputs.x0, inputs.state, inputs.step)]
    with torch.inference_mode():
        for _ in range(4):
            inputs.forward([RowSpec(roll.slots[0])])
    assert all(t[slot].equal(b) for t, b in zip((inputs.x, inputs.x0, inputs.state, inputs.step), before))
    assert inputs.x0[slot].equal(made.latents)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.509, 1 / 3, 1.0, 0.0])
def test_the_devices_comparison_is_the_hosts(tiny_dit, threshold):
    """At the float32 numbers next to the threshold, `>=` says what Python's says of the float64 threshold."""
    inputs = rollouts(tiny_dit, None, [Fixed(1)], [1])[0].inputs
    inputs.start_chunk(
        torch.tensor([0]), torch.zeros(1, 1, FRAMES, 16, SIZE, SIZE), [1.0], [ExitRule(1, 4, "min", threshold)]
    )
    near = torch.tensor(threshold, dtype=torch.float32)
    for value in (torch.nextafter(near, torch.tensor(-1.0)), near, torch.nextafter(near, torch.tensor(2.0))):
        assert bool(value >= inputs.threshold[0]) == (value.item() >= threshold)


def test_a_chunk_begins_with_one_copy_of_what_the_host_knows(tiny_dit, monkeypatch):
    """Every field of every row, over what an earlier chunk left there; the other slots keep theirs."""
    inputs = rollouts(tiny_dit, None, [Fixed(1)] * 4, [1, 2, 3, 4])[0].inputs
    inputs.chunk_params.fill_(-1)
    sent, send = [], inputs._to_device
    monkeypatch.setattr(inputs, "_to_device", lambda host: sent.append(host) or send(host))
    rules = [ExitRule(1, 4, "mean", 0.3), ExitRule(2, 3, "max", 1.0), ExitRule(3, 3)]
    noise = torch.randn(3, 4, FRAMES, 16, SIZE, SIZE)
    inputs.start_chunk(torch.tensor([3, 0, 2]), noise, [0.9, 0.5, 0.1], rules)
    assert len(sent) == 1
    levels = torch.tensor([0.9, 0.5, 0.1, 0.0, 0.0])  # nothing comes after the last
    for slot, rule, own in zip((3, 0, 2), rules, noise):
        assert inputs.sigmas[slot].equal(levels) and inputs.threshold[slot] == torch.tensor(rule.threshold)
        counts = inputs.min_steps[slot], inputs.max_steps[slot], inputs.reduce[slot]
        assert [c.tolist() for c in counts] == [
            rule.min_steps,
            rule.max_steps,
            ["min", "mean", "max"].index(rule.reduce),
        ]
        assert inputs.noise[slot].equal(own) and inputs.x[slot].equal(own[0]) and inputs.step[slot] == 0
    assert inputs.min_steps.dtype == inputs.max_steps.dtype == inputs.reduce.dtype == torch.int32
    assert inputs.chunk_params[[1, 4]].eq(-1).all()


def test_the_bytes_of_a_pool_are_counted(tiny_dit):
    inputs = rollouts(tiny_dit, None, [Fixed(1)] * 2, [1, 2], window=6)[0].inputs
    latents = FRAMES * 16 * SIZE * SIZE * 4
    text = 3 * 2 * 12 * 96 * 4 + 8 + 4
    counters = 5 * 4 + 8 + (FRAMES + 1) * 4 + 3 * 4 + 4
    assert inputs.nbytes == 3 * ((2 + 4) * latents + text + counters)
