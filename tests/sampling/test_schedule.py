"""The noise levels against published values and against a look-up in a grid of a thousand, as Self-Forcing does it."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.sampling.schedule import Schedule, warp

LEVELS = (1000.0, 750.0, 500.0, 250.0)


def grid_lookup(steps, shift):
    """Warped timesteps as Self-Forcing finds them: a shifted grid of 1000 levels and a zero, read at 1000 - step."""
    sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:-1]  # sigma_min 0, one extra step
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    timesteps = torch.cat((sigmas * 1000, torch.zeros(1, dtype=torch.float64)))
    return timesteps[1000 - torch.tensor(steps, dtype=torch.long)].tolist()


@pytest.mark.parametrize(
    "shift, published",
    [(5.0, (1000, 937.5, 833.33, 625)), (8.0, (1000, 960, 888.9, 727.3)), (3.0, (1000, 900, 750, 500)), (1.0, LEVELS)],
)
def test_published_values(shift, published):
    schedule = Schedule(LEVELS, shift)
    assert [1000 * s for s in schedule.sigmas] == pytest.approx(published, abs=0.05)
    assert len(schedule) == 4


def test_the_default_is_self_forcings_training_schedule():
    assert Schedule() == Schedule(LEVELS, 5.0)


@given(
    steps=st.lists(st.integers(1, 999), max_size=8, unique=True), shift=st.sampled_from([0.5, 1.0, 3.0, 5.0, 8.0, 12.0])
)
def test_levels_equal_a_lookup_in_the_shifted_grid(steps, shift):
    steps = (1000, *sorted(steps, reverse=True))
    assert [1000 * s for s in Schedule(steps, shift).sigmas] == pytest.approx(grid_lookup(steps, shift), rel=1e-9)


@given(steps=st.lists(st.integers(1, 999), max_size=8, unique=True), shift=st.floats(0.05, 50))
def test_levels_start_at_pure_noise_and_fall(steps, shift):
    sigmas = Schedule((1000, *sorted(steps, reverse=True)), shift).sigmas
    assert sigmas[0] == pytest.approx(1.0) and sigmas[-1] > 0
    assert all(low < high for high, low in itertools.pairwise(sigmas))


@given(s=st.floats(0, 1), shift=st.floats(0.05, 50))
def test_the_warp_is_undone_by_its_reciprocal(s, shift):
    assert warp(warp(s, shift), 1 / shift) == pytest.approx(s, abs=1e-9)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"shift": 0.0}, ("shift=0.0", "above 0", "5.0")),
        ({"shift": -5.0}, ("shift=-5.0", "above 0")),
        ({"shift": float("nan")}, ("shift=nan", "above 0")),
        ({"steps": ()}, ("steps=[]", "the first must be 1000")),
        ({"steps": (750.0, 500.0)}, ("steps=[750.0, 500.0]", "the first must be 1000")),
        ({"steps": (1000, 500, 500)}, ("steps=[1000, 500, 500]", "fall strictly")),
        ({"steps": (1000, 250, 500)}, ("steps=[1000, 250, 500]", "fall strictly")),
        ({"steps": (1000, 500, 0)}, ("steps=[1000, 500, 0]", "above 0")),
        ({"steps": (1000, -1)}, ("steps=[1000, -1]", "above 0")),
    ],
)
def test_bad_schedules_are_named(values, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Schedule(**values)
    assert [w for w in words if w not in str(error.value)] == []
