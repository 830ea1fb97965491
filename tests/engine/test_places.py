"""How many sessions there are places for: what fits a device's memory, said in words. The device is pretended."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from dsa_engine import Pipeline
from dsa_engine.config import RolloutConfig
from dsa_engine.engine import device as devices
from dsa_engine.engine.engine import SESSIONS, Engine
from dsa_engine.models import memory_estimate
from dsa_engine.serving.settings import WorkerLimits

RED = "a red circle moves sideways"


@pytest.fixture
def gpu(monkeypatch):
    """gpu(bytes): from now on engines believe that they are on a GPU with so many free."""

    def free(amount):
        monkeypatch.setattr(memory_estimate, "free_bytes", lambda device: round(amount))

    monkeypatch.setattr(Engine, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Engine, "streams", None)
    monkeypatch.setattr(devices, "current", lambda device: contextlib.nullcontext())
    return free


def load(untrained, **options):
    return Pipeline.from_pretrained(untrained, device="cpu", **options)


def a_session(pipe) -> int:
    """Bytes of one, as they are allocated: what a pool grows by, and the prompt that a rollout keeps beside it."""
    shape = pipe.engine._pool_shape(8, 8, None, pipe.config)
    two, one = (pipe.engine._pool(shape, slots) for slots in (2, 1))
    text = pipe.engine.text_kv(pipe.engine.encode([RED]))
    return two.nbytes + two.cache.nbytes - one.nbytes - one.cache.nbytes + text.kv.nbytes


@pytest.mark.parametrize("wanted", [50, 1000])
def test_as_many_fit_as_their_bytes_say(untrained, gpu, wanted):
    """Against what is allocated. In so much memory the forward of eight rows is little, and the prompts are counted at
    their full length."""
    pipe = load(untrained)
    gpu(wanted * a_session(pipe))
    found = pipe.engine.fitting(height=8, width=8, frames=None, config=pipe.config)
    assert 0.6 * wanted < found <= wanted


def test_nobody_asked_so_there_are_as_many_as_fit(untrained, gpu, monkeypatch, caplog):
    pipe = load(untrained)
    assert pipe.engine.max_sessions == SESSIONS == 4
    gpu(1e12)
    pipe.session(RED).close()
    (inputs,) = pipe.engine._pools.values()
    assert inputs.cache.slots == 4 and not caplog.messages  # no more than that: others may want the device too
    pipe.close()
    monkeypatch.setattr(memory_estimate, "count_sessions", lambda *_, **__: 2)
    gpu(5e9)
    with pipe.session(RED), pipe.session(RED):
        (text,) = caplog.messages
        assert text.startswith("places for 2 sessions instead of 4: 5.00 GB is free on cuda:0, and that is for 2; ")
        with pytest.raises(RuntimeError, match=r"all 2 places.*max_sessions \(there was memory for 2 when"):
            pipe.session(RED)


def test_a_number_that_does_not_fit_is_taken_with_a_warning_that_names_what_does(untrained, gpu, monkeypatch, caplog):
    pipe = load(untrained, max_sessions=3)
    monkeypatch.setattr(memory_estimate, "count_sessions", lambda *_, **__: 0)
    gpu(5e6)
    with caplog.at_level(logging.WARNING):
        pipe.session(RED).close()
    (inputs,) = pipe.engine._pools.values()
    assert inputs.cache.slots == 3
    assert caplog.messages == [
        "max_sessions=3: memory may run out, for 5.00 MB is free on cuda:0 and that is for 0; nearest is 1"
    ]


def test_on_a_cpu_it_is_todays_number(untrained, caplog):
    pipe = load(untrained)
    pipe.session(RED).close()
    (inputs,) = pipe.engine._pools.values()
    assert inputs.cache.slots == 4 and not caplog.messages
    assert pipe.make_room(36) == 36 == pipe.engine.max_sessions


def test_a_server_makes_room_for_what_fits(untrained, gpu, monkeypatch):
    pipe = load(untrained)
    for fit, expected in ((100, 36), (9, 9), (0, 1)):
        monkeypatch.setattr(Engine, "fitting", lambda engine, fit=fit, **_: fit)
        assert pipe.make_room(36) == expected == pipe.engine.max_sessions


def test_memory_is_counted_for_the_pool_that_is_made(untrained, gpu, monkeypatch):
    """Its own window and size, beside an offloaded decoder's weights, and without those that are there already."""
    seen = []
    monkeypatch.setattr(memory_estimate, "count_sessions", lambda *args, **sizes: seen.append((*args, sizes)) or 5)
    pipe = load(untrained, offload="vae")
    gpu(1e9)
    pipe.session(RED, window=12, sink=3, rope="relative", height=32, width=48).close()
    pipe.session(RED, window=-1, num_frames=15).close()
    (_, rolling, load_a, room, sizes), (_, whole, load_b, _, _) = seen
    assert (rolling.window, rolling.sink, rolling.rope, whole.window) == (12, 3, "relative", None)
    stride = pipe.engine.decoder.spatial_stride
    assert (load_a.height, load_a.width, load_b.frames) == (32 // stride, 48 // stride, 15)
    assert room == 1e9 + memory_estimate.CUDA_CONTEXT_BYTES and sizes["offload"] == ("vae",) and sizes["text"] is None
    assert sizes["weights"] == {
        "generator": 0,
        "confidence": 0,
        "text": 0,
        "vae": memory_estimate.module_bytes(pipe.engine.decoder),
    }


@pytest.mark.parametrize(
    "given, places, expected",
    [
        ((32, 4), 36, (32, 4)),
        ((32, 4), 19, (17, 2)),
        ((32, 4), 3, (2, 1)),
        ((32, 4), 1, (1, 0)),
        ((5, 0), 3, (3, 0)),
    ],
)
def test_limits_within_places(given, places, expected, caplog):
    limits = WorkerLimits(max_sessions=given[0], max_jobs=given[1], idle_timeout=7.0).within(places)
    assert (limits.max_sessions, limits.max_jobs, limits.idle_timeout) == (*expected, 7.0)
    assert len(caplog.messages) == (given != expected)
    for text in caplog.messages:
        assert text.startswith(f"{expected[0]} live streams and {expected[1]} jobs at once instead of ")


def test_a_pool_that_nobody_uses_goes_before_the_next_is_counted(tiny_dit, gpu, monkeypatch):
    engine = Engine(tiny_dit, None, None, None, RolloutConfig(window=6))
    there = []
    monkeypatch.setattr(memory_estimate, "count_sessions", lambda *_, **__: there.append(len(engine._pools)) or 4)
    gpu(1e9)
    for window in (6, 9, 12):
        engine._shared(engine._pool_shape(4, 4, None, RolloutConfig(window=window)))
    assert there == [0, 0, 0]
