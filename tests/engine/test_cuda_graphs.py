"""CUDA graphs of plans: replays on a stand-in for CUDA and on a GPU give the bits of eager forwards."""

from __future__ import annotations

import pytest
import torch

from dsa_engine import Change, Confidence, Fixed, PerChunk
from dsa_engine.engine import device_loop
from dsa_engine.engine.chunk_plan import RowSpec
from dsa_engine.engine.cuda_graphs import GraphKey, GraphRunner
from tests.support.graph_pools import (
    CHUNKS,
    FRAMES,
    POLICIES,
    assert_alike,
    chunk,
    eager,
    pool,
    random_model,
    rollout,
    same,
)


@pytest.mark.parametrize(
    "name, loop_rows, window, commit",
    [
        ("every count", 0, 6, "clean"),
        ("every count", 8, 6, "clean"),
        ("known counts, two rows", 8, 6, "clean"),
        ("counts that differ, three rows", 0, 6, "clean"),
        ("counts that differ, three rows", 8, 6, "clean"),
        ("counts that differ, three rows", 8, None, "exit_step"),
        ("confidence", 0, 6, "clean"),
        ("confidence", 8, None, "clean"),
        ("confidence, three rows", 0, 6, "exit_step"),
        ("confidence, three rows", 8, 6, "clean"),
        ("confidence, three rows", 8, None, "exit_step"),
        ("one never stops", 8, 6, "clean"),
        ("relative", 0, 6, "clean"),
        ("relative", 8, 6, "clean"),
        ("relative, three rows", 0, 6, "exit_step"),
        ("relative, three rows", 8, 6, "clean"),
        ("five rows", 8, 6, "clean"),
    ],
)
def test_the_bits_are_those_of_the_eager_executor(cuda, model, captured, name, loop_rows, window, commit):
    """Chunk after chunk, merged commits and not; 3 and 5 rows fill up batches of 4 and 8."""
    policies = POLICIES[name]
    engine, made = captured(len(policies), loop_rows, window)
    _, theirs = pool(*model, len(policies), window=window)
    a, b = rollout(engine, made.inputs, policies, commit), rollout(engine, theirs, policies, commit)
    for index in range(CHUNKS):
        cuda.launches = cuda.reads = 0
        got, forwards = chunk(a, made, on_device=True)
        reads = cuda.reads
        expected, expected_forwards = chunk(b)
        assert forwards == expected_forwards and got.steps == expected.steps
        assert got.latents.equal(expected.latents) and got.confidence.equal(expected.confidence)
        assert_alike(made.inputs, theirs)
        assert forwards[0][0].commit == (index > 0 and commit == "clean")
        decided = sum(node.decide for node, _ in forwards)
        assert reads == (min(decided, 1) if loop_rows else decided)
        if decided and loop_rows or not decided and len(policies) == 1:
            assert cuda.launches == 1
        else:  # a step at a time, up to a first decision that is not
            assert cuda.launches == len(forwards) or len(policies) == 1


@pytest.mark.parametrize("loop_rows, window, commit", [(0, 6, "clean"), (8, 6, "clean"), (8, None, "exit_step")])
def test_a_token_heads_taps_are_captured(cuda, loop_rows, window, commit):
    """Three rows that stop apart, with merged commits: the bits of the eager executor."""
    model = random_model("token", dim=64, ffn_dim=96, num_heads=2, text_len=12)
    (engine, ours), (_, theirs) = (pool(*model, 3, window=window) for _ in range(2))
    made = GraphRunner(ours, (4,), loop_rows=loop_rows)
    made.capture()
    policies = [Confidence(0.5), Confidence(0.55, min_steps=2), Confidence(0.45, max_steps=3)]
    a, b = rollout(engine, ours, policies, commit), rollout(engine, theirs, policies, commit)
    counts = set()
    for _ in range(CHUNKS):
        (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
        assert forwards == expected_forwards and got.steps == expected.steps
        assert got.latents.equal(expected.latents) and got.confidence.equal(expected.confidence)
        assert_alike(ours, theirs)
        counts.update(got.steps)
    assert len(counts) > 2


@pytest.mark.parametrize("loop_rows", [0, 1])
def test_for_one_row_the_bits_are_the_same_in_batches_too(cuda, model, loop_rows):
    """The commit and the first step are one batch here: not in deterministic mode."""
    (engine, ours), (_, theirs) = (pool(*model, 1, deterministic=False) for _ in range(2))
    made = GraphRunner(ours, (1,), loop_rows=loop_rows)
    made.capture()
    a, b = (rollout(engine, inputs, [Confidence(0.5, min_steps=2)]) for inputs in (ours, theirs))
    for _ in range(CHUNKS):
        (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
        assert forwards == expected_forwards and got.latents.equal(expected.latents)
        assert_alike(ours, theirs)


def test_one_capture_serves_all_sessions_of_a_pool(cuda, model):
    """Three that take turns, and one more, after another capture, in a slot that was given back."""
    (engine, ours), (_, theirs) = (pool(*model, 4) for _ in range(2))
    made = GraphRunner(ours, (1,), loop_rows=1)
    made.capture()
    rolls = [[rollout(engine, inputs, [Confidence(0.5)]) for _ in range(3)] for inputs in (ours, theirs)]
    for turn in range(2):
        for a, b in zip(*rolls):
            (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
            assert forwards == expected_forwards and got.latents.equal(expected.latents)
        if turn == 0:
            for group, inputs in zip(rolls, (ours, theirs)):
                first, gone, last = group
                gone.close()
                group[:] = last, first, rollout(engine, inputs, [Confidence(0.4)])
                assert group[-1].slots == [1]
            made.capture()


def test_all_counts_are_taken_and_rows_stop_apart(cuda, model):
    """Else the test above would prove little."""
    counts = set()
    for policies in POLICIES.values():
        engine, inputs = pool(*model, len(policies))
        roll = rollout(engine, inputs, policies)
        counts.update(tuple(chunk(roll)[0].steps) for _ in range(CHUNKS))
    assert {count for row in counts for count in row} == {1, 2, 3, 4}
    assert sum(len(set(row)) > 1 for row in counts) >= 6 and any(len(set(row)) == 3 for row in counts)


def test_a_batch_with_rows_that_fill_it_up_differs_by_rounding_alone(cuda, model, close):
    """Not in deterministic mode: products see all rows at once. Against the plain loop, which knows no graphs."""
    policies = [PerChunk([2, 1, 3, 2]), PerChunk([1, 4, 2, 2]), PerChunk([3, 2, 2, 1])]
    (engine, ours), (_, theirs) = (pool(*model, 3, deterministic=False) for _ in range(2))
    made = GraphRunner(ours, (1, 4), loop_rows=4)
    made.capture()
    a, b = rollout(engine, ours, policies), rollout(engine, theirs, policies)
    for on_device in (True, False, True, False):
        got, _ = chunk(a, made, on_device)
        expected = b.denoise(on_step=lambda step: None)
        b.accept(expected.latents)
        assert got.steps == expected.steps
        close(got.latents, expected.latents, 1e-4)
        a.past[-1] = b.past[-1]


def test_a_host_policy_is_asked_after_every_replay(cuda, model, captured):
    """No device can judge a change: no loop, though there is one."""
    policies = [Change(0.5), Change(2.0, min_steps=2), Fixed(1)]
    engine, made = captured(3, 8)
    _, theirs = pool(*model, 3)
    a, b = rollout(engine, made.inputs, policies), rollout(engine, theirs, policies)
    for _ in range(CHUNKS):
        cuda.launches = 0
        (got, forwards), (expected, _) = chunk(a, made), chunk(b)
        assert got.steps == expected.steps and got.latents.equal(expected.latents)
        assert cuda.launches == len(forwards)


MIXED = [RowSpec(0, commit=True), RowSpec(1, commit=True), RowSpec(0, ahead=True), RowSpec(1, ahead=True), RowSpec(2)]


def test_any_rows_share_a_forward(cuda, model, captured):
    """Two commits and three steps, as a scheduler mixes them, the steps alone, and a commit alone."""
    engine, made = captured(3, 0)
    _, theirs = pool(*model, 3)
    for inputs in (made.inputs, theirs):
        late, new = rollout(engine, inputs, [Fixed(3)] * 2), rollout(engine, inputs, [Fixed(3)])
        chunk(late)
        with torch.inference_mode():
            late.prepare_chunk()
            new.prepare_chunk()
    cuda.launches = 0
    with torch.inference_mode():
        for rows in (MIXED, [RowSpec(2), RowSpec(0)], [RowSpec(2, commit=True)]):
            made.forward(rows)
            eager(theirs, rows)
    assert cuda.launches == 3
    commits, steps = (made._captured[GraphKey((4,), kind)].recorder.tape for kind in (False, True))
    assert len(commits) < len(steps)  # no epilogue
    assert_alike(made.inputs, theirs)
    assert theirs.step.tolist()[:3] == [2, 1, 2] and theirs.cache.position.tolist() == [FRAMES] * 3


@pytest.mark.parametrize("rows", [MIXED, [RowSpec(1), RowSpec(0), RowSpec(2)]])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_row_that_fills_up_leaves_nothing_behind_but_the_first_rows_keys(model, close, deterministic, rows):
    (engine, filled), (_, plain) = (pool(*model, 3, deterministic) for _ in range(2))
    used = len(rows)
    for inputs, size in ((filled, 8), (plain, used)):
        roll = rollout(engine, inputs, [Fixed(3)] * 3)
        with torch.inference_mode():
            for _ in range(2):
                roll.prepare_chunk()
                made = inputs.rows(rows, size)
                assert made.shape == (4, size) and made[3].tolist() == [0] * (size - used) + [1] * used
                inputs.run(made, [12] * size)
    assert filled.step.tolist()[:3] == [1, 1, 1] and filled.cache.position.equal(plain.cache.position)
    assert filled.cache.position.tolist() == [2 * FRAMES * (rows is MIXED)] * 2 + [0]
    if deterministic:
        assert_alike(filled, plain)
        assert filled.x[:3].equal(plain.x[:3])
    else:  # another batch, another rounding
        for name in ("x", "x0"):
            close(getattr(filled, name)[:3], getattr(plain, name)[:3], 1e-4)
        assert same(filled.cache.k.isnan().float(), plain.cache.k.isnan().float())
        close(filled.cache.k.nan_to_num(), plain.cache.k.nan_to_num(), 1e-4)


def test_a_row_that_has_stopped_writes_its_last_steps_keys_again(model):
    """A loop runs on until its last row has stopped, and the exit_step commit keeps the last step's keys."""
    engine, inputs = pool(*model, 1)
    roll = rollout(engine, inputs, [Fixed(2)], "exit_step")
    chunk(roll)
    before = inputs.cache.k.clone(), inputs.cache.v.clone(), inputs.x.clone()[:1]
    with torch.inference_mode():
        for _ in range(3):
            eager(inputs, [RowSpec(0)])
    assert all(same(a, b) for a, b in zip((inputs.cache.k, inputs.cache.v, inputs.x[:1]), before))


# ---- a GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu():
    """A model in bfloat16 whose heads every kernel takes, on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    modules = random_model(dim=128, ffn_dim=256, num_heads=2, text_len=16)
    return [module.to("cuda", torch.bfloat16) for module in modules]


@pytest.fixture
def loops():
    if device_loop.unavailable() is not None:
        pytest.skip(device_loop.unavailable())


def counted(made, monkeypatch):
    """How often anything captured is launched."""
    count = [0]

    class Counted:
        def __init__(self, graph):
            self.graph = graph

        def replay(self):
            count[0] += 1
            self.graph.replay()

    monkeypatch.setattr(made, "_captured", {key: Counted(graph) for key, graph in made._captured.items()})
    return count


def both(on_gpu, policies, loop_rows, deterministic):
    """Graphs, and two rollouts: one for them, one to run eagerly."""
    (engine, ours), (_, theirs) = (pool(*on_gpu, len(policies), deterministic) for _ in range(2))
    made = GraphRunner(ours, loop_rows=loop_rows)
    made.capture()
    return made, rollout(engine, ours, policies), rollout(engine, theirs, policies)


def compare_on_gpu(made, a, b):
    for _ in range(2 * CHUNKS):
        (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
        assert forwards == expected_forwards and got.steps == expected.steps
        assert got.latents.equal(expected.latents) and got.confidence.equal(expected.confidence)
        assert a.cache.position.equal(b.cache.position)


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_replays_on_a_gpu_give_the_eager_bits(on_gpu, name):
    policies = POLICIES[name]
    compare_on_gpu(*both(on_gpu, policies, loop_rows=0, deterministic=len(policies) > 1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_loops_on_a_gpu_give_the_eager_bits_in_one_launch(on_gpu, loops, name, monkeypatch):
    policies = POLICIES[name]
    made, a, b = both(on_gpu, policies, loop_rows=8, deterministic=len(policies) > 1)
    count = counted(made, monkeypatch)
    compare_on_gpu(made, a, b)
    assert count == [2 * CHUNKS]


@pytest.mark.gpu
def test_a_batch_of_rows_loops_on_a_gpu(on_gpu, loops):
    """Not in deterministic mode: the same counts, latents to the rounding of bfloat16."""
    policies = [PerChunk([2, 1, 3, 2]), PerChunk([1, 4, 2, 2]), PerChunk([3, 2, 2, 1])]
    made, a, b = both(on_gpu, policies, loop_rows=4, deterministic=False)
    for _ in range(CHUNKS):
        (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
        assert forwards == expected_forwards and got.steps == expected.steps
        torch.testing.assert_close(got.latents, expected.latents, rtol=0.05, atol=0.05)
        a.past[-1] = b.past[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("loop_rows", [0, 1])
def test_memory_stays_flat_on_a_gpu(on_gpu, loop_rows):
    if loop_rows and device_loop.unavailable() is not None:
        pytest.skip(device_loop.unavailable())
    engine, inputs = pool(*on_gpu, 1, deterministic=False)
    made = GraphRunner(inputs, (1,), loop_rows=loop_rows)
    made.capture()
    roll = rollout(engine, inputs, [Confidence(0.5)])
    used = []
    for _ in range(200):
        chunk(roll, made, on_device=True)
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]))
    assert used[-1][:2] == used[20][:2] and abs(used[-1][2] - used[20][2]) <= 2 << 20
