"""csrc/norm_rope on the host against plain torch: views, odd sizes, NaN in all that must not be read."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops import reference
from tests.support.csrc.emulated import check_error

EPS = 1e-6
FLOOR = 1e-6  # float32 sums of up to 2176 squares in another order: a few roundings of 6e-8, on both sides
# dtype, B, F, S, H, D: one vector of channels, a part of a warp, Wan's width (a full warp), several warps a row
SHAPES = [
    (torch.bfloat16, 3, 1, 1, 1, 8),
    (torch.bfloat16, 2, 3, 5, 3, 64),
    (torch.bfloat16, 1, 1, 3, 12, 128),
    (torch.bfloat16, 1, 2, 3, 17, 128),
    (torch.float32, 2, 3, 3, 5, 24),
    (torch.float32, 1, 1, 2, 17, 128),
    (torch.float16, 1, 2, 3, 2, 32),
]


def inputs(dtype, batch, frames, tokens, heads, head_dim, margin=8):
    """q, k, v: unlike in scale, views of one tensor with NaN beside them; weight of q float32, of k in the dtype."""
    width = heads * head_dim
    qkv = torch.full((batch, frames * tokens, 3 * width + margin), float("nan")).to(dtype)
    qkv[..., : 3 * width] = torch.randn(batch, frames * tokens, 3 * width).to(dtype)
    q, k, v = qkv[..., : 3 * width].split(width, dim=-1)
    k *= 0.1
    angles = 100 * torch.rand(batch, frames * tokens, head_dim // 2)
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=2)  # views again
    return q, k, v, torch.randn(width), torch.randn(width).to(dtype), cos_sin[:, :, 0], cos_sin[:, :, 1]


def exactly(function, *args):
    """The float32 reference: the same values, nothing rounded in between."""
    return function(*(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(cuda_orders, shape):
    q, _, _, _, weight, *_ = inputs(*shape)
    for x in (q, q[0, 0], q[None]):
        out = cuda_orders.rms_norm(x, weight, EPS)
        assert out.shape == x.shape and out.dtype == x.dtype
        plain, exact = reference.rms_norm(x, weight, EPS), exactly(reference.rms_norm, x, weight, EPS)
        check_error("rms_norm", out, plain, exact, FLOOR)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_rope(cuda_orders, shape):
    q, k, _, weight_q, weight_k, cos, sin = inputs(*shape)
    args = (q, k, weight_q, weight_k, cos, sin, EPS)
    for name, ours, plain, exact in zip(
        "qk", cuda_orders.norm_rope(*args), reference.norm_rope(*args), exactly(reference.norm_rope, *args)
    ):
        assert ours.dtype == q.dtype
        check_error(name, ours, plain, exact, FLOOR)


def caches(batch, window, tokens, heads, head_dim, dtype):
    """One layer of K and V with more slots than rows, full of NaN, as a view of several layers."""
    both = torch.full((2, 3, batch + 2, window, tokens, heads, head_dim), float("nan")).to(dtype)
    return both[0, 1], both[1, 1], both


def frames_for(batch, frames, window, index_dtype):
    """Slots in no order, and frames that wrap round the end of the window."""
    slot = torch.randperm(batch + 2)[:batch].to(index_dtype)
    write = (torch.arange(frames) + torch.randint(window, (batch, 1))) % window
    return slot, write.to(index_dtype)


def check_append(cuda, shape, cache_dtype, index_dtype, scales=None, slot=None):
    dtype, batch, frames, tokens, heads, head_dim = shape
    args = (*inputs(*shape), EPS)
    window = frames + 2
    anywhere, write = frames_for(batch, frames, window, index_dtype)
    slot = anywhere if slot is None else slot
    (k, v, both), (k_plain, v_plain, _), (k_exact, v_exact, _) = (
        caches(batch, window, tokens, heads, head_dim, d) for d in (cache_dtype, cache_dtype, torch.float32)
    )
    out = cuda.norm_rope_append(*args, k, v, slot, write, scales)
    slot, write = slot.long(), write.long()
    plain = reference.norm_rope_append(*args, k_plain, v_plain, slot, write, scales)
    exact = exactly(reference.norm_rope_append, *args, k_exact, v_exact, slot, write)
    check_error("q", out, plain, exact, FLOOR)
    written = slot[:, None], write
    ours, theirs = ((a[written].float(), b[written].float()) for a, b in ((k, v), (k_plain, v_plain)))
    if scales is not None:
        ours, theirs = (restore(*x, slot, scales) for x in (ours, theirs))
    check_error("k", ours[0], theirs[0], k_exact[written], FLOOR)
    check_error("v", ours[1], theirs[1], v_exact[written], FLOOR)
    rest = both.float()
    rest[:, 1, slot[:, None], write] = float("nan")
    assert rest.isnan().all(), "a frame was written that nobody named"


def restore(k, v, slot, scales):
    """Keys and values [B, F, S, H, D] from what the FP8 cache holds."""
    return tuple(x * scale[slot][:, None, None, :, None] for x, scale in zip((k, v), scales))


@pytest.mark.parametrize("shape", SHAPES)
def test_append_writes_the_named_frames_and_no_others(cuda_orders, shape):
    check_append(cuda_orders, shape, shape[0], torch.int64)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_append_rounds_to_the_dtype_of_the_cache(cuda, cache_dtype):
    check_append(cuda, (torch.float32, 2, 2, 3, 3, 40), cache_dtype, torch.int32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] == torch.bfloat16])
def test_append_to_an_fp8_cache(cuda_orders, shape):
    """Each slot has its own scales; those of slots that are not written are NaN."""
    _, batch, _, _, heads, _ = shape
    slots = batch + 2
    scales = CacheScales(*(0.04 + 0.1 * torch.rand(2, slots, heads)))
    used = torch.randperm(slots)[:batch]
    for x in scales:
        x[[s for s in range(slots) if s not in used]] = float("nan")
    check_append(cuda_orders, shape, torch.float8_e4m3fn, torch.int64, scales, used)


def test_fp8_saturates_and_keeps_nan(cuda):
    """Beyond 448 the largest number, not NaN; NaN stays what it is."""
    q, k, v, weight_q, weight_k, cos, sin = inputs(torch.float32, 1, 1, 1, 1, 8)
    v[0, 0, :4] = torch.tensor([1e6, -1e6, float("nan"), 450.0])
    k_cache, v_cache, _ = caches(1, 1, 1, 1, 8, torch.float8_e4m3fn)
    ones = CacheScales(*torch.ones(2, 3, 1))
    zero = torch.zeros(1, 1, dtype=torch.long)
    cuda.norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, EPS, k_cache, v_cache, zero[0], zero, ones)
    assert v_cache[0, 0, 0, 0, :4].float().tolist()[:2] == [448.0, -448.0]
    assert v_cache[0, 0, 0, 0, 2].float().isnan() and v_cache[0, 0, 0, 0, 3].float() == 448.0


def test_refusals_name_the_value_and_the_nearest(cuda):
    x = torch.randn(1, 3, 64)
    with pytest.raises(ValueError, match="C = 12 must be a multiple of 8 and at most 16384; nearest is 16"):
        cuda.rms_norm(torch.randn(2, 12), torch.ones(12), EPS)
    with pytest.raises(ValueError, match="C = 20000 .* nearest is 16384"):
        cuda.rms_norm(torch.randn(2, 20000), torch.ones(20000), EPS)
    with pytest.raises(ValueError, match=r"strides \[384, 128, 2\], .* rows must be contiguous"):
        cuda.norm_rope(x.repeat(1, 1, 2)[..., ::2], x, torch.ones(64), torch.ones(64), *torch.rand(2, 1, 3, 4), EPS)
    with pytest.raises(ValueError, match="4 bytes off"):
        cuda.rms_norm(torch.randn(65)[1:], torch.ones(64), EPS)
    with pytest.raises(ValueError, match="weight of torch.float16 must be float32 or torch.bfloat16"):
        cuda.rms_norm(x.bfloat16(), torch.ones(64).half(), EPS)
    with pytest.raises(ValueError, match="head dim 12 must be a multiple of 8 that divides C = 64"):
        cuda.norm_rope(x, x, torch.ones(64), torch.ones(64), *torch.rand(2, 1, 3, 6), EPS)
    with pytest.raises(ValueError, match="x of torch.float64 must be of one of float32, bfloat16"):
        cuda.rms_norm(x.double(), torch.ones(64), EPS)


def test_a_cache_that_lies_badly_is_refused(cuda):
    q, k, v, weight_q, weight_k, cos, sin = inputs(torch.bfloat16, 1, 1, 2, 2, 8)
    zero, cache = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 2, 2, 12).bfloat16()[..., :8]
    with pytest.raises(ValueError, match=r"cache \[1, 1, 2, 2, 8\] with strides .* contiguous heads of 8 channels"):
        cuda.norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, EPS, cache, cache, zero[0], zero)
    with pytest.raises(
        ValueError, match="q, k, v of torch.bfloat16, torch.float32, torch.bfloat16 must have one dtype"
    ):
        cuda.norm_rope_append(q, k.float(), v, weight_q, weight_k, cos, sin, EPS, cache, cache, zero[0], zero)
    with pytest.raises(ValueError, match="write of torch.int16 must be contiguous int64 or int32"):
        cuda.norm_rope_append(q, k, v, weight_q, weight_k, cos, sin, EPS, cache, cache, zero[0], zero.short())
