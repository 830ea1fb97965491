"""Pacing against a player that is simulated frame by frame, and the governor against a load that is simulated too."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.serving.worker.pacing import Governor, Pace

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
    pace, player, now, late = Pace(FPS, opened), Player(), opened, 0
    for frames, takes in chunks:
        now = max(now, pace.wanted) + takes
        latency, deadline = pace.delivered(now, frames)
        assert latency == pytest.approx(takes)
        late += deadline is not None and latency > deadline + 1e-9
        player.give(now, frames)
        assert pace.due == pytest.approx(player.empty)
        assert player.empty - pace.wanted <= frames / FPS + 1e-9  # at most a chunk ahead
    assert late == player.stalls


@given(st.floats(0, 5), st.floats(0, 1))
def test_a_consumer_that_is_slow_does_not_make_the_engine_late(away, takes):
    pace = Pace(FPS, 0.0)
    pace.delivered(0.1, 3)
    wanted, due = pace.wanted, pace.due
    back = wanted + away
    pace.taken(back)
    latency, deadline = pace.delivered(back + takes, 3)
    assert latency == pytest.approx(takes) and deadline == pytest.approx(due - wanted)


def test_taking_a_chunk_early_changes_nothing():
    pace = Pace(FPS, 0.0)
    pace.delivered(1.0, 9)
    before = (pace.wanted, pace.due)
    pace.taken(1.0)
    assert (pace.wanted, pace.due) == before


def test_a_first_chunk_has_no_deadline():
    assert Pace(FPS, 3.0).delivered(1003.0, 9) == (1000.0, None)


def settled(load: float, streams: int = 10) -> tuple[Governor, list[float]]:
    """A governor after many chunks whose latency, in deadlines, is `load` on average at full steps, a third of that at
    the fewest, and half more or less at random; the latencies of the last of them."""
    governor, chance, latencies = Governor(), random.Random(0), []
    for _ in range(20_000):
        latencies.append(load * (1 - 2 / 3 * governor.pressure) * chance.uniform(0.5, 1.5))
        governor.delivered(latencies[-1], 1.0, streams)
    return governor, latencies[-10_000:]


@pytest.mark.parametrize("load", [0.6, 0.8, 1.2])
def test_under_load_the_share_of_nearly_late_chunks_settles_at_the_rate(load):
    governor, latencies = settled(load)
    late = np.mean(np.array(latencies) > Governor.MARGIN)
    assert late == pytest.approx(Governor.RATE, abs=0.003)
    assert 0 < governor.threshold(0.8) < 0.8


def test_without_load_the_ceiling_is_kept_and_beyond_reach_the_fewest_steps_are_taken():
    assert settled(0.4)[0].threshold(0.9) == 0.9
    assert settled(9.0)[0].threshold(0.9) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-3, 10)), max_size=50), st.integers(0, 100))
def test_the_threshold_stays_within_zero_and_the_ceiling(chunks, live):
    governor = Governor()
    for latency, deadline in chunks:
        governor.delivered(latency, deadline, live)
        assert 0 <= governor.threshold(0.7) <= 0.7 and not math.isnan(governor.pressure)


def test_after_a_load_the_ceiling_comes_back():
    governor, _ = settled(9.0)
    chunks = 0
    while governor.pressure > 0:
        governor.delivered(0.1, 1.0, 10)
        chunks += 1
    assert chunks == pytest.approx(10 / (Governor.GAIN * Governor.RATE), rel=0.01)
