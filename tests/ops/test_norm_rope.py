"""RMSNorm, rotation and the append to the cache: the reference against loops in float64, the Triton kernels against
float64 beside the reference."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine import ops
from dsa_engine.ops import CacheScales, reference
from dsa_engine.triton_kernels import norm_rope as kernel
from tests.support.kernels import DEVICE, DTYPES, compare, poison, poisoned_memory, split_rows

EPS = 1e-6


def naive_rms_norm(x, weight):
    """x [C], weight [C] -> list of floats."""
    scale = 1 / math.sqrt(sum(a * a for a in x.tolist()) / len(x) + EPS)
    return [a * scale * g for a, g in zip(x.tolist(), weight.tolist())]


def naive_norm_rope(x, weight, cos, sin):
    """x [B, T, C] -> [B, T, H, D]: each neighbouring pair is a complex number that is turned."""
    batch, tokens, channels = x.shape
    pairs = cos.shape[-1]
    out = torch.zeros(batch, tokens, channels // (2 * pairs), 2 * pairs, dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            normed = naive_rms_norm(x[b, t], weight)
            for i in range(channels // 2):
                h, j = divmod(i, pairs)
                turned = complex(normed[2 * i], normed[2 * i + 1]) * complex(cos[b, t, j], sin[b, t, j])
                out[b, t, h, 2 * j], out[b, t, h, 2 * j + 1] = turned.real, turned.imag
    return out


def inputs(batch, frames, tokens, heads, head_dim):
    """q, k, v [B, T, C] of unlike scale, weights [C], and angles that differ in every row, token and pair."""
    scales = torch.tensor([3.0, 0.2, 1.0])
    q, k, v = torch.randn(3, batch, frames * tokens, heads * head_dim) * scales[:, None, None, None]
    angles = 100 * torch.rand(batch, frames * tokens, head_dim // 2)
    return q, k, v, *torch.randn(2, heads * head_dim), angles.cos(), angles.sin()


@pytest.mark.parametrize("shape", [(8,), (3, 12), (2, 3, 10)])
def test_rms_norm_is_over_the_last_dim(shape, close):
    x, weight = 5 * torch.randn(shape), torch.randn(shape[-1])
    expected = torch.tensor([naive_rms_norm(row, weight) for row in x.double().view(-1, shape[-1])]).view(shape)
    close(ops.rms_norm(x, weight, EPS), expected, rel=1e-5)


def test_rms_norm_of_zeros_is_zero():
    assert ops.rms_norm(torch.zeros(2, 4), torch.ones(4), EPS).abs().max() == 0


def test_rms_norm_takes_its_mean_in_float32(close):
    """Squares of 1000 overflow half precision's range, and 0.001 underflows it."""
    x = torch.tensor([[1000.0, -1000.0, 500.0, 250.0], [1e-3, 2e-3, -1e-3, 3e-3]]).half()
    out = ops.rms_norm(x, torch.ones(4), EPS)
    assert out.dtype == torch.float16
    close(out, torch.tensor([naive_rms_norm(row, torch.ones(4)) for row in x.double()]), rel=1e-3)


@pytest.mark.parametrize("batch, frames, tokens, heads, head_dim", [(1, 1, 1, 1, 6), (2, 3, 2, 3, 8), (3, 1, 4, 2, 16)])
def test_norm_rope_normalises_the_full_width_then_turns_pairs(batch, frames, tokens, heads, head_dim, close):
    q, k, _, weight_q, weight_k, cos, sin = inputs(batch, frames, tokens, heads, head_dim)
    rotated_q, rotated_k = ops.norm_rope(q, k, weight_q, weight_k, cos, sin, EPS)
    close(rotated_q, naive_norm_rope(q, weight_q, cos, sin), rel=1e-5)
    close(rotated_k, naive_norm_rope(k, weight_k, cos, sin), rel=1e-5)


def test_a_quarter_turn(close):
    """(1, 0) by 90 degrees is (0, 1): the direction of the rotation."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]).view(1, 1, 6)
    turn = [cmath.rect(1, math.pi / 2)] * 3
    cos, sin = torch.tensor([z.real for z in turn]).view(1, 1, 3), torch.tensor([z.imag for z in turn]).view(1, 1, 3)
    q, _ = ops.norm_rope(x, x, torch.ones(6), torch.ones(6), cos, sin, EPS)
    scale = math.sqrt(6 / 4)
    close(q.flatten(), scale * torch.tensor([0.0, 1.0, -1.0, 0.0, -1.0, 1.0]), rel=1e-5)


def append(q, k, v, weight_q, weight_k, cos, sin, cache, slot, write):
    return ops.norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, EPS, *cache, slot, write)


@pytest.mark.parametrize(
    "slot, write", [([0], [[0]]), ([2], [[1, 2]]), ([3, 0], [[0, 1], [3, 4]]), ([1, 2, 0], [[4, 1], [1, 2], [0, 3]])]
)
def test_append_writes_the_named_frames_and_no_others(slot, write, close):
    frames, tokens, heads, head_dim = len(write[0]), 3, 2, 8
    q, k, v, weight_q, weight_k, cos, sin = inputs(len(slot), frames, tokens, heads, head_dim)
    cache = torch.randn(2, 4, 5, tokens, heads, head_dim)
    before = cache.clone()
    out = append(q, k, v, weight_q, weight_k, cos, sin, cache, torch.tensor(slot), torch.tensor(write))

    close(out, naive_norm_rope(q, weight_q, cos, sin), rel=1e-5)
    keys = naive_norm_rope(k, weight_k, cos, sin)
    untouched = torch.ones(cache.shape[1:3], dtype=torch.bool)
    for b, (s, row) in enumerate(zip(slot, write)):
        for f, w in enumerate(row):
            chunk = slice(f * tokens, (f + 1) * tokens)
            close(cache[0, s, w], keys[b, chunk], rel=1e-5)
            assert torch.equal(cache[1, s, w], v[b, chunk].view(tokens, heads, head_dim))
            untouched[s, w] = False
    assert torch.equal(cache[:, untouched], before[:, untouched])


def test_append_rounds_to_the_dtype_of_the_cache(close):
    q, k, v, weight_q, weight_k, cos, sin = inputs(1, 1, 2, 2, 8)
    cache = torch.zeros(2, 1, 3, 2, 2, 8, dtype=torch.bfloat16)
    append(q, k, v, weight_q, weight_k, cos, sin, cache, torch.tensor([0]), torch.tensor([[1]]))
    close(cache[0, 0, 1], naive_norm_rope(k, weight_k, cos, sin)[0], rel=2**-8)
    assert torch.equal(cache[1, 0, 1], v[0].view(2, 2, 8).bfloat16())


@pytest.mark.parametrize("wrong", ["k", "v", "frames", "tokens"])
def test_append_names_shapes_that_do_not_fit(wrong):
    q, k, v, weight_q, weight_k, cos, sin = inputs(1, 2, 3, 2, 8)
    k = k[:, :-1] if wrong == "k" else k
    v = v[..., :-1] if wrong == "v" else v
    write = torch.zeros(1, 3 if wrong == "frames" else 2, dtype=torch.long)
    cache = torch.zeros(2, 1, 5, 4 if wrong == "tokens" else 3, 2, 8)
    with pytest.raises(ValueError, match="norm_rope_append: q") as error:
        append(q, k, v, weight_q, weight_k, cos, sin, cache, torch.tensor([0]), write)
    assert all(str(list(x.shape)) in str(error.value) for x in (q, k, v))
    assert f"F = {write.shape[1]}" in str(error.value) and f"S = {cache.shape[3]}" in str(error.value)
    assert cache.abs().max() == 0


def random_scales(slots, heads):
    """Scales that use e4m3's range and now and then leave it."""
    return CacheScales(*(0.002 + 0.02 * torch.rand(2, slots, heads, device=DEVICE)))


def nearest_e4m3(x):
    """The number of e4m3 nearest to x, the even one of two: 8 steps to each power of two down to 2^-6, up to 448."""
    step = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3)
    return math.copysign(min(abs(round(x / step) * step), 448.0), x)


def test_an_fp8_cache_holds_scaled_values():
    """Closed form, element by element; the scales belong to the slot, not to the row."""
    q, k, v, weight_q, weight_k, cos, sin = inputs(2, 1, 3, 2, 8)
    cache = torch.zeros(2, 3, 2, 3, 2, 8, dtype=torch.float8_e4m3fn)
    slot, scales = torch.tensor([2, 0]), CacheScales(*(x.cpu() for x in random_scales(3, 2)))
    ops.norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, EPS, *cache, slot, torch.tensor([[1], [0]]), scales)
    keys = reference.norm_rope(q, k, weight_q, weight_k, cos, sin, EPS)[1]
    for b, (s, w) in enumerate([(2, 1), (0, 0)]):
        for t in range(3):
            for h in range(2):
                for d in range(8):
                    key, value = keys[b, t, h, d], v[b, t, 8 * h + d]
                    assert cache[0, s, w, t, h, d].float() == nearest_e4m3((key / scales.k[s, h]).item())
                    assert cache[1, s, w, t, h, d].float() == nearest_e4m3((value / scales.v[s, h]).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_scales_go_with_an_fp8_cache_alone(dtype):
    q, k, v, weight_q, weight_k, cos, sin = inputs(1, 1, 2, 2, 8)
    cache = torch.zeros(2, 1, 1, 2, 2, 8, dtype=dtype)
    scales = random_scales(1, 2) if dtype == torch.float32 else None
    with pytest.raises(ValueError, match="norm_rope_append: cache of .* e4m3 has them"):
        ops.norm_rope_append(
            q, k, v, weight_q, weight_k, cos, sin, EPS, *cache, torch.tensor([0]), torch.tensor([[0]]), scales
        )


def exact_rms_norm(x, weight):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_norm_rope(x, weight, cos, sin):
    """`naive_norm_rope` without its loops, in float64."""
    pairs = torch.view_as_complex(exact_rms_norm(x, weight).unflatten(-1, (-1, cos.shape[-1], 2)))
    return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, :, None]).flatten(-2)


def kernel_inputs(batch, frames, tokens, heads, head_dim, dtype):
    """q, k, v as views of one tensor, weights and angles, where the kernels run."""
    channels, shape = heads * head_dim, (batch, frames * tokens, heads * head_dim)
    angles = 100 * torch.rand(batch, frames * tokens, head_dim // 2, device=DEVICE)
    weights = torch.randn(2, channels, device=DEVICE).to(dtype)
    return *split_rows(*shape, dtype=dtype, scale=3.0), *weights, angles.cos(), angles.sin()


SHAPES = st.tuples(*(st.integers(1, n) for n in (3, 2, 3, 5)), st.sampled_from((2, 8, 16, 32)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), channels=st.integers(1, 200), scale=st.sampled_from((1e-3, 1.0, 1e3)))
def test_the_kernel_of_rms_norm(dtype, rows, channels, scale):
    x, other = split_rows(2, rows, channels, dtype=dtype, parts=2, scale=scale)
    other.fill_(float("nan"))  # what lies between the rows
    weight = torch.randn(channels, device=DEVICE).to(dtype)
    with poisoned_memory():
        out = kernel.rms_norm(x, weight, EPS)
    compare(out, reference.rms_norm(x, weight, EPS), exact_rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=SHAPES)
def test_the_kernel_of_norm_rope(dtype, shape):
    q, k, _, *rest = kernel_inputs(*shape, dtype)
    with poisoned_memory():
        outs = kernel.norm_rope(q, k, *rest, EPS)
    weight_q, weight_k, *rope = rest
    for out, plain, x, weight in zip(outs, reference.norm_rope(q, k, *rest, EPS), (q, k), (weight_q, weight_k)):
        compare(out, plain, exact_norm_rope(x, weight, *rope))


@st.composite
def appends(draw):
    """Shape, slots and frames to write: rows may share a slot, if their frames differ."""
    shape = batch, frames, *_ = draw(SHAPES)
    slots, window = draw(st.integers(1, 3)), batch * frames + draw(st.integers(0, 2))
    slot = draw(st.lists(st.integers(0, slots - 1), min_size=batch, max_size=batch))
    order = draw(st.permutations(range(window)))
    write = [order[b * frames : (b + 1) * frames] for b in range(batch)]
    return shape, slots, window, slot, write


def check_append(shape, slots, window, slot, write, dtype, cache_dtype, integers=torch.long):
    """The kernel beside the reference: what it returns, the frames it writes, and those it must leave alone."""
    batch, frames, tokens, heads, head_dim = shape
    q, k, v, weight_q, weight_k, cos, sin = kernel_inputs(*shape, dtype)
    slot, write = (torch.tensor(x, device=DEVICE, dtype=integers) for x in (slot, write))
    scales = random_scales(slots, heads) if cache_dtype == torch.float8_e4m3fn else None
    out, plain = (poison(2, slots, window, tokens, heads, head_dim, dtype=cache_dtype) for _ in range(2))
    args = (q, k, v, weight_q, weight_k, cos, sin, EPS)
    with poisoned_memory():
        rotated = kernel.norm_rope_append(*args, *out, slot, write, scales)
    compare(
        rotated,
        reference.norm_rope_append(*args, *plain, slot.long(), write.long(), scales),
        exact_norm_rope(q, weight_q, cos, sin),
    )

    keys, values = exact_norm_rope(k, weight_k, cos, sin), v.double().unflatten(-1, (heads, head_dim))
    if scales is not None:
        keys = (keys / scales.k[slot][:, None, :, None]).clamp(-448, 448)
        values = (values / scales.v[slot][:, None, :, None]).clamp(-448, 448)
    touched = torch.zeros(slots, window, dtype=torch.bool, device=DEVICE)
    touched[slot.long()[:, None], write.long()] = True
    for got, expected, exact in zip(out.float(), plain.float(), (keys, values)):
        at = (slot.long()[:, None], write.long())
        # A rounding to e4m3 dwarfs all others, and one of the wrong kind would be twice as far off.
        compare(got[at], expected[at], exact.unflatten(1, (frames, -1)), factor=2.0 if scales is None else 1.2)
        assert got[~touched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=appends())
def test_the_kernel_of_the_append(dtype, case):
    check_append(*case, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=appends())
def test_the_kernel_of_the_append_to_fp8(dtype, case):
    check_append(*case, dtype, torch.float8_e4m3fn, torch.int32)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_kernel_at_the_width_of_wan(cache_dtype):
    check_append((1, 2, 2, 12, 128), 2, 5, [1], [[4, 0]], torch.bfloat16, cache_dtype)


def test_the_kernel_keeps_a_quiet_row_and_a_loud_one_apart():
    """Rows of unlike size side by side: a sum over the wrong elements would show in the small one."""
    x = torch.randn(1, 3, 48, device=DEVICE) * torch.tensor([1e-2, 1e4, 1.0], device=DEVICE)[:, None]
    weight, flat = torch.ones(48, device=DEVICE), torch.ones(1, 3, 8, device=DEVICE)
    out = kernel.norm_rope(x, x, weight, weight, flat, 0 * flat, EPS)[0].flatten(-2)
    compare(out, reference.rms_norm(x, weight, EPS), exact_rms_norm(x, weight))


def test_the_kernel_takes_no_tokens():
    q, k, v, *rest = kernel_inputs(2, 1, 0, 2, 8, torch.float32)
    cache = poison(2, 1, 1, 0, 2, 8)
    row = torch.zeros(2, dtype=torch.long, device=DEVICE)
    assert kernel.norm_rope_append(q, k, v, *rest, EPS, *cache, row, row[:, None]).shape == (2, 0, 2, 8)
    assert kernel.rms_norm(q, rest[0], EPS).shape == (2, 0, 16)


@pytest.mark.parametrize("head_dim, nearest", [(6, 8), (10, 8), (24, 32), (96, 128)])
def test_the_kernel_names_the_nearest_head_dim(head_dim, nearest):
    q, k, _, *rest = kernel_inputs(1, 1, 2, 1, head_dim, torch.float32)
    with pytest.raises(ValueError, match=f"head dim {head_dim} must be a power of two; nearest is {nearest}"):
        kernel.norm_rope(q, k, *rest, EPS)


@pytest.mark.parametrize("wrong", ["q", "v", "weight", "cos", "write", "cache"])
def test_the_kernel_refuses_strides_that_it_does_not_read(wrong):
    q, k, v, weight_q, weight_k, cos, sin = kernel_inputs(2, 1, 2, 2, 8, torch.float32)
    cache, row = poison(2, 1, 4, 2, 2, 8), torch.zeros(2, dtype=torch.long, device=DEVICE)
    given = {"q": q, "v": v, "weight": weight_q, "cos": cos, "write": row[:, None], "cache": cache[0]}
    x = given[wrong]
    given[wrong] = torch.stack((x, x), dim=-1)[..., 0]
    assert given[wrong].stride() != x.stride()
    with pytest.raises(ValueError, match="contiguous"):
        kernel.norm_rope_append(
            given["q"],
            k,
            given["v"],
            given["weight"],
            weight_k,
            given["cos"],
            sin,
            EPS,
            given["cache"],
            cache[1],
            row,
            given["write"],
        )


@pytest.mark.parametrize("wrong", ["x", "weight"])
def test_the_kernel_of_rms_norm_refuses_strides_that_it_does_not_read(wrong):
    x, weight = torch.zeros(2, 16, device=DEVICE), torch.zeros(16, device=DEVICE)
    with pytest.raises(ValueError, match="rms_norm: .* contiguous"):
        kernel.rms_norm(*((x[:, ::2], weight[:8]) if wrong == "x" else (x[:, :8], weight[::2])), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_the_kernel_at_real_shapes(dtype, fp8):
    check_append(
        (2, 3, 1560, 12, 128), 3, 21, [2, 0], [[20, 3, 4], [0, 1, 2]], dtype, torch.float8_e4m3fn if fp8 else dtype
    )
