"""Pacing against a player that is simulated frame by frame, and the controller against a load that is simulated too."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.serving.worker.pacing import LoadController, PlaybackPacer

FPS = 12.0
CHUNKS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 1.0)), min_size=2, max_size=30)


class Player:
    """Shows one frame each 1 / fps seconds while it has any; a frame that comes to a player that has none is shown at
    once."""

    def __init__(self):
        self.shown: list[float] = []  # when each frame appears
        self.stalls = 0

    def give(self, now: float, frames: int) -> None:
        if self.shown and now > self.empty + 1e-9:
            self.stalls += 1
        start = now if not self.shown else max(self.empty, now)
        self.shown += [start + i / FPS for i in range(frames)]

    @property
    def empty(self) -> float:
        return self.shown[-1] + 1 / FPS


@given(CHUNKS, st.floats(0, 100))
def test_a_chunk_is_late_just_when_the_player_stalls(chunks, opened):
    pacer, player, now, late = PlaybackPacer(FPS, opened), Player(), opened, 0
    for frames, takes in chunks:
        now = max(now, pacer.start_at) + takes
        latency, deadline = pacer.delivered(now, frames)
        assert latency == pytest.approx(takes)
        late += deadline is not None and latency > deadline + 1e-9
        player.give(now, frames)
        assert pacer.runs_out == pytest.approx(player.empty)
        assert player.empty - pacer.start_at <= frames / FPS + 1e-9  # at most a chunk ahead
    assert late == player.stalls


@given(st.floats(0, 5), st.floats(0, 1))
def test_a_consumer_that_is_slow_does_not_make_the_engine_late(away, takes):
    pacer = PlaybackPacer(FPS, 0.0)
    pacer.delivered(0.1, 3)
    start_at, runs_out = pacer.start_at, pacer.runs_out
    back = start_at + away
    pacer.ack(back)
    latency, deadline = pacer.delivered(back + takes, 3)
    assert latency == pytest.approx(takes) and deadline == pytest.approx(runs_out - start_at)


def test_taking_a_chunk_early_changes_nothing():
    pacer = PlaybackPacer(FPS, 0.0)
    pacer.delivered(1.0, 9)
    before = (pacer.start_at, pacer.runs_out)
    pacer.ack(1.0)
    assert (pacer.start_at, pacer.runs_out) == before


def test_a_first_chunk_has_no_deadline():
    assert PlaybackPacer(FPS, 3.0).delivered(1003.0, 9) == (1000.0, None)


def settled(load: float, streams: int = 10) -> tuple[LoadController, list[float]]:
    """A controller after many chunks whose latency, in deadlines, is `load` on average at full steps, a third of that
    at the fewest, and half more or less at random; the latencies of the last of them."""
    controller, chance, latencies = LoadController(), random.Random(0), []
    for _ in range(20_000):
        latencies.append(load * (1 - 2 / 3 * controller.pressure) * chance.uniform(0.5, 1.5))
        controller.delivered(latencies[-1], 1.0, streams)
    return controller, latencies[-10_000:]


@pytest.mark.parametrize("load", [0.6, 0.8, 1.2])
def test_under_load_the_share_of_nearly_late_chunks_settles_at_the_rate(load):
    controller, latencies = settled(load)
    late = np.mean(np.array(latencies) > LoadController.LATE_MARGIN)
    assert late == pytest.approx(LoadController.TARGET_LATE_RATE, abs=0.003)
    assert 0 < controller.threshold(0.8) < 0.8


def test_without_load_the_ceiling_is_kept_and_beyond_reach_the_fewest_steps_are_taken():
    assert settled(0.4)[0].threshold(0.9) == 0.9
    assert settled(9.0)[0].threshold(0.9) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-3, 10)), max_size=50), st.integers(0, 100))
def test_the_threshold_stays_within_zero_and_the_ceiling(chunks, live):
    controller = LoadController()
    for latency, deadline in chunks:
        controller.delivered(latency, deadline, live)
        assert 0 <= controller.threshold(0.7) <= 0.7 and not math.isnan(controller.pressure)


def test_after_a_load_the_ceiling_comes_back():
    controller, _ = settled(9.0)
    chunks = 0
    while controller.pressure > 0:
        controller.delivered(0.1, 1.0, 10)
        chunks += 1
    assert chunks == pytest.approx(10 / (LoadController.GAIN * LoadController.TARGET_LATE_RATE), rel=0.01)
