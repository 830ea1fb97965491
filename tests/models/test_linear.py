"""Layers of one input as a single GEMM: what it gives, and what may happen to their weights in between."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dsa_engine.checkpoints.tensor_io import LazyTensor, write_tensors
from dsa_engine.checkpoints.wan import load_dit
from dsa_engine.checkpoints.weights import load_weights_streaming
from dsa_engine.models import dit, linear
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.linear import fused_gemm, fused_linear, pack_parameters


def linears(*widths: int, inner: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inner, width) for width in widths).requires_grad_(False)


def apart(layers) -> list[torch.Tensor]:
    return [x @ layer.weight.T + layer.bias for layer in layers]


def together(layers) -> bool:
    """Whether all weights, and all biases, lie in one allocation."""
    kinds = ([getattr(layer, name).untyped_storage().data_ptr() for layer in layers] for name in ("weight", "bias"))
    return all(len(set(addresses)) == 1 for addresses in kinds)


x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("widths", [(8, 8, 8), (16, 16), (3, 1, 6), (4,)])
def test_one_gemm_is_that_of_each_layer(widths, close):
    layers = linears(*widths)
    for _ in range(2):  # the second time they lie together already
        outs = fused_gemm(x, layers)
        assert [list(y.shape) for y in outs] == [[2, 5, n] for n in widths]
        assert len({y.untyped_storage().data_ptr() for y in outs}) == 1 and together(layers)
        for y, expected in zip(outs, apart(layers), strict=True):
            close(y, expected, rel=1e-6)
    before = [p.data_ptr() for p in layers.parameters()]
    fused_gemm(x, layers)
    assert [p.data_ptr() for p in layers.parameters()] == before  # nothing moves again


def replaced(layers):
    layers[1].weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    return layers


def assigned(layers):
    layers.load_state_dict({name: torch.randn_like(p) for name, p in layers.state_dict().items()}, assign=True)
    return layers


def copied_in(layers):
    layers.load_state_dict({name: torch.randn_like(p) for name, p in layers.state_dict().items()})
    return layers


def swapped(layers):
    layers[0], layers[2] = layers[2], layers[0]
    return layers


def transposed(layers):
    layers[0].weight.data = torch.randn(8, 8).T
    return layers


def transposed_in_place(layers):
    layers[0].weight.data = layers[0].weight.data.T
    return layers


def filled(layers):
    tensors = {name: torch.randn_like(p) for name, p in layers.state_dict().items()}
    entries = {name: LazyTensor(t.dtype, tuple(t.shape), lambda device="cpu", t=t: t) for name, t in tensors.items()}
    load_weights_streaming(layers, entries, "here")
    return layers


@pytest.mark.parametrize(
    "change",
    [
        transposed_in_place,
        replaced,
        assigned,
        copied_in,
        swapped,
        transposed,
        filled,
        copy.deepcopy,
        lambda layers: layers.double().float(),
        lambda layers: pickle.loads(pickle.dumps(layers)),
        lambda layers: layers.to(torch.float32),
        lambda layers: layers.share_memory(),
    ],
)
def test_whatever_parts_the_weights(change, close):
    layers = linears(8, 8, 8)
    fused_gemm(x, layers)
    layers = change(layers)
    for y, expected in zip(fused_gemm(x, layers), apart(layers), strict=True):
        close(y, expected, rel=1e-6)
    assert together(layers)


def test_a_copy_leaves_the_original_alone():
    layers = linears(8, 8)
    fused_gemm(x, layers)
    other = copy.deepcopy(layers)
    fused_gemm(x, other)
    other[0].weight.zero_()
    assert layers[0].weight.abs().sum() > 0


def test_neighbours_in_memory_may_be_allocations_of_their_own():
    room = np.arange(32, dtype=np.float32)
    parts = [nn.Parameter(torch.frombuffer(memoryview(room)[i : i + 16], dtype=torch.float32)) for i in (0, 16)]
    assert parts[1].data_ptr() == parts[0].data_ptr() + parts[0].nbytes
    assert pack_parameters(parts).tolist() == room.tolist()


def test_half_a_storage_is_not_taken_for_the_whole():
    """The first two of three that lie together, then the last two: of one storage, at different places."""
    layers = linears(8, 8, 8)
    fused_gemm(x, layers)
    for some in (layers[:2], layers[1:]):
        assert all(torch.allclose(y, e, atol=1e-6) for y, e in zip(fused_gemm(x, some), apart(some), strict=True))


def test_training_goes_on_with_every_layer_a_parameter_of_its_own(close):
    layers = linears(8, 8, 8)
    with torch.inference_mode():
        fused_gemm(x, layers)
    layers.requires_grad_(True)
    names = [name for name, _ in layers.named_parameters()]
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
    before = [y.detach() for y in apart(layers)]
    sum(y.square().sum() for y in fused_linear(x, layers)).backward()
    assert names == [f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.abs().sum() > 0 for p in layers.parameters())
    optimizer.step()
    with torch.no_grad():
        for y, expected, old in zip(fused_gemm(x, layers), apart(layers), before, strict=True):
            close(y, expected, rel=1e-6)
            assert not torch.allclose(y, old)
    assert together(layers)


class Elsewhere(torch.Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda")


def test_which_way_is_taken(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "fused_gemm", lambda x, layers: calls.append(len(layers)))
    layers, there = linears(8, 8), x.as_subclass(Elsewhere)
    assert len(fused_linear(x, layers)) == 2 and calls == []
    fused_linear(there, layers)
    assert calls == [2]
    layers[1].bias.requires_grad_(True)
    assert len(fused_linear(there, layers)) == 2 and calls == [2]
    with torch.no_grad():
        fused_linear(there, layers)
    assert calls == [2, 2]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        assert len(fused_linear(there, layers)) == 2 and calls == [2, 2]


@pytest.fixture
def packed(tiny_dit, monkeypatch) -> CausalDiT:
    """A model whose weights have been moved together by a forward over a prompt and a chunk."""
    monkeypatch.setattr(dit, "fused_linear", fused_gemm)
    tiny_dit.text_kv(torch.randn(1, 12, 40))
    for block in tiny_dit.blocks:
        fused_gemm(torch.randn(1, 96), (block.self_attn.q, block.self_attn.k, block.self_attn.v))
    return tiny_dit


def test_a_rollout_is_the_same(tiny_dit, monkeypatch, close):
    from tests.models.test_dit import roll

    expected = roll(copy.deepcopy(tiny_dit), 0)
    monkeypatch.setattr(dit, "fused_linear", fused_gemm)
    close(roll(tiny_dit, 0), expected, rel=1e-5)
    attn, cross = tiny_dit.blocks[1].self_attn, tiny_dit.blocks[1].cross_attn
    assert together((attn.q, attn.k, attn.v)) and together((cross.k, cross.v))


def test_files_of_a_packed_model(packed, tmp_path):
    """Ours and safetensors' own: every name, no complaint of shared memory, nothing written twice."""
    from safetensors.torch import load_file, save_file

    state = packed.state_dict()
    assert not [name for name in state if "qkv" in name or "fused_linear" in name]
    for path, write in ((tmp_path / "ours.safetensors", write_tensors), (tmp_path / "theirs.safetensors", None)):
        if write is None:
            save_file(state, path)
        else:
            write(path, state)
        back = load_file(path)
        assert back.keys() == state.keys() and all(back[name].equal(value) for name, value in state.items())
        assert path.stat().st_size < 1.1 * sum(t.nbytes for t in state.values()) + 20_000
        loaded = load_dit(path, packed.config).state_dict()
        assert all(loaded[name].equal(value) for name, value in state.items())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 1.1 * sum(t.nbytes for t in state.values()) + 50_000
