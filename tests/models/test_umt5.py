"""umT5 against transformers' own run of the same weights; the rules for prompts."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from transformers import UMT5EncoderModel

from dsa_engine.checkpoints.text import load_umt5
from dsa_engine.models import memory_estimate, offload, umt5
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.umt5 import UMT5, clean_prompt
from tests.support.umt5 import LENGTH, PROMPTS, load, reference, save_umt5, tiny_umt5


@pytest.fixture(scope="module")
def theirs():
    return tiny_umt5()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return save_umt5(theirs, tmp_path_factory.mktemp("diffusers"))


def test_a_prompt_does_not_depend_on_its_neighbours_or_its_spaces(folder):
    together = load(folder / "text_encoder", folder).encode(PROMPTS)
    alone = load(folder / "text_encoder", folder).encode(["  the\n sea "])
    assert alone[0].equal(together[1])


def test_the_embeddings_fit_the_dit(folder, tiny_config):
    """The DiT pads with the same zeros, so a trimmed embedding gives the same keys and values."""
    config = tiny_config.__class__(**{**tiny_config.__dict__, "text_dim": 24, "text_len": LENGTH})
    dit = CausalDiT(config).requires_grad_(False).eval()
    embeds = load(folder / "text_encoder", folder).encode(["the sea"])
    assert dit.text_kv(embeds).kv.equal(dit.text_kv(embeds[:, :3]).kv)


def test_a_prompt_that_is_too_long_is_cut_before_its_end_and_said(folder, theirs, close, caplog):
    encoder = load(folder / "text_encoder", folder)
    with caplog.at_level(logging.WARNING, logger=umt5.__name__):
        close(encoder.encode([PROMPTS[2]]), reference(theirs, [PROMPTS[2]]), 1e-4)
    assert "prompt of 18 tokens: only 12" in caplog.text


def test_the_token_embedding_is_one_tensor(folder, theirs):
    encoder = load(folder / "text_encoder", folder)
    encoder.encode(["the sea"])
    model = encoder.model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert model.shared.weight.equal(theirs.shared.weight)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_embeddings_that_are_not_tied_are_refused(theirs):
    loose = UMT5EncoderModel(theirs.config)
    loose.encoder.embed_tokens = torch.nn.Embedding(*theirs.shared.weight.shape)
    with pytest.raises(ValueError, match="shared.weight and encoder.embed_tokens.weight differ"):
        UMT5(loose, None)
    loose.encoder.embed_tokens.weight = torch.nn.Parameter(loose.shared.weight.clone())
    UMT5(loose, None)
    empty = UMT5EncoderModel(theirs.config)
    empty.shared.weight.data.zero_()
    with pytest.raises(ValueError, match="token embedding is zero"):
        UMT5(empty, None)


class Counted(torch.nn.Module):
    """Counts the prompts that are really encoded."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.shared, self.encoder = model, model.shared, model.encoder
        self.calls = 0

    def forward(self, **inputs):
        self.calls += 1
        return self.inner(**inputs)


def test_prompts_are_encoded_once_and_the_oldest_is_forgotten_first(folder, theirs):
    tokenizer = load(folder / "text_encoder", folder).tokenizer
    model = Counted(theirs)
    encoder = UMT5(model, tokenizer, length=LENGTH, cache=2)
    first = encoder.encode(["the sea"])
    assert encoder.encode(["the   sea"]).equal(first) and model.calls == 1
    encoder.encode(["a tree", "the sea"])
    assert model.calls == 2
    encoder.encode(["a leaf"])  # forgets the tree, which was used before the sea
    encoder.encode(["the sea"])
    assert model.calls == 3
    encoder.encode(["a tree"])
    assert model.calls == 4
    with pytest.raises(ValueError, match="length=0: must be at least 1"):
        UMT5(model, tokenizer, length=0, cache=2)
    none = UMT5(model, tokenizer, length=LENGTH, cache=0)
    none.encode(["the sea", "the sea"])
    assert model.calls == 6


def test_what_is_kept_is_not_changed_from_outside(folder):
    encoder = load(folder / "text_encoder", folder)
    first = encoder.encode(["the sea"])
    kept = first.clone()
    first.zero_()
    assert encoder.encode(["the sea"]).equal(kept)


def test_offloaded_layers_are_on_the_device_for_their_turn_only(folder, theirs):
    """The meta device stands for one that is far away: only the layers and what they are given go there."""
    tokenizer = load(folder / "text_encoder", folder).tokenizer
    model, seen = copy.deepcopy(theirs), []
    encoder = UMT5(model, tokenizer, length=LENGTH, offload=True, device="meta")
    layers = [*model.encoder.block, model.encoder.final_layer_norm]
    for layer in layers:
        inner = layer.layer[0].SelfAttention.q if hasattr(layer, "layer") else layer
        layer.register_forward_hook(
            lambda layer, args, out, inner=inner: seen.append((inner.weight.device.type, args[0].device.type))
        )
    assert encoder.encode(["the sea", "a tree"]).is_meta
    assert seen == [("meta", "meta")] * 2 * len(layers)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    encoder.encode(["the sea"])
    assert len(seen) == 2 * len(layers)  # it is known by now
    assert all(p.equal(q) for p, q in zip(model.parameters(), theirs.parameters()))


def test_an_offloaded_encoder_gives_the_same(folder, theirs, close, monkeypatch):
    entered = []
    monkeypatch.setattr(
        offload.DeviceSwap, "__enter__", lambda self, own=offload.DeviceSwap.__enter__: entered.append(1) or own(self)
    )
    for encoder in (load(folder / "text_encoder", folder, offload=True), load(folder / "text_encoder", folder)):
        assert all(p.is_meta for p in encoder.parameters())  # its weights are read for the first prompt
        encoder.enable_offload()
        close(encoder.encode(PROMPTS), reference(theirs), 1e-4)
        assert len(entered) == (3 + 1) * len(PROMPTS)
        entered.clear()
    used = load(folder / "text_encoder", folder)
    before = used.encode(["the sea"])
    used.enable_offload()
    used.enable_offload()
    assert used.encode(["the sea", "a tree"])[0].equal(before[0]) and len(entered) == 3 + 1
    assert used.model.shared.weight is used.model.encoder.embed_tokens.weight


def test_the_size_is_that_of_the_weights_it_will_have(folder, theirs):
    encoder = load_umt5(folder / "text_encoder", length=LENGTH)
    assert encoder.footprint.parameters == sum(p.numel() for p in theirs.parameters())
    assert encoder.footprint.block == sum(p.numel() for p in theirs.encoder.block[0].parameters())
    assert (
        memory_estimate.module_bytes(encoder) == 2 * encoder.footprint.parameters
    )  # bfloat16, although nothing is read yet
    encoder.encode(["the sea"])
    assert memory_estimate.module_bytes(encoder) == 2 * encoder.footprint.parameters


def test_it_works_inside_inference_mode_and_after_it(folder):
    encoder = load(folder / "text_encoder", folder)
    with torch.inference_mode():
        inside = encoder.encode(["the sea"])
    assert encoder.encode(["the sea"]).equal(inside)
    torch.nn.Linear(24, 2)(encoder.encode(["the sea"])).sum().backward()  # an inference tensor cannot do this


@pytest.mark.parametrize(
    "text, clean",
    [
        ("a  red\tpanda \r\n eats", "a red panda eats"),
        ("black & white, R&B, 5 < 6", "black & white, R&B, 5 < 6"),
        ("~!\"#$%'()*+,-./:;=>?@[\\]^_`{|}", "~!\"#$%'()*+,-./:;=>?@[\\]^_`{|}"),
        ("", ""),
    ],
)
def test_plain_prompts_need_no_ftfy(text, clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(text) == clean


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "fish &amp; chips", "&#39;", "&copy 2020", "a\x1b[31mred", "\u201cso\u201d", "\x00"]
)
def test_without_ftfy_other_prompts_are_refused(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy is needed.*dsa-engine"):
        clean_prompt(text)


def test_with_ftfy_the_order_is_wans(monkeypatch):
    """ftfy, then entities twice, then spaces. A stand-in shows what it is given and that its result is used."""
    given = []

    class Ftfy:
        @staticmethod
        def fix_text(text):
            given.append(text)
            return text.replace("\u201c", '"').replace("\u201d", '"')

    monkeypatch.setitem(sys.modules, "ftfy", Ftfy)
    assert clean_prompt(" \u201csalt&amp;amp;pepper\u201d \u00a0 now ") == '"salt&pepper" now'
    assert given == [" \u201csalt&amp;amp;pepper\u201d \u00a0 now "]


def test_the_real_ftfy_leaves_plain_prompts_alone():
    ftfy = pytest.importorskip("ftfy")
    for text in ["black & white, R&B, 5 < 6", "".join(map(chr, range(32, 127))), *PROMPTS]:
        assert ftfy.fix_text(text) == text
