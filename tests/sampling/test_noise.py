"""Noise from a counter: the key decides, nothing else does, and the numbers are standard normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsa_engine.ops import reference
from dsa_engine.sampling.noise import SeededNoise, check_seed

KEY = (7, 3, 1)


def gaussian(seed, chunk, step, shape):
    noise = SeededNoise([seed], shape, torch.device("cpu"), torch.float32)
    return (noise.renoise(chunk, step, [0]) if step else noise.initial(chunk))[0]


NEIGHBOURS = [(8, 3, 1), (7, 4, 1), (7, 3, 2), (7, 1, 3), (3, 7, 1), (7, 3, 0), (2**64 - 1, 3, 1)]


def test_the_same_key_gives_the_same_bits():
    first, second = gaussian(*KEY, (3, 16, 8, 8)), gaussian(*KEY, (3, 16, 8, 8))
    assert first.shape == (3, 16, 8, 8) and first.dtype == torch.float32
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("seed, chunk, step", [KEY, (0, 0, 0), (2**64 - 1, 500, 4)])
def test_a_stream_lies_at_its_documented_place_of_the_seeds_stream(seed, chunk, step):
    """Step counts 2^128 blocks and chunk 2^192, and each word makes two numbers: what a seed means must not change."""
    words = np.random.Philox(key=seed).advance(step * 2**128 + chunk * 2**192).random_raw(50).tolist()
    expected = []
    for word in words:
        r = math.sqrt(-2 * math.log((word % 2**32 // 2**8 + 0.5) / 2**24))
        angle = 2 * math.pi * (word // 2**32) / 2**32
        expected += [r * math.cos(angle), r * math.sin(angle)]
    torch.testing.assert_close(gaussian(seed, chunk, step, (99,)), torch.tensor(expected[:99]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("count", [1, 7, 8, 1025])
def test_the_kernel_draws_the_same_numbers(count):
    from dsa_engine.triton_kernels import noise

    seed = torch.tensor([0, 7, -1, 2**62 + 12345])
    chunk, step = torch.tensor([0, 3, 500, 2**33]), torch.tensor([0, 1, 4, 2])
    torch.testing.assert_close(
        noise.gaussian(seed, chunk, step, (count,)), reference.gaussian(seed, chunk, step, (count,)), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("other", NEIGHBOURS)
def test_neighbouring_keys_are_uncorrelated(other):
    """Also when one stream is moved against the other: |r| below five standard errors at every small lag."""
    n = 20_000
    a, b = gaussian(*KEY, (n,)).double(), gaussian(*other, (n,)).double()
    assert (a == b).sum() < 5
    for lag in (0, 1, 2, 3, 4, 8):
        x, y = a[lag:], b[: n - lag]
        assert abs((x * y).mean()) < 5 / math.sqrt(n - lag)


def test_moments_are_those_of_the_standard_normal():
    n = 200_000
    x = gaussian(0, 0, 0, (n,)).double()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_the_distribution_is_gaussian_everywhere():
    """Kolmogorov-Smirnov distance to the normal distribution, at about p = 0.001."""
    n = 50_000
    x = gaussian(1, 0, 0, (n,)).double().sort().values
    gap = torch.special.ndtr(x) - torch.arange(1, n + 1) / n
    assert gap.abs().max() < 1.95 / math.sqrt(n)


def test_the_order_of_draws_does_not_matter():
    keys = [(0, chunk, step) for chunk in range(3) for step in range(3)]
    forward = {key: gaussian(*key, (4, 5)) for key in keys}
    backward = {key: gaussian(*key, (4, 5)) for key in reversed(keys)}
    assert all(torch.equal(forward[key], backward[key]) for key in keys)


def test_global_generators_neither_matter_nor_move():
    torch.manual_seed(1)
    np.random.seed(1)
    before = gaussian(*KEY, (64,))
    after_noise = torch.rand(4), np.random.rand(4)
    torch.manual_seed(1)
    np.random.seed(1)
    undisturbed = torch.rand(4), np.random.rand(4)
    assert torch.equal(after_noise[0], undisturbed[0]) and np.array_equal(after_noise[1], undisturbed[1])
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(gaussian(*KEY, (64,)), before)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, np.int64(5), np.uint64(2**64 - 1)])
def test_every_seed_of_64_bits_is_good(seed):
    assert check_seed(seed) == int(seed) and type(check_seed(seed)) is int
    assert gaussian(check_seed(seed), 0, 0, (8,)).isfinite().all()


@pytest.mark.parametrize(
    "seed, nearest", [(-1, "0"), (-(2**70), "0"), (2**64, str(2**64 - 1)), (2**200, str(2**64 - 1))]
)
def test_a_seed_out_of_range_is_named_with_the_nearest(seed, nearest):
    with pytest.raises(ValueError, match=f"seed={seed}: .*nearest is {nearest}"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [1.0, "1", None, True, float("nan")])
def test_a_seed_that_is_not_an_integer_is_named(seed):
    with pytest.raises(ValueError, match=f"seed={seed!r}: must be an integer"):
        check_seed(seed)
