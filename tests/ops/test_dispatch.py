"""Which backend runs: every rule of the choice, and the libraries' arguments against the reference."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsa_engine import ops
from dsa_engine.ops import cuda_backend as ops_cuda
from dsa_engine.ops import dispatch, external_attention, reference, smoke
from dsa_engine.ops.support import E4M3, Call, Kind, Reason
from dsa_engine.triton_kernels import attention as triton_attention
from tests.support import kernels  # noqa: F401  the interpreter is put right before a kernel is imported

HOPPER, AMPERE = (9, 0), (8, 0)
CALL = Call("attention", HOPPER, torch.bfloat16, 128, torch.bfloat16)


def everything(backend, call):
    return None


def nothing(backend, call):
    return Reason(Kind.NOT_INSTALLED, f"{backend} is not installed")


def refuses(requested, kind):
    """All backends run everything, but one of them for a reason of some kind."""
    return lambda backend, call: Reason(kind, f"{backend} has a reason") if backend == requested else None


def choose(op="modulate", requested="auto", capability=AMPERE, supports=everything, **call):
    return dispatch.choose(Call(op, capability, **call), requested, supports).backend


def test_every_public_op_has_a_group_and_a_reference():
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert functions == set(dispatch.GROUP_OF)
    assert all(hasattr(reference, op) for op in functions)
    for op, group in dispatch.GROUP_OF.items():
        assert getattr(ops, op).__module__ == f"dsa_engine.ops.{group}"


def test_every_group_has_a_triton_file_with_its_functions():
    folder = Path(dispatch.__file__).parents[2] / "triton_kernels"
    for group, names in dispatch.OP_GROUPS.items():
        defined = {
            n.name for n in ast.parse((folder / f"{group}.py").read_text()).body if isinstance(n, ast.FunctionDef)
        }
        assert set(names) - defined == ({"linear_gelu"} if group == "modulate" else set()), group  # that is cuBLAS's


def test_on_a_cpu_everything_is_torch():
    assert all(choose(requested=name, capability=None) == "torch" for name in dispatch.BACKENDS)


def test_auto_takes_what_was_measured_then_triton_then_torch(monkeypatch):
    assert choose() == "triton"
    assert choose(supports=nothing) == "torch"
    monkeypatch.setitem(dispatch.MEASURED, HOPPER, {"attention": "cudnn", "modulate": "cuda"})
    measured = {op: choose(op, capability=HOPPER) for op in ("attention", "modulate", "epilogue")}
    assert measured == {"attention": "cudnn", "modulate": "cuda", "epilogue": "triton"}
    assert choose("attention", capability=AMPERE) == "triton"
    assert choose("modulate", capability=HOPPER, supports=refuses("cuda", Kind.CALL)) == "triton"


def test_a_backend_that_is_asked_for_runs_or_says_why_not():
    assert choose(requested="cuda") == "cuda" and choose(requested="torch") == "torch"
    assert choose("attention", requested="flash3") == "flash3"
    for kind in (Kind.NOT_INSTALLED, Kind.DEVICE):
        with pytest.raises(RuntimeError, match="DSA_BACKEND=cuda: modulate cannot run here: cuda has a reason"):
            choose(requested="cuda", supports=refuses("cuda", kind))
    with pytest.raises(ValueError, match="DSA_BACKEND='fast': must be one of auto, torch, triton"):
        choose(requested="fast")


def test_an_op_or_a_call_that_a_backend_has_no_kernel_for_takes_the_default(caplog):
    """Whatever the text of the reason says; only tensors that it does not take are worth a word."""
    assert choose(requested="cuda", supports=refuses("cuda", Kind.NO_OP)) == "triton" and caplog.messages == []
    refused = refuses("cuda", Kind.CALL)
    assert choose("attention", "cuda", supports=refused, dtype=torch.float32, head_dim=32) == "triton"
    (message,) = caplog.messages
    assert message.startswith("DSA_BACKEND=cuda does not run attention (float32, head dim 32), the default does: cuda ")


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0 with Triton and csrc, as far as the choice looks."""

    class Built:
        DEVICE = "cuda"

    monkeypatch.setattr(ops_cuda, "csrc", Built)
    monkeypatch.setattr(smoke, "verdict", lambda backend, index: smoke.Verdict(False, "not asked"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: HOPPER)
    for function in (dispatch._choice, dispatch._function):
        function.cache_clear()
    yield monkeypatch
    for function in (dispatch._choice, dispatch._function):
        function.cache_clear()


@pytest.mark.parametrize(
    "call, backend",
    [
        ((torch.bfloat16, 128, torch.bfloat16), "cuda"),
        ((torch.bfloat16, 64, torch.bfloat16), "cuda"),
        ((torch.bfloat16, 128, E4M3), "cuda"),
        ((torch.bfloat16, 64, E4M3), "triton"),  # csrc has e4m3 at 128 alone
        ((torch.bfloat16, 32, torch.bfloat16), "triton"),  # the small model that is shipped
        ((torch.float32, 128, torch.float32), "triton"),
        ((torch.float16, 128, torch.float16), "triton"),
        ((torch.bfloat16, 96, torch.bfloat16), "reference"),
    ],
)
def test_attention_of_a_kind_that_csrc_does_not_take_falls_back(hopper, caplog, call, backend):
    """The same process runs each kind by what can run it, and says so once."""
    hopper.setenv("DSA_BACKEND", "cuda")
    dtype, head_dim, stored = call

    class Query:
        device, requires_grad = torch.device("cuda", 0), False

    Query.dtype = dtype
    for _ in range(3):
        function = dispatch.resolve("attention", Query(), head_dim, stored)
    module = {"cuda": "cuda_backend", "triton": "attention", "reference": "reference"}[backend]
    assert function.__module__.split(".")[-1] == module
    warned = sum("DSA_BACKEND=cuda does not run attention" in message for message in caplog.messages)
    assert warned == (backend != "cuda")
    assert dispatch._function.cache_info().hits == 2


def test_a_kind_that_no_kernel_takes_is_logged_and_runs_in_plain_torch(caplog):
    call = Call("attention", (8, 0), torch.bfloat16, 96, torch.bfloat16)
    assert dispatch.choose(call, "auto", dispatch.supports).backend == "torch"
    assert "plain torch runs attention (bfloat16, head dim 96, bfloat16 stored): triton takes head dims" in caplog.text
    call = call._replace(head_dim=128, stored=E4M3)
    assert dispatch.choose(call, "auto", dispatch.supports).backend == "torch"  # an A100 has no e4m3
    assert dispatch.choose(call._replace(capability=(8, 9)), "auto", dispatch.supports).backend == "triton"


def test_what_csrc_has_follows_the_device(monkeypatch):
    class Built:
        DEVICE = "cuda"

    monkeypatch.setattr(ops_cuda, "csrc", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds = {}
    for capability in ((7, 5), (8, 0), (9, 0), (10, 0)):
        calls = Call("attention", capability), Call("modulate", capability), Call("modulate", capability, stored=E4M3)
        kinds[capability] = [reason and reason.kind for reason in map(ops_cuda.supports, calls)]
    assert kinds == {
        (7, 5): [Kind.DEVICE] * 3,
        (8, 0): [Kind.DEVICE, None, Kind.CALL],
        (9, 0): [None] * 3,
        (10, 0): [Kind.DEVICE, None, Kind.CALL],
    }
    monkeypatch.setattr(ops_cuda, "csrc", None)
    monkeypatch.setattr(ops_cuda, "_missing", "no module", raising=False)
    assert ops_cuda.supports(Call("modulate", HOPPER)).kind is Kind.NOT_INSTALLED
    assert ops_cuda.supports(Call("gaussian", HOPPER)).kind is Kind.NO_OP


def test_tables_say_what_the_launchers_check():
    for dim in (8, 16, 32, 48, 64, 128, 256):
        ours = dispatch.TRITON["attention"].refuse("triton", Call("attention", HOPPER, head_dim=dim)) is None
        assert ours == (dim in triton_attention.HEAD_DIMS)


def test_a_gradient_or_a_cpu_tensor_takes_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "_function", lambda *key: pytest.fail("a kernel has no backward"))
    x = torch.zeros(1, 4, 8)
    assert dispatch.resolve("modulate", x) is reference.modulate

    class Cuda:
        device, requires_grad = torch.device("cuda"), True

    assert dispatch.resolve("modulate", Cuda()) is reference.modulate


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
    close(external_attention.flash2(*case), reference.attention(*case), 1e-5)


def test_flash_attention_3_gets_the_ring_as_pages(case, monkeypatch, close):
    def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, page_table, causal):
        assert k_cache.shape == (15, 4, 2, 8) and page_table.dtype == cache_seqlens.dtype == torch.int32
        assert k_cache.data_ptr() == case[1].data_ptr()  # not copied
        k, v = (cache[page_table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
        return attend(q, k, v, cache_seqlens)

    fake(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=with_kvcache)
    close(external_attention.flash3(*case), reference.attention(*case), 1e-5)


def test_flash_attention_4_may_return_the_log_sum_too(case, monkeypatch, close):
    def varlen(q, k, v, *, seqused_k, causal):
        return attend(q, k, v, seqused_k), None

    fake(monkeypatch, "flash_attn.cute", flash_attn_varlen_func=varlen)
    close(external_attention.flash4(*case), reference.attention(*case), 1e-5)


def test_cudnn_is_forced_and_masked(case, monkeypatch, close):
    forced = []

    class Forced:
        def __init__(self, backend):
            forced.append(backend)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", Forced)
    close(external_attention.cudnn(*case), reference.attention(*case), 1e-5)
    assert [backend.name for backend in forced] == ["CUDNN_ATTENTION"]


def test_libraries_that_are_not_there_say_so():
    for name, module in (("flash3", "flash_attn_interface"), ("flash4", "flash_attn.cute")):
        assert external_attention.supports(name, CALL) == (Kind.NOT_INSTALLED, f"{module} is not installed")
    assert external_attention.supports("cudnn", CALL) is None
    assert external_attention.supports("cudnn", CALL._replace(op="modulate")).kind is Kind.NO_OP
    assert external_attention.supports("cudnn", CALL._replace(capability=(7, 5))).kind is Kind.DEVICE
    assert external_attention.supports("cudnn", CALL._replace(stored=E4M3)).kind is Kind.CALL
    with pytest.raises(ValueError, match="FP8"):
        external_attention.flash2(*[None] * 5, scales=1)
