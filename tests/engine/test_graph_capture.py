"""Which graphs are captured, and what a capture does and leaves."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import Confidence, Fixed, PerChunk
from dsa_engine.engine.chunk_plan import LaunchSpec, RowSpec, chunk_plan, lower, split_commits
from dsa_engine.engine.cuda_graphs import GraphKey, GraphRunner, graph_keys, key_of
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.models import memory_estimate
from dsa_engine.ops import cuda_backend as kernels
from tests.support.cuda_stand_in import FakeGraph, whole_text
from tests.support.graph_pools import (
    CHUNKS,
    FRAMES,
    SIZE,
    assert_alike,
    chunk,
    pool,
    rollout,
    same,
)


def test_a_graph_has_a_forward_for_each_of_a_launch():
    plan = chunk_plan(3, 3, commit=True)
    assert key_of(LaunchSpec(plan), 2) == GraphKey((4, 2, 2))
    assert key_of(LaunchSpec(chunk_plan(1, 4, commit=True), loop=True), 1) == GraphKey((2, 1), loop=True)
    assert key_of(lower(split_commits(plan))[0], 4) == GraphKey((4,), steps=False)


def test_the_default_buckets_take_seventeen_graphs():
    """One row: 1 to 4 steps with and without a commit, a commit, two loops; 2, 4 and 8 rows: a step, a commit, both,
    of which each bucket's both but the last's is the next one's step."""
    keys = graph_keys((1, 2, 4, 8), 4, loop_rows=1)
    assert len(keys) == 17 and sum(len(key.sizes) for key in keys) == 31
    assert all(len(key.sizes) == 1 for key in keys if key.sizes[0] > 2)


bounds = st.integers(1, 5).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))


@given(bounds, st.booleans(), st.booleans(), st.booleans())
def test_every_launch_of_every_plan_is_captured(bounds, commit, recache, loop):
    captured = graph_keys((1, 3), 5, loop_rows=3 if loop else 0)
    plan = chunk_plan(*bounds, commit, recache)
    for size in (1, 3):
        assert {key_of(part, size) for part in lower(plan, unroll=size == 1, loop=loop)} <= {*captured}
    assert {key_of(part, 1) for part in lower(plan)} <= {*captured}  # one by one, for a callback
    assert len({*captured}) == len(captured)
    for graph in captured:  # a loop is made of graphs that were captured before
        index = captured.index(graph)
        assert not graph.loop or all(GraphKey((size,)) in captured[:index] for size in graph.sizes)


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
    assert kept and "captured again" in caplog.text and not inputs.graphs.weights_moved()
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
