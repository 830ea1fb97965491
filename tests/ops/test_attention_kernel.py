"""Attention over the cache and to the prompt: the Triton kernels against float64 beside the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsa_engine.ops import reference
from dsa_engine.triton_kernels import attention as kernel
from tests.ops.test_attention import collapsed, frames_of, random_scales, repeated
from tests.support.kernels import DEVICE, DTYPES, compare, nan_cache, poison, poisoned_memory


def exact_attention(q, k, v):
    """One row in float64: q [T, H, D] over k, v [n, H, D]; zeros without keys."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1)


def exact_over_runs(q, k_cache, v_cache, slot, runs, scales):
    """All rows in float64: slot a list of integers, runs a list of lists of pairs."""
    rows = []
    for b, (s, row) in enumerate(zip(slot, runs)):
        k, v = (c[s, frames_of(row)].flatten(0, 1).double() for c in (k_cache, v_cache))
        if scales is not None:
            k, v = k * scales.k[s, :, None].double(), v * scales.v[s, :, None].double()
        rows.append(exact_attention(q[b], k, v))
    return torch.stack(rows)


def check_attention(batch, tokens, heads, head_dim, frame, window, slots, slot, runs, dtype, cache_dtype, splits):
    """The kernel beside the reference on caches that are NaN in every slot and frame no row uses; both errors."""
    used = {}
    for s, row in zip(slot, runs):
        used.setdefault(s, []).extend(frames_of(row))
    q = torch.randn(batch, tokens, heads, head_dim, device=DEVICE).to(dtype)
    shape = (2, slots, window, frame, heads, head_dim)  # 200 million values at the real size: 4 s on a CPU
    k, v = (nan_cache(c, used) for c in torch.randn(shape, device=DEVICE).to(cache_dtype))
    scales = random_scales(slots, heads) if cache_dtype == torch.float8_e4m3fn else None
    args = q, k, v, torch.tensor(slot, device=DEVICE), torch.tensor(runs, device=DEVICE), scales
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(kernel, "split_count", lambda *_: splits)
        out = kernel.attention(*args)
    return compare(out, reference.attention(*args), exact_over_runs(q, k, v, slot, runs, scales))


@st.composite
def lookups(draw):
    """Odd sizes; slots that rows may share; runs as a ring gives them: wrapped, a sink apart, empty, in any order."""
    batch, slots, window, count = (draw(st.integers(1, n)) for n in (2, 3, 6, 3))
    slot = draw(st.lists(st.integers(0, slots - 1), min_size=batch, max_size=batch))
    runs = []
    for _ in range(batch):
        cuts = sorted(draw(st.lists(st.integers(0, window), min_size=2 * count, max_size=2 * count)))
        runs.append(draw(st.permutations(list(zip(cuts[::2], cuts[1::2])))))
    sizes = draw(st.integers(1, 20)), draw(st.integers(1, 2)), draw(st.sampled_from((16, 32))), draw(st.integers(1, 9))
    return batch, *sizes, window, slots, slot, runs


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, so that little data has whole ones, torn ones and several splits."""
    monkeypatch.setattr(kernel, "tile_sizes", lambda *_: kernel.Tiles(16, 16, 4, 2))


# A tile takes the interpreter 4 ms: few examples, and none to make a failure smaller. The fixture never changes.
FEW = settings(max_examples=12, phases=[Phase.generate], suppress_health_check=["function_scoped_fixture"])


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(case=lookups(), splits=st.integers(1, 3))
def test_reads_the_runs_and_nothing_else(small_tiles, dtype, case, splits):
    check_attention(*case, dtype, dtype, splits)


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(case=lookups(), splits=st.integers(1, 3))
def test_reads_an_fp8_cache(small_tiles, dtype, case, splits):
    check_attention(*case, dtype, torch.float8_e4m3fn, splits)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens, head_dim", [(50, 32), (70, 64), (130, 128)])
def test_with_its_own_tiles(tokens, head_dim, cache_dtype):
    check_attention(1, tokens, 2, head_dim, 37, 7, 2, [1], [[(0, 1), (4, 7)]], torch.bfloat16, cache_dtype, 2)


def test_serves_float32_queries_from_a_half_precision_cache(small_tiles):
    check_attention(1, 5, 1, 16, 7, 3, 1, [0], [[(0, 3)]], torch.float32, torch.bfloat16, 1)


@pytest.mark.parametrize("splits", [1, 3])
def test_gives_zeros_without_keys(small_tiles, splits):
    check_attention(
        2, 18, 1, 16, 3, 4, 1, [0, 0], [[(2, 2), (4, 1)], [(0, 0), (0, 0)]], torch.float32, torch.float32, splits
    )


@pytest.mark.parametrize(
    "dtype, cache_dtype",
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.float32)],
)
def test_with_large_scores(small_tiles, dtype, cache_dtype):
    """Scores of +-1e5, all of a sign in one head, and of zero: neither exp2 nor the queries' own scale may overflow."""
    q = torch.randn(1, 20, 2, 16, device=DEVICE).abs().to(dtype) * 3e4
    q[:, 3] = 0
    k, v = torch.randn(2, 1, 4, 10, 2, 16, device=DEVICE)
    k[..., 0, :], k[..., 1, :] = -k[..., 0, :].abs(), k[..., 1, :].abs()
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    scales = random_scales(1, 2) if cache_dtype == torch.float8_e4m3fn else None
    args = q, k, v, torch.zeros(1, dtype=torch.long, device=DEVICE), torch.tensor([[[0, 4]]], device=DEVICE), scales
    compare(kernel.attention(*args), reference.attention(*args), exact_over_runs(q, k, v, [0], [[(0, 4)]], scales))


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(case=collapsed(), tokens=st.integers(1, 20), extra=st.integers(0, 30), splits=st.integers(1, 3))
def test_attends_to_the_prompt(small_tiles, dtype, case, tokens, extra, splits):
    length, used, repeat = case
    used = [n + extra for n in used]
    q = torch.randn(len(used), tokens, 2, 16).to(DEVICE, dtype)
    k, v = torch.randn(2, len(used), length + extra, 2, 16).to(DEVICE, dtype)
    for b, n in enumerate(used):
        k[b, n:], v[b, n:] = float("nan"), float("inf")
    counts = torch.tensor(used, device=DEVICE), torch.tensor(repeat, device=DEVICE).float()
    with poisoned_memory():
        out = kernel.attend(q, k, v, used=counts[0], repeat=counts[1], splits=splits)
    exact = [exact_attention(q[b], repeated(k[b], *n), repeated(v[b], *n)) for b, n in enumerate(zip(used, repeat))]
    compare(out, reference.cross_attention(q, k, v, *counts), torch.stack(exact))


@pytest.mark.parametrize("length", [1, 16, 33])
def test_attends_to_every_key_of_the_prompt(small_tiles, length):
    """Views of one tensor, and keys that fill their tiles exactly or not at all."""
    q, k, v = torch.randn(2, 33, 3, 2, 16, device=DEVICE).unbind(2)
    k, v = k[:, :length], v[:, :length]
    exact = torch.stack([exact_attention(q[b], k[b], v[b]) for b in range(2)])
    compare(kernel.cross_attention(q, k, v), reference.cross_attention(q, k, v), exact)


def test_takes_no_queries():
    q, cache = torch.zeros(1, 0, 1, 16, device=DEVICE), poison(2, 1, 2, 3, 1, 16)
    row = torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert kernel.attention(q, *cache, row, row.repeat(2).view(1, 1, 2)).shape == q.shape


@pytest.mark.parametrize("head_dim, nearest", [(8, 16), (24, 16), (96, 64), (100, 128), (256, 128)])
def test_names_the_nearest_head_dim(head_dim, nearest):
    x = torch.zeros(1, 2, 1, head_dim, device=DEVICE)
    with pytest.raises(ValueError, match=f"head dim {head_dim} .* nearest is {nearest}"):
        kernel.cross_attention(x, x, x)


@pytest.mark.parametrize("wrong", ["q", "k", "v", "cache", "keys"])
def test_refuses_strides_that_it_does_not_read(wrong):
    q, k, v = torch.zeros(3, 1, 16, 4, 16, device=DEVICE)
    row = torch.zeros(1, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="attention: .*(strides|contiguous)"):
        if wrong == "cache":
            cache = torch.zeros(1, 4, 6, 4, 16, device=DEVICE)[:, :, ::2]
            kernel.attention(q, cache, cache, row, row.repeat(2).view(1, 1, 2))
        elif wrong == "keys":
            kernel.attention(q, k[None], v[None], row, row.view(1, 1, 1).expand(1, 1, 2))
        else:
            kernel.cross_attention(*(x.mT.contiguous().mT if name == wrong else x for name, x in zip("qkv", (q, k, v))))


def test_keys_are_split_where_that_fills_the_sms():
    wan = dict(output_bytes=4 * 4680 * 1536, sms=132)
    assert kernel.split_count(444, 256, **wan) == 2  # 3.4 waves become 6.7 of half the length
    assert kernel.split_count(8 * 132, 256, **wan) == 1  # whole waves
    assert kernel.split_count(444, 4, **wan) == 1  # the prompt: too short
    assert kernel.split_count(12, 256, 4 * 128 * 1536, 132) == 8  # few queries, many keys
    assert kernel.split_count(12, 1, 4 * 128 * 1536, 132) == 1


@given(st.integers(1, 5000), st.integers(0, 600), st.integers(1, 10**9), st.integers(1, 200))
def test_every_part_of_the_keys_has_a_tile(programs, steps, output_bytes, sms):
    assert 1 <= kernel.split_count(programs, steps, output_bytes, sms) <= max(1, steps)


@pytest.mark.parametrize(
    "arch, limit", [(80, 166_912), (86, 101_376), (89, 101_376), (90, 232_448), (100, 232_448), (120, 101_376)]
)
def test_tiles_fit_the_shared_memory(arch, limit):
    """By what a tile holds; what the compiler adds is counted in test_compile.py."""
    for tokens, dim, itemsize in itertools.product((1, 64, 65, 4680), kernel.HEAD_DIMS, (2, 4)):
        queries, keys, warps, stages = kernel.tile_sizes(tokens, dim, itemsize, arch)
        assert all(n & (n - 1) == 0 for n in (queries, keys, warps))
        assert itemsize * dim * (queries + 2 * stages * keys) <= limit


def test_names_how_many_keys_its_addresses_reach():
    q, k = (torch.empty(1, n, 64, 128, device="meta") for n in (1, 2**20))
    with pytest.raises(ValueError, match="nearest is 262143 keys"):
        kernel.cross_attention(q, k, k)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("runs", [[(0, 3)], [(0, 3), (6, 15)], [(0, 21), (4, 4)]], ids=["4680", "18720", "32760"])
def test_at_real_shapes(runs, cache_dtype):
    dtype = torch.float16 if cache_dtype == torch.float16 else torch.bfloat16
    check_attention(1, 4680, 12, 128, 1560, 21, 2, [1], [runs], dtype, cache_dtype, 2)


@pytest.mark.gpu
def test_gives_the_same_bits_every_time():
    q = torch.randn(1, 4680, 12, 128, device=DEVICE).bfloat16()
    k, v = torch.randn(2, 1, 6, 1560, 12, 128, device=DEVICE).bfloat16()
    args = q, k, v, torch.zeros(1, dtype=torch.long, device=DEVICE), torch.tensor([[[0, 2], [3, 6]]], device=DEVICE)
    first = kernel.attention(*args)
    assert all(torch.equal(first, kernel.attention(*args)) for _ in range(3))
