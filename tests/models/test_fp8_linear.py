"""FP8 layers against float64 products of numbers that are rounded by hand, and a DiT of them against a plain one whose
every product is emulated so."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dsa_engine import Pipeline, ops
from dsa_engine.config import ModelConfig
from dsa_engine.models import dit as dit_module
from dsa_engine.models import memory_estimate
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3, cache_scales, quantize_linears
from dsa_engine.models.linear import FP8Linear, fused_gemm


def rounded(x):
    """[..., C] as e4m3 with a scale a row would hold it: the largest of a row is 448, three bits of mantissa, ties to
    even, in float64."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale > 0, scale, 1.0).float().double()
    y = (x.float() / scale.float()).double()
    _, exponent = torch.frexp(y)
    step = torch.exp2((exponent - 1).clamp(min=-6).double() - 3)
    return (y / step).round() * step * scale


def layer(inputs, outputs):
    made = nn.Linear(inputs, outputs).requires_grad_(False)
    made.weight *= torch.logspace(-3, 1, outputs)[:, None]  # rows of very different sizes
    return made


@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 5), st.integers(0, 99))
def test_a_layer_is_a_product_of_rounded_numbers(inputs, outputs, tokens, seed):
    torch.manual_seed(seed)
    plain, x = layer(inputs, outputs), torch.randn(2, tokens, inputs) * torch.logspace(-4, 3, tokens)[:, None]
    (fp8,) = FP8Linear.of((plain,))
    expected = rounded(x) @ rounded(plain.weight).T + plain.bias.double()
    scale = (rounded(x).abs() @ rounded(plain.weight).abs().T).max().item()
    torch.testing.assert_close(fp8(x).double(), expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(fp8(ops.quantize(x)), fp8(x), rtol=0, atol=0)


def test_gelu_comes_after_the_bias_and_is_rounded():
    (fp8,), x = FP8Linear.of((layer(32, 16),)), torch.randn(3, 5, 32)
    expected = rounded(F.gelu(fp8(x), approximate="tanh"))
    out = fp8.gelu(x)
    assert out.values.dtype == E4M3
    apart = ((out.values.double() * out.scale - expected).abs() > 1e-6 * expected.abs().max()).double().mean()
    assert apart < 0.01  # a number between two neighbours may go to either


def test_layers_of_one_input_are_one_gemm():
    """Their numbers lie side by side, also after a copy has parted them; each is what it is alone."""
    plains = [layer(48, n) for n in (16, 32, 48)]
    fp8, x = FP8Linear.of(plains), ops.quantize(torch.randn(2, 7, 48))
    alone = [FP8Linear.of((plain,))[0] for plain in plains]
    for layers in (fp8, copy.deepcopy(fp8)):
        for one, other, out in zip(layers, alone, fused_gemm(x, layers)):
            assert one.weight.view(torch.uint8).equal(other.weight.view(torch.uint8)) and one.scale.equal(other.scale)
            torch.testing.assert_close(out, other(x), rtol=1e-6, atol=1e-6)
    assert fp8[0].weight.data_ptr() + fp8[0].weight.nbytes == fp8[1].weight.data_ptr()


class Alone:
    """A memory without a past."""

    def attend(self, layer, q, k, v, gains, rope, eps):
        q, k = ops.norm_rope(q, k, *gains, *rope, eps)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v.view(k.shape))))
        return out.transpose(1, 2).flatten(2)


class Emulated(nn.Linear):
    def forward(self, x):
        return (rounded(x) @ rounded(self.weight).T + self.bias.double()).float()


def velocity(dit, embeds, x):
    t = torch.tensor([[900.0, 900.0], [300.0, 0.0]])
    frames = torch.tensor([[0, 1], [5, 6]])
    return dit(x, t, frames, dit.text_kv(embeds), Alone()).velocity


def test_a_dit_of_fp8_products(tiny_dit, monkeypatch):
    """Sums in another order round a number in a thousand to its other neighbour: a fraction of what rounding does."""
    embeds, x = torch.randn(2, 5, 40), torch.randn(2, 2, 16, 4, 4)
    plain = velocity(tiny_dit, embeds, x)
    ours = copy.deepcopy(tiny_dit)
    quantize_linears(ours)
    for block in tiny_dit.blocks:
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        for linear in (own.q, own.k, own.v, own.o, cross.q, cross.o, ffn[0], ffn[2]):
            linear.__class__ = Emulated

    def linear_gelu(x, weight, bias):
        y = rounded(x) @ rounded(weight).T + bias.double()
        return F.gelu(y, approximate="tanh").float()

    monkeypatch.setattr(dit_module.ops, "linear_gelu", linear_gelu)
    expected = velocity(tiny_dit, embeds, x)
    found = velocity(ours, embeds, x)
    assert (found - expected).norm() < 0.1 * (plain - expected).norm()
    assert 0.001 < ((plain - expected).norm() / plain.norm()).item() < 0.3


def test_producers_quantise_all_but_what_attention_gives(tiny_dit, monkeypatch):
    module = sys.modules["dsa_engine.ops.fp8_linear"]
    seen, real = [], module.quantize
    quantize_linears(tiny_dit)
    monkeypatch.setattr(module, "quantize", lambda x: seen.append(x.shape) or real(x))
    velocity(tiny_dit, torch.randn(2, 5, 40), torch.randn(2, 2, 16, 4, 4))
    assert seen == 2 * len(tiny_dit.blocks) * [(2, 8, tiny_dit.config.dim)]


def test_what_is_replaced_and_what_stays(tiny_dit):
    embeds, before, names = torch.randn(1, 5, 40), copy.deepcopy(tiny_dit), set()
    quantize_linears(tiny_dit)
    for name, module in tiny_dit.named_modules():
        if isinstance(module, FP8Linear):
            names.add(name)
    parts = (*(f"self_attn.{part}" for part in "qkvo"), "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
    assert names == {f"blocks.{i}.{part}" for i in range(3) for part in parts}
    assert tiny_dit.text_kv(embeds).kv.equal(before.text_kv(embeds).kv)
    saved = memory_estimate.module_bytes(before) - memory_estimate.module_bytes(tiny_dit)
    dim, ffn = tiny_dit.config.dim, tiny_dit.config.ffn_dim
    assert saved == 3 * ((4 - 1) * (6 * dim**2 + 2 * dim * ffn) - 4 * (7 * dim + ffn))  # a float32 scale per channel
    assert tiny_dit.dtype == torch.float32 and all(not p.requires_grad for p in tiny_dit.parameters())


def test_scales_of_a_cache_are_those_of_the_rounded_weights(tiny_dit):
    plain = cache_scales(tiny_dit, [1000.0, 0.0])
    quantize_linears(tiny_dit)
    fp8 = cache_scales(tiny_dit, [1000.0, 0.0])
    assert fp8.k.equal(plain.k) and not fp8.v.equal(plain.v)
    torch.testing.assert_close(fp8.v, plain.v, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "sizes, wrong",
    [
        ({"dim": 40, "ffn_dim": 64}, "dim=40: .* nearest is 32"),
        ({"dim": 32, "ffn_dim": 60}, "ffn_dim=60: .* nearest is 64"),
    ],
)
def test_sizes_that_tensor_cores_do_not_take_are_an_error_at_load(sizes, wrong):
    dit = CausalDiT(ModelConfig(num_heads=2, num_layers=1, **sizes))
    with pytest.raises(ValueError, match=wrong):
        quantize_linears(dit)
    assert not dit.blocks[0].fp8 and isinstance(dit.blocks[0].self_attn.q, nn.Linear)


def test_another_dtype_on_a_gpu_is_an_error_at_load():
    dit = SimpleNamespace(
        config=ModelConfig.preset("shapes"), device=torch.device("cuda"), dtype=torch.float16, blocks=[None]
    )
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: .*load the model in that dtype"):
        quantize_linears(dit)


@pytest.mark.parametrize(
    "name, linear, cache", [(None, 0, 0), ("fp8", 1, 1), ("fp8-linear", 1, 0), ("fp8-cache", 0, 1)]
)
def test_a_pipeline_is_what_it_was_told(untrained, name, linear, cache):
    pipe = Pipeline.from_pretrained(untrained, device="cpu", quantization=name)
    assert [block.fp8 for block in pipe.engine.dit.blocks] == [bool(linear)] * 2
    assert isinstance(pipe.engine.dit.blocks[1].ffn[2], FP8Linear) == bool(linear)
    with pipe.session("a red circle jumps") as session:
        assert (session.rollout.cache.k.dtype == E4M3) == bool(cache)
        chunk = session.next_chunk()
    assert chunk.latents.isfinite().all() and pipe.quantization == name
