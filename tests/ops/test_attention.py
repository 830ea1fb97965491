"""Attention over the cache and to the prompt: the reference against loops in float64 that read only the frames that
count, the Triton kernels against float64 beside the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import CacheScales, reference
from dsa_engine.triton_kernels import attention as kernel
from tests.support.kernels import DEVICE, DTYPES, compare, nan_cache, poison, poisoned_memory


class AcceleratorName(str):
    """Reads as a device that is not the CPU, and is still where a new tensor can be made."""

    type = "accelerator"


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is not on the CPU, so that the path of the other devices runs without one."""

    device = AcceleratorName("cpu")


@pytest.fixture(params=["few keys", "many keys"])
def softmax_path(request, monkeypatch):
    """Both softmaxes of the reference on the CPU, whatever the number of keys in a test."""
    monkeypatch.setattr(reference, "FEW_KEYS", 10**6 if request.param == "few keys" else 0)


@pytest.fixture(params=["rows", "masked"])
def attend(request, monkeypatch, softmax_path):
    """`ops.attention` by either path of the reference; the masks that its softmax gets prove which one ran."""
    masked, masks, sdpa = request.param == "masked", [], reference.sdpa
    monkeypatch.setattr(reference, "sdpa", lambda q, k, v, mask=None: masks.append(mask) or sdpa(q, k, v, mask))

    def call(q, *args):
        return ops.attention(q.as_subclass(Elsewhere) if masked else q, *args).as_subclass(torch.Tensor)

    yield call
    assert masks
    assert all((mask is not None) == masked for mask in masks)


def softmax_attention(q, keys, values):
    """One query [D] over keys, values [n, D], element by element."""
    scores = [sum(a * b for a, b in zip(q.tolist(), key.tolist())) / math.sqrt(len(q)) for key in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w * value for w, value in zip(weights, values)) / sum(weights)


def frames_of(runs):
    """The frames of one row's runs, in their order."""
    return [frame for start, stop in runs for frame in range(start, stop)]


def naive(q, k_cache, v_cache, slot, keys):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        frames = frames_of(keys[b].tolist())
        if frames:
            k, v = (c[int(slot[b]), frames, :, h].flatten(0, 1).double() for c in (k_cache, v_cache))
            out[b, t, h] = softmax_attention(q[b, t, h].double(), k, v)
    return out


def cache_with_nan(shape, slot, keys):
    """Random frames where they count and NaN everywhere else, the slots of no row included."""
    k, v = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    for s, runs in zip(slot, keys):
        frames = frames_of(runs)
        k[s, frames], v[s, frames] = torch.randn(2, len(frames), *shape[2:])
    return k, v


@pytest.mark.parametrize(
    "slot, keys",
    [
        ([0], [[(0, 1)]]),
        ([2], [[(0, 5)]]),
        ([3, 0], [[(2, 3)], [(0, 5)]]),
        ([1, 2, 0], [[(1, 4)], [(0, 2)], [(3, 5)]]),
        ([2], [[(0, 1), (3, 5)]]),
        ([1, 3], [[(3, 5), (0, 2)], [(1, 1), (4, 5)]]),
        ([0, 0], [[(0, 2)], [(1, 4)]]),
        ([1, 2], [[(2, 3), (0, 0), (4, 5)], [(3, 3), (2, 2), (5, 5)]]),
    ],
)
def test_rows_read_their_own_slot_and_runs(slot, keys, attend, close):
    k, v = cache_with_nan((4, 5, 3, 2, 8), slot, keys)
    slot, keys = torch.tensor(slot), torch.tensor(keys)
    q = torch.randn(len(slot), 6, 2, 8)
    close(attend(q, k, v, slot, keys), naive(q, k, v, slot, keys), rel=1e-5)


def test_a_row_without_keys_gives_zeros(attend):
    k, v = cache_with_nan((2, 4, 2, 1, 4), [0, 1], [[(1, 1)], [(0, 2)]])
    out = attend(torch.randn(2, 3, 1, 4), k, v, torch.tensor([0, 1]), torch.tensor([[[1, 1]], [[0, 2]]]))
    assert out[0].abs().max() == 0 and out[1].abs().min() > 0


ALL = torch.tensor([[[0, 3]]])  # one row, one run, three frames


def test_infinite_values_in_unused_frames_stay_out(attend, close):
    k, v = cache_with_nan((1, 4, 2, 1, 4), [0], [[(0, 3)]])
    q, slot = torch.randn(1, 2, 1, 4), torch.tensor([0])
    expected = naive(q, k, v, slot, ALL)
    k[:, 3:], v[:, 3:] = float("inf"), float("-inf")
    close(attend(q, k, v, slot, ALL), expected, rel=1e-5)


def test_large_scores_do_not_overflow(attend, close):
    k, v = torch.randn(2, 1, 3, 4, 2, 8)
    q, slot = 100 * torch.randn(1, 4, 2, 8), torch.tensor([0])
    close(attend(q, k, v, slot, ALL), naive(q, k, v, slot, ALL), rel=1e-4)


def test_frames_lie_in_any_order(attend, close):
    """What lets the ring keep its data in place: the order of the frames in a slot does not matter."""
    k, v = torch.randn(2, 1, 3, 5, 2, 8)
    q, slot = torch.randn(1, 3, 2, 8), torch.tensor([0])
    order = torch.tensor([2, 0, 1])
    close(attend(q, k[:, order], v[:, order], slot, ALL), naive(q, k, v, slot, ALL), rel=1e-5)


def test_a_half_precision_cache_serves_float32_queries(attend, close):
    k, v = (c.bfloat16() for c in torch.randn(2, 1, 3, 2, 2, 8))
    q, slot = torch.randn(1, 2, 2, 8), torch.tensor([0])
    out = attend(q, k, v, slot, ALL)
    assert out.dtype == torch.float32
    close(out, naive(q, k, v, slot, ALL), rel=1e-5)


def random_scales(slots, heads):
    """One scale a slot and head for keys and values, and a shift that attention must not read."""
    return CacheScales(*(0.5 + torch.rand(2, slots, heads, device=DEVICE)))


def test_an_fp8_cache_is_scaled_by_slot_and_head(attend, close):
    """Closed form: key = k * stored, value = v * stored; NaN in what stays unused and in the shift."""
    slot, runs = [2, 0], [[(1, 3)], [(0, 2)]]
    k, v = (x.to(torch.float8_e4m3fn) for x in cache_with_nan((3, 4, 2, 2, 8), slot, runs))
    slot, keys, scales = torch.tensor(slot), torch.tensor(runs), CacheScales(*(x.cpu() for x in random_scales(3, 2)))
    q = torch.randn(2, 3, 2, 8)
    wide = (c.float() * s[:, None, None, :, None] for c, s in zip((k, v), scales))
    close(attend(q, k, v, slot, keys, scales), naive(q, *wide, slot, keys), rel=1e-5)


@pytest.mark.parametrize("batch, queries, keys", [(1, 1, 1), (2, 5, 3), (3, 2, 7)])
def test_cross_attention_attends_to_every_key(batch, queries, keys, softmax_path, close):
    q, (k, v) = torch.randn(batch, queries, 2, 8), torch.randn(2, batch, keys, 2, 8)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for b, t, h in itertools.product(range(batch), range(queries), range(2)):
        expected[b, t, h] = softmax_attention(q[b, t, h].double(), k[b, :, h].double(), v[b, :, h].double())
    close(ops.cross_attention(q, k, v), expected, rel=1e-5)


def test_keys_beyond_those_used_stay_out(softmax_path, close):
    q, (k, v) = torch.randn(2, 3, 2, 8), torch.randn(2, 2, 5, 2, 8)
    k[0, 2:], v[0, 2:], k[1, 4:], v[1, 4:] = (float("nan"),) * 4
    out = ops.cross_attention(q, k, v, torch.tensor([2, 4]), torch.ones(2))
    for b, n in enumerate((2, 4)):
        close(out[b : b + 1], ops.cross_attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]), rel=1e-5)


@st.composite
def collapsed(draw):
    """Rows with the keys they use and how often the last of them counts."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    used = draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
    return length, used, draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))


def repeated(x, used, repeat):
    """One row [L, H, D]: its used keys, the last of them `repeat` times."""
    return torch.cat((x[:used], x[used - 1 : used].expand(repeat - 1, -1, -1)))


@given(case=collapsed())
def test_one_key_stands_for_many_equal_ones(case):
    length, used, repeat = case
    q, (k, v) = torch.randn(len(used), 3, 2, 8), torch.randn(2, len(used), length, 2, 8)
    out = ops.cross_attention(q, k, v, torch.tensor(used), torch.tensor(repeat).float())
    for b, counts in enumerate(zip(used, repeat)):
        every = ops.cross_attention(q[b : b + 1], *(repeated(x[b], *counts)[None] for x in (k, v)))
        assert (out[b] - every[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "q, cache",
    [
        ((1, 4, 2, 8), (1, 3, 4, 2, 6)),
        ((1, 4, 3, 8), (1, 3, 4, 2, 8)),
        ((1, 4, 16), (1, 3, 4, 2, 8)),
        ((1, 4, 2, 8), (3, 4, 2, 8)),
    ],
)
def test_attention_names_shapes_that_do_not_fit(q, cache):
    row = torch.tensor([0])
    with pytest.raises(ValueError, match="attention: q") as error:
        ops.attention(torch.zeros(q), torch.zeros(cache), torch.zeros(cache), row, torch.zeros(1, 1, 2))
    assert str(list(q)) in str(error.value) and str(list(cache)) in str(error.value)


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)),
        ((1, 4, 2, 8), (1, 3, 2, 6), (1, 3, 2, 6)),
        ((1, 4, 2, 8), (1, 3, 2, 8), (1, 5, 2, 8)),
        ((1, 4, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8)),
    ],
)
def test_cross_attention_names_shapes_that_do_not_fit(q, k, v):
    with pytest.raises(ValueError, match="cross_attention") as error:
        ops.cross_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert all(str(list(shape)) in str(error.value) for shape in (q, k, v))


def exact_attention(q, k, v):
    """One row in float64: q [T, H, D] over k, v [n, H, D]; zeros without keys."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1)


def exact_over_runs(q, k_cache, v_cache, slot, runs, scales):
    """All rows in float64: slot a list of numbers, runs a list of lists of pairs."""
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
    shape = (2, slots, window, frame, heads, head_dim)  # of the real size 200 million numbers: a CPU takes 4 s for them
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
def test_the_kernel_reads_the_runs_and_nothing_else(small_tiles, dtype, case, splits):
    check_attention(*case, dtype, dtype, splits)


@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(case=lookups(), splits=st.integers(1, 3))
def test_the_kernel_reads_an_fp8_cache(small_tiles, dtype, case, splits):
    check_attention(*case, dtype, torch.float8_e4m3fn, splits)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens, head_dim", [(50, 32), (70, 64), (130, 128)])
def test_the_kernel_with_its_own_tiles(tokens, head_dim, cache_dtype):
    check_attention(1, tokens, 2, head_dim, 37, 7, 2, [1], [[(0, 1), (4, 7)]], torch.bfloat16, cache_dtype, 2)


def test_the_kernel_serves_float32_queries_from_a_half_precision_cache(small_tiles):
    check_attention(1, 5, 1, 16, 7, 3, 1, [0], [[(0, 3)]], torch.float32, torch.bfloat16, 1)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel_gives_zeros_without_keys(small_tiles, splits):
    check_attention(
        2, 18, 1, 16, 3, 4, 1, [0, 0], [[(2, 2), (4, 1)], [(0, 0), (0, 0)]], torch.float32, torch.float32, splits
    )


@pytest.mark.parametrize(
    "dtype, cache_dtype",
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn), (torch.float32, torch.float32)],
)
def test_the_kernel_with_large_scores(small_tiles, dtype, cache_dtype):
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
def test_the_kernel_attends_to_the_prompt(small_tiles, dtype, case, tokens, extra, splits):
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
def test_the_kernel_attends_to_every_key_of_the_prompt(small_tiles, length):
    """Views of one product, and keys that fill their tiles exactly or not at all."""
    q, k, v = torch.randn(2, 33, 3, 2, 16, device=DEVICE).unbind(2)
    k, v = k[:, :length], v[:, :length]
    exact = torch.stack([exact_attention(q[b], k[b], v[b]) for b in range(2)])
    compare(kernel.cross_attention(q, k, v), reference.cross_attention(q, k, v), exact)


def test_the_kernel_takes_no_queries():
    q, cache = torch.zeros(1, 0, 1, 16, device=DEVICE), poison(2, 1, 2, 3, 1, 16)
    row = torch.zeros(1, dtype=torch.long, device=DEVICE)
    assert kernel.attention(q, *cache, row, row.repeat(2).view(1, 1, 2)).shape == q.shape


@pytest.mark.parametrize("head_dim, nearest", [(8, 16), (24, 16), (96, 64), (100, 128), (256, 128)])
def test_the_kernel_names_the_nearest_head_dim(head_dim, nearest):
    x = torch.zeros(1, 2, 1, head_dim, device=DEVICE)
    with pytest.raises(ValueError, match=f"head dim {head_dim} .* nearest is {nearest}"):
        kernel.cross_attention(x, x, x)


@pytest.mark.parametrize("wrong", ["q", "k", "v", "cache", "keys"])
def test_the_kernel_refuses_strides_that_it_does_not_read(wrong):
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


def test_the_kernel_names_how_many_keys_its_addresses_reach():
    q, k = (torch.empty(1, n, 64, 128, device="meta") for n in (1, 2**20))
    with pytest.raises(ValueError, match="nearest is 262143 keys"):
        kernel.cross_attention(q, k, k)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("runs", [[(0, 3)], [(0, 3), (6, 15)], [(0, 21), (4, 4)]], ids=["4680", "18720", "32760"])
def test_the_kernel_at_real_shapes(runs, cache_dtype):
    dtype = torch.float16 if cache_dtype == torch.float16 else torch.bfloat16
    check_attention(1, 4680, 12, 128, 1560, 21, 2, [1], [runs], dtype, cache_dtype, 2)


@pytest.mark.gpu
def test_the_kernel_gives_the_same_bits_every_time():
    q = torch.randn(1, 4680, 12, 128, device=DEVICE).bfloat16()
    k, v = torch.randn(2, 1, 6, 1560, 12, 128, device=DEVICE).bfloat16()
    args = q, k, v, torch.zeros(1, dtype=torch.long, device=DEVICE), torch.tensor([[[0, 2], [3, 6]]], device=DEVICE)
    first = kernel.attention(*args)
    assert all(torch.equal(first, kernel.attention(*args)) for _ in range(3))
