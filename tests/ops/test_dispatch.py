"""Which backend runs: every rule of the choice, and the libraries' arguments against the reference."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsa_engine import ops
from dsa_engine.ops import dispatch, libraries, reference

HOPPER = (9, 0)


def everything(backend, op):
    return None


def nothing(backend, op):
    return f"{backend} is not installed"


def choose(op="modulate", wanted="auto", capability=HOPPER, lacks=everything):
    return dispatch.choose(op, wanted, capability, lacks).backend


def test_every_public_op_has_a_stem_and_a_reference():
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert functions == set(dispatch.STEM_OF)
    assert all(hasattr(reference, op) for op in functions)
    for op, stem in dispatch.STEM_OF.items():
        assert getattr(ops, op).__module__ == f"dsa_engine.ops.{stem}"


def test_every_stem_has_a_triton_file_with_its_functions():
    folder = Path(dispatch.__file__).parents[2] / "triton_kernels"
    for stem, names in dispatch.STEMS.items():
        defined = {
            n.name for n in ast.parse((folder / f"{stem}.py").read_text()).body if isinstance(n, ast.FunctionDef)
        }
        assert set(names) - defined == ({"linear_gelu"} if stem == "modulate" else set()), stem  # that is cuBLAS's


def test_on_a_cpu_everything_is_torch():
    assert all(choose(wanted=name, capability=None) == "torch" for name in dispatch.BACKENDS)


def test_auto_takes_what_was_measured_then_triton_then_torch(monkeypatch):
    assert choose() == "triton"
    assert choose(lacks=nothing) == "torch"
    monkeypatch.setitem(dispatch.MEASURED, HOPPER, {"attention": "cudnn", "modulate": "cuda"})
    assert choose("attention") == "cudnn" and choose("modulate") == "cuda" and choose("epilogue") == "triton"
    assert choose("attention", capability=(8, 0)) == "triton"
    assert choose("modulate", lacks=lambda backend, op: "broken" if backend == "cuda" else None) == "triton"


def test_a_backend_that_is_asked_for_runs_or_says_why_not():
    assert choose(wanted="cuda") == "cuda" and choose(wanted="torch") == "torch"
    assert choose("attention", wanted="flash3") == "flash3"
    assert choose("modulate", wanted="flash3") == "triton"  # it has attention alone
    assert choose(wanted="cuda", lacks=lambda b, op: f"{b} has no {op}" if b == "cuda" else None) == "triton"
    with pytest.raises(RuntimeError, match="DSA_BACKEND=cuda: modulate cannot run here: cuda is not installed"):
        choose(wanted="cuda", lacks=nothing)
    with pytest.raises(ValueError, match="DSA_BACKEND='fast': must be one of auto, torch, triton"):
        choose(wanted="fast")


def test_a_gradient_or_a_cpu_tensor_takes_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "_function", lambda op: pytest.fail("a kernel has no backward"))
    x = torch.zeros(1, 4, 8)
    assert dispatch.implementation("modulate", x) is reference.modulate

    class Cuda:
        device, requires_grad = torch.device("cuda"), True

    assert dispatch.implementation("modulate", Cuda()) is reference.modulate


@pytest.fixture
def case():
    """Three rows, two of one slot: two runs and an empty one, all frames, none; NaN in every frame that is not seen."""
    k, v = torch.randn(2, 3, 5, 4, 2, 8)
    slot = torch.tensor([2, 2, 0])
    keys = torch.tensor([[[1, 2], [3, 5], [4, 4]], [[0, 5], [0, 0], [0, 0]], [[0, 0], [2, 2], [0, 0]]])
    k[1], v[1], k[0], v[0] = (float("nan"),) * 4
    q = torch.randn(3, 6, 2, 8)
    return q, k, v, slot, keys


def fake(monkeypatch, name, **functions):
    for i in range(name.count(".") + 1):
        part = ".".join(name.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def attend(q, k, v, length):
    """Each row over its first `length` keys."""
    rows = [reference.sdpa(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) for b, n in enumerate(length.tolist())]
    return torch.cat([row.nan_to_num() for row in rows])


def test_flash_attention_2_gets_the_frames_that_count_and_their_number(case, monkeypatch, close):
    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal):
        assert cache_seqlens.dtype == torch.int32 and causal is False
        return attend(q, k_cache, v_cache, cache_seqlens)

    fake(monkeypatch, "flash_attn", flash_attn_with_kvcache=with_kvcache)
    close(libraries.flash2(*case), reference.attention(*case), 1e-5)


def test_flash_attention_3_gets_the_ring_as_pages(case, monkeypatch, close):
    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, page_table, causal):
        assert k_cache.shape == (15, 4, 2, 8) and page_table.dtype == cache_seqlens.dtype == torch.int32
        assert k_cache.data_ptr() == case[1].data_ptr()  # not copied
        k, v = (cache[page_table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
        return attend(q, k, v, cache_seqlens)

    fake(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=with_kvcache)
    close(libraries.flash3(*case), reference.attention(*case), 1e-5)


def test_flash_attention_4_may_return_the_log_sum_too(case, monkeypatch, close):
    def varlen(q, k, v, *, seqused_k, causal):
        return attend(q, k, v, seqused_k), None

    fake(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=varlen)
    close(libraries.flash4(*case), reference.attention(*case), 1e-5)


def test_cudnn_is_forced_and_masked(case, monkeypatch, close):
    forced = []

    class Forced:
        def __init__(self, backend):
            forced.append(backend)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", Forced)
    close(libraries.cudnn(*case), reference.attention(*case), 1e-5)
    assert [backend.name for backend in forced] == ["CUDNN_ATTENTION"]


def test_libraries_that_are_not_there_say_so():
    assert libraries.unavailable("flash3") == "flash_attn_interface is not installed"
    assert libraries.unavailable("flash4") == "flash_attn.cute is not installed"
    with pytest.raises(ValueError, match="FP8"):
        libraries.flash2(*[None] * 5, scales=1)
