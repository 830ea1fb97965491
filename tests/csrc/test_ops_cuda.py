"""dsa_engine.ops.cuda_backend: what it hands to the attention kernel, and when it says that it cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dsa_engine.engine import device_loop
from dsa_engine.kernel_types import CacheScales
from dsa_engine.ops import cuda_backend as ops_cuda
from dsa_engine.ops import dispatch, launch_args, reference
from tests.support.csrc.emulated import check_error

FLOOR = 1e-6  # plain torch has an error in every case here


def problem(batch=2, tokens=33, heads=3, window=4, frame_tokens=5, head_dim=128):
    """Every size is another number, so that none can stand for another. Frames that no row reads are NaN."""
    q = torch.randn(batch, tokens, heads, head_dim).bfloat16()
    k, v = torch.full((2, batch + 3, window, frame_tokens, heads, head_dim), float("nan")).bfloat16()
    slot, keys = torch.tensor([4, 1]), torch.tensor([[[0, 1], [2, 4]], [[1, 3], [3, 3]]])
    for s, runs in zip(slot.tolist(), keys.tolist()):
        for start, stop in runs:
            k[s, start:stop], v[s, start:stop] = torch.randn(2, stop - start, frame_tokens, heads, head_dim).bfloat16()
    return q, k, v, slot, keys


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_attention(cuda, head_dim, integers):
    q, k, v, slot, keys = problem(head_dim=head_dim)
    out = cuda.attention(q, k, v, slot.to(integers), keys.to(integers))
    plain = reference.attention(q, k, v, slot, keys)
    check_error("attention", out, plain, reference.attention(q.float(), k.float(), v.float(), slot, keys), FLOOR)


def test_attention_over_an_fp8_cache(cuda):
    q, k, v, slot, keys = problem()
    scales = CacheScales(*(0.01 + 0.02 * torch.rand(2, 5, 3)))
    k, v = (reference.to_e4m3(x.float() / s[:, None, None, :, None]) for x, s in ((k, scales.k), (v, scales.v)))
    out = cuda.attention(q, k, v, slot, keys, scales)
    plain = reference.attention(q, k, v, slot, keys, scales)
    exact = reference.attention(q.float(), k, v, slot, keys, scales)
    # The kernel rounds queries and probabilities to e4m3 too: 2^-4 of a value at most, averaged over at least ten keys.
    check_error("attention", out, plain, exact, floor=2**-5)


def test_attention_refuses_what_the_kernel_cannot_read(cuda):
    q, k, v, slot, keys = problem(head_dim=64)
    with pytest.raises(ValueError, match="q of torch.float32 .* must be contiguous torch.bfloat16"):
        cuda.attention(q.float(), k, v, slot, keys)
    with pytest.raises(ValueError, match="k_cache of torch.bfloat16 with strides .* must be contiguous"):
        cuda.attention(q, k[:, ::2], v[:, ::2], slot, keys)
    with pytest.raises(ValueError, match="head dim 96 with .* torch.bfloat16 must be one of 64, 128; nearest is 64"):
        cuda.attention(*problem(head_dim=96))
    scales = CacheScales(*torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match="head dim 64 with a cache of torch.float8_e4m3fn must be one of 128"):
        cuda.attention(q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn), slot, keys, scales)


def test_every_function_has_the_arguments_of_the_reference():
    for op in ops_cuda.OPS:
        assert op in dispatch.GROUP_OF
        ours, reference_code = (getattr(module, op).__code__ for module in (ops_cuda, reference))
        count = reference_code.co_argcount
        assert ours.co_varnames[:count] == reference_code.co_varnames[:count] and ours.co_argcount == count, op


def test_both_sides_have_the_same_codes_for_dtypes(cuda):
    assert cuda.csrc.DTYPES == launch_args.DTYPES


def test_it_says_why_it_cannot_run(monkeypatch):
    assert ops_cuda.why_unavailable("pool_frames") == "pool_frames has no CUDA kernel"
    monkeypatch.setattr(ops_cuda, "csrc", None)
    monkeypatch.setattr(ops_cuda, "_missing", "No module named 'dsa_engine.csrc'", raising=False)
    assert "not part of this installation (No module named 'dsa_engine.csrc')" in ops_cuda.why_unavailable("modulate")

    class Built:
        DEVICE = "cuda"

    monkeypatch.setattr(ops_cuda, "csrc", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops_cuda.why_unavailable("attention") == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, kernels, attention in [
        ((9, 0), True, True),
        ((8, 0), True, False),
        ((8, 9), True, False),
        ((12, 0), True, False),
        ((7, 5), False, False),
        ((10, 0), True, False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert (ops_cuda.why_unavailable("attention") is None) == attention
        for op in ("modulate", "epilogue", ops_cuda.SET_WHILE):
            assert (ops_cuda.why_unavailable(op) is None) == kernels
    assert ops_cuda.why_unavailable("attention") == "compute capability 10.0: attention was compiled for 9.0 alone"


@pytest.mark.parametrize("capability, possible", [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_e4m3_is_refused_where_its_conversion_was_not_compiled(monkeypatch, capability, possible):
    """Blackwell runs the PTX for 8.0, in which it is a trap."""

    class Cuda:
        device = torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    if possible:
        ops_cuda._check_e4m3("modulate", Cuda())
    else:
        with pytest.raises(ValueError, match="e4m3 on a device: needs compute capability 9.0"):
            ops_cuda._check_e4m3("modulate", Cuda())


def test_a_missing_extension_is_named_where_it_was_looked_for():
    """As in a pure installation: importing the module is no error."""
    script = (
        "import sys; sys.modules['dsa_engine.csrc'] = None\n"
        "from dsa_engine.ops import cuda_backend; sys.stdout.write(cuda_backend.why_unavailable('modulate'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the CUDA extension is not part of this installation" in done.stdout and "dsa_engine.csrc" in done.stdout


def test_a_loop_on_the_device_needs_its_own_kernel_alone(monkeypatch):
    """A Blackwell has no attention of csrc's, and keeps the WHILE loop."""

    class Built:
        DEVICE = "cuda"

    monkeypatch.setattr(ops_cuda, "csrc", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_loop, "runtime", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert ops_cuda.why_unavailable("attention") is not None and device_loop.unavailable() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert device_loop.unavailable() == "compute capability 7.5: set_while was compiled for 8.0 and later"
