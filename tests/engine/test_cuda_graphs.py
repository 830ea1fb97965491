"""CUDA graphs of plans: the lowering as data, captures and replays on a stand-in for CUDA, and on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import Change, Confidence, Fixed, PerChunk
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine import cuda_graphs, device_loop
from dsa_engine.engine.chunk_plan import RowSpec, chunk_plan, run_plan
from dsa_engine.engine.cuda_graphs import GraphKey, GraphRunner, LaunchSpec, graph_keys, key_of, lower, run_launches
from dsa_engine.engine.engine import Engine
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models import memory_estimate
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.ops import cuda_backend as kernels
from tests.support.cuda_stand_in import Cuda, FakeGraph, patch, whole_text

SIZE, CHUNKS, FRAMES, STEPS = 4, 4, 2, 4

# ---- the lowering ----------------------------------------------------------------------------------------------------


def test_a_known_count_is_one_launch():
    plan = chunk_plan(3, 3, commit=True)
    assert lower(plan) == lower(plan, loop=True) == (LaunchSpec(plan),)
    assert key_of(LaunchSpec(plan), 2) == GraphKey((4, 2, 2))


def test_after_the_least_count_it_is_a_step_at_a_time_or_one_loop():
    plan = chunk_plan(2, 4, commit=True)
    assert [len(part.nodes) for part in lower(plan)] == [2, 1, 1]
    (loop,) = lower(plan, loop=True)
    assert loop == LaunchSpec(plan, loop=True) and key_of(loop, 1) == GraphKey((2, 1), loop=True)


def test_a_commit_of_its_own_is_a_launch_of_its_own():
    plan = chunk_plan(1, 2, commit=True, merge=False)
    assert [(len(part.nodes), part.loop) for part in lower(plan, loop=True)] == [(1, False), (2, True)]
    assert key_of(lower(plan)[0], 4) == GraphKey((4,), steps=False)


bounds = st.integers(1, 5).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))


@given(st.data(), bounds, st.booleans(), st.booleans(), st.booleans())
def test_launches_do_what_the_plan_does(data, bounds, commit, merge, loop):
    """The same forwards of the same slots in the same order, and the same yields, whatever each slot wants."""
    plan = chunk_plan(*bounds, commit, merge)
    slots = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    wanted = {slot: data.draw(st.integers(*bounds)) for slot in slots}
    eager, ours = ([], dict.fromkeys(slots, 0)), ([], dict.fromkeys(slots, 0))

    def forward(made, rows):
        forwards, taken = made
        rows = [row for row in rows if row.commit or taken[row.slot] < wanted[row.slot]]  # the others would run idle
        forwards.append(rows)
        for row in rows:
            taken[row.slot] += not row.commit

    def launch(part, live):
        for node in part.nodes:
            if not part.loop or any(ours[1][slot] < wanted[slot] for slot in live):
                forward(ours, cuda_graphs.rows_of(node, live))

    def stopped(taken):
        return lambda live: [taken[slot] >= wanted[slot] for slot in live]

    theirs = run_plan(plan, slots, lambda rows: forward(eager, rows), stopped(eager[1]))
    expected = [(node, list(live)) for node, live in theirs]
    parts = lower(plan, loop)
    seen = run_launches(parts, slots, launch, stopped(ours[1]), lambda live: [ours[1][slot] for slot in live])
    assert [(node, list(live)) for node, live in seen] == expected
    assert ours == eager and ours[1] == wanted
    assert tuple(itertools.chain.from_iterable(part.nodes for part in parts)) == plan


@given(bounds, st.booleans(), st.booleans(), st.booleans())
def test_every_launch_of_every_plan_is_captured(bounds, commit, merge, loop):
    captured = graph_keys((1, 3), 5, loop_rows=3 if loop else 0)
    launches = lower(chunk_plan(*bounds, commit, merge), loop)
    assert {key_of(part, size) for part in launches for size in (1, 3)} <= {*captured}
    assert len({*captured}) == len(captured)
    for graph in captured:  # a loop is made of graphs that were captured before
        index = captured.index(graph)
        assert not graph.loop or all(GraphKey((size,)) in captured[:index] for size in graph.sizes)


# ---- a model on the stand-in for CUDA --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in():
    return Cuda()


@pytest.fixture
def cuda(stand_in, monkeypatch):
    return patch(stand_in, monkeypatch)


def random_model(**options):
    """Weights at which no gate or gain is what would hide it, and confidences on both sides of one half."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, text_dim=40, freq_dim=64, **options)
    dit, head = CausalDiT(config).requires_grad_(False).eval(), ConfidenceHead(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.15)
    torch.nn.init.normal_(head.mlp[2].weight, std=1.0)
    return dit, head


@pytest.fixture(scope="module")
def model():
    return random_model(dim=64, ffn_dim=96, num_heads=2, text_len=12)


@pytest.fixture(scope="module")
def captured_pools():
    return {}


@pytest.fixture
def captured(cuda, model, captured_pools):
    """captured(rows, loop_rows, window): an engine, and the graphs of a pool of so many slots, all free. One capture
    serves all tests, as it serves all sessions."""

    def get(rows, loop_rows, window=6):
        key = (rows, loop_rows, window)
        if key not in captured_pools:
            engine, inputs = pool(*model, rows, window=window)
            bucket = next(size for size in (1, 2, 4, 8) if size >= rows)
            captured_pools[key] = engine, GraphRunner(inputs, (bucket,), loop_rows=loop_rows)
            captured_pools[key][1].capture()
        return captured_pools[key]

    yield get
    for _, made in captured_pools.values():
        cache = made.inputs.cache
        cache.release(torch.tensor([slot for slot in range(cache.slots) if slot not in cache._free]))


def pool(dit, head, slots, deterministic=True, window=6):
    """An engine, and the inputs of a pool."""
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0, window=window)
    engine = Engine(dit, head, None, None, config, slots, deterministic)
    return engine, engine._pool(engine._pool_shape(SIZE, SIZE, CHUNKS * FRAMES, config), slots)


def rollout(engine, inputs, policies, commit="clean"):
    """One row for each policy, in a pool whose keys and values are not numbers yet. The prompts have padding."""
    rows = len(policies)
    embeds = torch.randn(rows, 7, engine.dit.config.text_dim, generator=torch.Generator().manual_seed(5))
    roll = engine.rollout(
        embeds.to(inputs.x),
        height=SIZE,
        width=SIZE,
        frames=CHUNKS * FRAMES,
        policy=Fixed(1),
        seeds=range(rows),
        config=dataclasses.replace(engine.config, commit=commit),
    )
    roll.inputs, roll.cache, roll.slot = inputs, inputs.cache, inputs.cache.acquire(rows)
    roll.slots = roll.slot.tolist()
    roll.policies = [policy.start(STEPS) for policy in policies]
    inputs.cache.k.fill_(float("nan"))
    inputs.cache.v.fill_(float("nan"))
    return roll


def eager(inputs, rows):
    """A forward without graphs, as `GraphRunner` makes it."""
    lengths = [inputs.text.kv.shape[3]] * len(rows)
    inputs.run(inputs.rows(rows), lengths, any(not row.commit for row in rows))


def executed(plan, slots, stopped, inputs):
    return run_plan(plan, slots, lambda rows: eager(inputs, rows), stopped)


@torch.inference_mode()
def chunk(roll, made=None, on_device=False):
    """The next chunk, and which slots took part in each of its forwards. made: with graphs; on_device: the flags alone
    decide."""
    plan, seen = roll.prepare_chunk(), []
    if made is None:
        forwards = executed(plan, roll.slots, roll.poll_stop_flags, roll.inputs)
    else:
        forwards = made.run(plan, roll.slots, None if on_device else roll.poll_stop_flags)
    for node, live in forwards:
        roll.on_forward_done(node, live)
        seen.append((node, list(live)))
    result = roll.result()
    roll.accept(result.latents)
    return result, seen


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_alike(ours, theirs):
    """The bits of all that matters later: not the scratch entry, nor what was left in x after the last step."""
    for name in ("x0", "state", "step"):
        assert same(getattr(ours, name)[:-1], getattr(theirs, name)[:-1]), name
    for name in ("position", "k", "v"):
        assert same(getattr(ours.cache, name), getattr(theirs.cache, name)), name


POLICIES = {
    "every count": [PerChunk([1, 2, 3, 4])],
    "known counts, two rows": [PerChunk([3, 1, 4, 2])] * 2,
    "counts that differ, three rows": [PerChunk([1, 4, 2, 3]), PerChunk([4, 1, 2, 2]), PerChunk([2, 2, 2, 4])],
    "confidence": [Confidence(0.5)],
    "confidence, three rows": [Confidence(0.5), Confidence(0.55, min_steps=2), Confidence(0.45, max_steps=3)],
    "one never stops": [Confidence(1.0), Confidence(0.0)],
    "five rows": [Confidence(0.4 + 0.05 * i) for i in range(5)],
}


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
        if loop_rows or not decided:
            assert cuda.launches == 1


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


# ---- the capture -----------------------------------------------------------------------------------------------------


def test_capturing_leaves_a_pool_as_it_was(cuda, model):
    engine, inputs = pool(*model, 3)
    made = GraphRunner(inputs, (1, 2, 4, 8), max_steps=2, loop_rows=1)
    assert made.buckets == [1, 2, 4]  # four rows hold all three slots
    roll = rollout(engine, inputs, [Fixed(2)] * 2)
    chunk(roll)
    with torch.inference_mode():
        roll.prepare_chunk()  # its keys will lie where those of the chunk before are now

    def held():
        cache, of = inputs.cache, roll.slot
        kept = [t[:-1] for t in (inputs.x, inputs.x0, inputs.state, inputs.step)]
        return [t.clone() for t in (*kept, cache.position, cache.k[:, of], cache.v[:, of])]

    before, seen = held(), []
    assert made.capture(lambda done, of: seen.append((done, of))) >= 0
    assert all(map(same, held(), before)) and inputs.cache.in_use == 2
    assert seen == [(i + 1, len(made.graph_keys)) for i in range(len(made.graph_keys))]
    loops = [graph for graph in made.graph_keys if graph.loop]
    assert loops == [GraphKey((2, 1), loop=True), GraphKey((1, 1), loop=True)]
    assert cuda.log == ["side waits for main", *["capture in pool on side, thread_local"] * (len(made.graph_keys) - 2)]


@pytest.mark.parametrize("call", ["cudaGraphAddChildGraphNode", "cudaGraphAddNode", "cudaGraphInstantiate"])
def test_a_loop_that_the_driver_refuses_costs_the_loops_alone(cuda, model, caplog, call):
    """It is said, and every chunk is replayed to the same bits, a launch up to each decision."""
    (engine, ours), (_, theirs) = (pool(*model, 1) for _ in range(2))
    made, seen = GraphRunner(ours, (1,), loop_rows=1), []
    cuda.runtime.fails = call
    with caplog.at_level(logging.WARNING):
        made.capture(lambda done, of: seen.append(done))
    (text,) = caplog.messages
    assert text.startswith(f"no loop on the device, single steps are launched instead: RuntimeError: {call}: ")
    assert {*made._captured} == {*made.graph_keys} and not any(graph.loop for graph in made.graph_keys)
    assert len(seen) == len(made.graph_keys) and ours.cache.in_use == 0
    a, b = (rollout(engine, inputs, [Confidence(0.5)]) for inputs in (ours, theirs))
    for _ in range(CHUNKS):
        cuda.launches = 0
        (got, forwards), (expected, expected_forwards) = chunk(a, made, on_device=True), chunk(b)
        assert forwards == expected_forwards and got.latents.equal(expected.latents)
        assert cuda.launches == len(forwards)


def on_cuda(engine, monkeypatch):
    """Who asks an engine for its device is told that it is a CUDA device, with room for anything."""
    monkeypatch.setattr(memory_estimate, "free_bytes", lambda device: 10**12)
    monkeypatch.setattr(type(engine), "device", torch.device("cuda", 0))


def test_a_capture_that_fails_leaves_no_graphs_and_the_next_one_tries_again(cuda, model, monkeypatch):
    engine, _ = pool(*model, 1)
    on_cuda(engine, monkeypatch)
    options = dict(height=SIZE, width=SIZE, frames=CHUNKS * FRAMES, config=engine.config)
    with monkeypatch.context() as fault:
        fault.setattr(cuda, "CUDAGraph", lambda **_: 1 / 0)
        fault.setattr(torch.cuda, "CUDAGraph", cuda.CUDAGraph)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                engine.capture(**options)
            (inputs,) = engine._pools.values()
            assert inputs.graphs is None and inputs.cache.in_use == 0
    assert engine.capture(**options) > 0
    assert {*inputs.graphs._captured} == {*inputs.graphs.graph_keys}
    assert engine.capture(**options) == 0.0  # it is there


def test_weights_that_have_moved_are_seen(cuda, model, monkeypatch, caplog):
    """Captured by address. What is written into them in place is read by the next replay."""
    dit, head = copy.deepcopy(model)
    engine, _ = pool(dit, head, 1)
    on_cuda(engine, monkeypatch)
    options = dict(height=SIZE, width=SIZE, frames=CHUNKS * FRAMES, config=engine.config)
    engine.capture(**options)
    (inputs,) = engine._pools.values()

    def opened():
        embeds = torch.zeros(1, 7, engine.dit.config.text_dim)
        engine.rollout(embeds, policy=Fixed(1), seeds=[0], **options).close()

    opened()
    for parameter in dit.parameters():
        parameter.add_(0.0)
    opened()
    kept = [parameter.data for parameter in dit.parameters()]  # or the new ones might lie where these were
    dit.double().float()
    with pytest.raises(RuntimeError, match="weights have moved.*call warmup"):
        opened()
    with caplog.at_level(logging.WARNING):
        assert engine.capture(**options) > 0
    assert kept and "captured anew" in caplog.text and not inputs.graphs.weights_moved()
    opened()


def test_a_replay_waits_for_the_one_before_on_whatever_stream(cuda, captured, monkeypatch):
    engine, made = captured(1, 0)
    log = []

    def stream(device):
        return SimpleNamespace(wait_event=lambda event: log.append("waits"))

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(made, "_done", SimpleNamespace(record=lambda on: log.append("marks")))
    for one in made._captured.values():
        monkeypatch.setattr(one, "replay", lambda: log.append("replays"))
    roll = rollout(engine, made.inputs, [Fixed(2)])
    with torch.inference_mode():
        roll.prepare_chunk()
        made._filled.clear()
        monkeypatch.setattr(made.inputs, "rows", lambda rows, size: log.append("rows") or torch.zeros(4, size).long())
        made.forward([RowSpec(roll.slots[0])])
    assert log == ["waits", "rows", "replays", "marks"]


def test_torch_takes_what_the_stand_in_takes():
    bind = inspect.signature(torch.cuda.graph).bind
    bind(None, pool=(0, 1), stream=None, capture_error_mode="thread_local")
    inspect.signature(torch.cuda.CUDAGraph.__new__).bind(torch.cuda.CUDAGraph, keep_graph=True)
    for name in vars(FakeGraph).keys() - {"__module__", "__init__", "__doc__", "__dict__", "__weakref__"}:
        assert callable(getattr(torch.cuda.CUDAGraph, name)), name


def test_capturing_needs_a_free_slot(cuda, model):
    _, inputs = pool(*model, 1)
    inputs.cache.acquire()
    with pytest.raises(RuntimeError, match="1 cache slots requested, 0 of 1 are free"):
        GraphRunner(inputs, loop_rows=0).capture()


def test_a_forward_that_reads_the_host_cannot_be_captured(cuda, model, monkeypatch):
    """The stand-in refuses what CUDA refuses."""
    _, inputs = pool(*model, 1)
    monkeypatch.setattr(ModelRunner, "_text", lambda self, slot, n: whole_text(self, slot, n if slot.sum() > -1 else 0))
    with pytest.raises(RuntimeError, match="not permitted when a stream is capturing"):
        GraphRunner(inputs, loop_rows=0).capture()
    assert inputs.cache.in_use == 0


def test_what_was_not_captured_runs_eagerly_and_says_so_once(cuda, model, caplog):
    policies = [PerChunk([1, 2]), PerChunk([3, 2]), PerChunk([3, 4])]
    (engine, ours), (_, theirs) = (pool(*model, 3) for _ in range(2))
    made = GraphRunner(ours, (2,), max_steps=1, loop_rows=2)
    a, b = rollout(engine, ours, policies), rollout(engine, theirs, policies)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (got, _), (expected, _) = chunk(a, made, on_device=True), chunk(b)
            assert got.steps == expected.steps and got.latents.equal(expected.latents)
    assert_alike(ours, theirs)
    text = [record.getMessage() for record in caplog.records]
    assert [int(line.split()[3]) for line in text] == [
        3,
        2,
        6,
        1,
    ]  # with the commits; two steps of three rows only once
    assert text[0] == (
        "a forward of 3 rows was not captured (none yet, see GraphRunner.capture): such forwards run eagerly"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_steps": 5}, "max_steps=5: must be from 1 to 4, the step list; nearest is 4"),
        ({"max_steps": 0}, "nearest is 1"),
        ({"buckets": ()}, r"buckets=\(\): must be numbers of rows"),
        ({"buckets": (0, 2)}, r"buckets=\(0, 2\)"),
    ],
)
def test_values_that_make_no_sense_are_refused(model, options, message):
    _, inputs = pool(*model, 1)
    with pytest.raises(ValueError, match=message):
        GraphRunner(inputs, loop_rows=0, **options)


def test_without_what_a_loop_needs_none_is_promised(model, monkeypatch):
    _, inputs = pool(*model, 1)
    monkeypatch.setattr(kernels, "csrc", SimpleNamespace(DEVICE="cpu"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ImportError, match=r"loop_rows=1: .*dsa-engine\[cuda\].*nearest is 0"):
        GraphRunner(inputs)
    monkeypatch.setattr(kernels, "csrc", None)
    monkeypatch.setattr(kernels, "_missing", "none built", raising=False)
    with pytest.raises(ImportError, match=r"not part of this installation \(none built\)"):
        GraphRunner(inputs)
    GraphRunner(inputs, loop_rows=0)


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
