"""The roofline's counts of FLOP and bytes against torch's own and those of the model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.micro import backends, inputs, roofline
from dsa_engine import ops
from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT

WAN = ModelConfig.preset("wan2.1-t2v-1.3b")
SIZES = roofline.Sizes(WAN, 480, 832)
ROWS = roofline.rows(SIZES)
OPS = [row for row in ROWS if row.op != "vae_decode"]


def row_of(name: str) -> roofline.Row:
    return next(r for r in ROWS if r.name == name)


def nbytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, tuple) else 0


class Keys:
    """A past of `tokens` keys, for one forward on the meta device."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def attend(self, layer, q, k, v, weights, rope, eps):
        q, _ = ops.norm_rope(q, k, *weights, *rope, eps)
        keys = q.new_empty(1, q.shape[2], self.tokens, q.shape[3])
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, keys).transpose(1, 2).flatten(2)


def counted_forward(tokens: int) -> dict[str, float]:
    """TFLOP of Wan's forward over so many keys, as torch counts what the model's own code calls."""
    with torch.device("meta"), torch.no_grad():
        model = CausalDiT(dataclasses.replace(WAN, num_layers=1)).to(torch.bfloat16)
        text = model.text_kv(torch.empty(1, WAN.text_len, WAN.text_dim))
        latents, frames = torch.empty(1, 3, 16, 60, 104), torch.empty(1, 3, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(latents, torch.empty(1, 3), frames, text, Keys(tokens))
    found = counter.get_flop_counts()

    def of(module: str, *kinds: str) -> float:
        return sum(n for op, n in found[module].items() if str(op).endswith(kinds)) / 1e12

    inside, outside = "CausalDiT.blocks.0", WAN.num_layers - 1
    products = of("Global", "addmm", ".mm") + outside * of(inside, "addmm", ".mm")
    both = WAN.num_layers * of(inside, "bmm", "attention")
    cross = WAN.num_layers * of(f"{inside}.cross_attn", "bmm", "attention")
    return {"products": products, "attention": both - cross, "cross_attention": cross}


@pytest.mark.parametrize("frames, attention, all_of_it", [(3, 4.0, 16.2), (12, 16.2, 28.3), (21, 28.3, 40.4)])
def test_a_forward_does_what_the_model_calls(frames, attention, all_of_it):
    """The last two values are TFLOP of attention and of all; 12 and 21 frames are the clip mean and a full window."""
    for precision in roofline.PRECISIONS:
        found = roofline.total(roofline.forward(ROWS, precision, frames), precision, roofline.GPUS).flop
        tera = {name: flop / 1e12 for name, flop in found.items()}
        # the model's GEMMs hold the embeddings and the last layer, which the plan leaves out or counts apart
        assert tera == pytest.approx(counted_forward(frames * 1560), rel=1e-3)
        assert tera["products"] == pytest.approx(11.7, abs=0.05) and tera["attention"] == pytest.approx(
            attention, abs=0.06
        )
        assert sum(tera.values()) == pytest.approx(all_of_it, abs=0.06)


@pytest.mark.parametrize("row", OPS, ids=lambda row: row.name)
def test_flop_of_a_row_are_what_torch_counts(row):
    args = inputs.inputs(row, SIZES, "meta", 0)
    call = backends.plain_torch(row)
    if row.op in ("attention", "cross_attention"):  # the valid keys alone
        keys = torch.empty(1, row.keys or row.frames * SIZES.S, SIZES.H, WAN.head_dim, device="meta")
        args, call = (keys.new_empty(args[0].shape), keys, keys), backends.sdpa(None)
    if row.op == "gaussian":
        assert row.flop == 0  # its words come from numpy, which torch cannot count
        return
    with FlopCounterMode(display=False) as counter:
        call(*args)
    assert row.flop == counter.get_total_flops()


@pytest.mark.parametrize("row", OPS, ids=lambda row: row.name)
def test_bytes_of_a_row_are_those_of_its_tensors(row):
    args = inputs.inputs(row, SIZES, "meta", 0)
    made = 4 * math.prod(args[3]) if row.op == "gaussian" else nbytes(backends.plain_torch(row)(*args))
    if row.op == "norm_rope_append":  # the caches are written, not read
        caches = nbytes(args[8:10])
        assert caches == 2 * SIZES.T * SIZES.C * (1 if row.precision == "fp8" else 2)
        assert (row.read, row.written) == (nbytes(args) - caches, made + caches)
        return
    if row.op == "attention":
        q, k, v, slot, keys, scales = args
        args = (q, k[:, : row.frames], v[:, : row.frames], slot, keys, *(scales or ()))
    if row.op == "cross_attention":
        args = (args[0], *(x[:, : row.keys] for x in args[1:3]), *args[3:])
    assert (row.read, row.written) == (nbytes(args), made)


def test_elementwise_bytes_of_a_forward():
    """A stream of T x C values is 14.4 MB: 20 of them per block by the ops as they stand. GELU takes 83.9 MB twice, but
    as a part of its GEMM nothing."""
    stream, wide, rope = 4680 * 1536 * 2, 4680 * 8960 * 2, 4680 * 128 * 4
    some = roofline.forward(ROWS, "bf16", 3)
    expected = 30 * (20 * stream + rope) + stream  # modulate and gate_residual share what one fused op does
    assert roofline.elementwise_bytes(some, "bf16") == pytest.approx(expected, rel=1e-3)
    by_itself = roofline.elementwise_bytes([row_of("gelu_bias fp8")], "fp8")
    assert by_itself == pytest.approx(30 * 1.5 * wide, rel=1e-3)  # where what it makes is FP8
    # of LayerNorm (3), q, k, v and their append (6), the norm of cross-attention's queries (2), residuals (3): 7.3 GB
    fused = roofline.elementwise_bytes(roofline.in_epilogues(some, SIZES), "bf16")
    assert fused == pytest.approx(30 * (3 * 2 + 6 + 2 + 3) * stream + 30 * rope, rel=1e-3)
    assert fused == pytest.approx(7.3e9, rel=0.02)


def test_floors_follow_from_the_datasheets():
    h100, h200 = roofline.GPUS["H100 SXM"], roofline.GPUS["H200"]
    full, norm = row_of("attention kv 32760"), row_of("modulate")
    assert full.floor(h100) == full.floor(h200) == pytest.approx(4 * 4680 * 32760 * 1536 / 989e6)
    assert (full.bound(h100), norm.bound(h100)) == ("products", "bytes")
    assert norm.floor(h100) / norm.floor(h200) == pytest.approx(4.8 / 3.35)
    assert row_of("attention kv 32760 fp8").floor(h100) == pytest.approx(full.floor(h100) * 989 / 1979)
    at_rates = roofline.Rates({"bf16": 1e12, "fp8": 1e12}, {"bf16": 2e12, "fp8": 2e12}, 1e15)
    assert full.floor(at_rates) == pytest.approx(full.flop / 2e6)  # attention has a rate of its own


def test_every_public_op_has_a_row_or_a_reason():
    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and not isinstance(getattr(ops, name), type)}
    timed = {r.op for r in ROWS}
    assert (
        public == (timed - {"linear", "vae_decode"}) | roofline.NOT_TIMED.keys()
        and not timed & roofline.NOT_TIMED.keys()
    )
    assert len({r.name for r in ROWS}) == len(ROWS)
    both = ("norm_rope_append", "modulate", "residual_modulate", "gelu_bias", "attention")
    assert all({r.precision for r in ROWS if r.op == op} == {"bf16", "fp8"} for op in both)
    assert {r.what for r in ROWS if r.op in ("attention", "cross_attention")} == {
        "kv 4680",
        "kv 18720",
        "kv 32760",
        "keys 512",
        "used 60",
    }


def test_a_decode_is_40_65_tflop_and_moves_its_state_twice():
    row, state, frames = row_of("vae_decode"), 1.9e9, 12 * 3 * 480 * 832 * 2
    assert row.flop == pytest.approx(40.65e12, rel=1e-3) and row.bound(roofline.GPUS["H200"]) == "products"
    assert row.written == pytest.approx(state + frames, rel=0.02)
    assert row.read == pytest.approx(state + 2 * 73e6, rel=0.02)  # the decoder's parameters
