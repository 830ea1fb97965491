"""umT5 against transformers' own run of the same weights, from every file they come in; the rules for prompts."""

from __future__ import annotations

import builtins
import copy
import json
import logging
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dsa_engine.checkpoints.text import PROMPTS_FORMAT, EncodedPrompts, load_text, load_umt5, save_prompts
from dsa_engine.models import memory_estimate, offload, umt5
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.umt5 import UMT5, clean_prompt
from dsa_engine.training.prompts import read_prompts

LENGTH = 12
PROMPTS = ["a red panda eats a leaf", "the sea", "a red panda on the sea eats the leaf of a tree on the sea at night"]
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})

# transformers' name -> Wan's, by substitution of substrings: the way back of what the loader does
TO_WAN = (
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention.", "attn."),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ("layer.1.layer_norm", "norm2"),
    ("encoder.final_layer_norm", "norm"),
    ("shared.", "token_embedding."),
)


@pytest.fixture(scope="module")
def theirs():
    """A tiny umT5 with random weights everywhere. Vocabulary: padding, end, unknown, and the words of the prompts."""
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=3 + len(WORDS), d_model=24, d_kv=6, d_ff=20, num_layers=3, num_heads=2)
    model = UMT5EncoderModel(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """text_encoder and tokenizer, as transformers saves them."""
    root = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(root / "text_encoder")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def reference(theirs, prompts=PROMPTS, length=LENGTH):
    """As Wan does it: all prompts padded to the full length under a mask, then everything after their ends zeroed."""
    rows = [[3 + WORDS.index(word) for word in prompt.split()][: length - 1] + [1] for prompt in prompts]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def wan_names(theirs) -> dict:
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name}
    for old, new in TO_WAN:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def load(path, folder, dtype=torch.float32, **options):
    return load_umt5(path, folder / "tokenizer", dtype=dtype, length=LENGTH, **options)


def test_transformers_folder(folder, theirs, close):
    encoder = load_umt5(folder / "text_encoder", dtype=torch.float32, length=LENGTH)  # the tokenizer lies beside it
    assert encoder.text_dim == 24
    embeds = encoder.encode(PROMPTS)
    assert embeds.shape == (3, LENGTH, 24) and not embeds.requires_grad
    close(embeds, reference(theirs), 1e-4)
    assert embeds[1, 3:].eq(0).all() and embeds[1, :3].ne(0).all()  # "the sea" and its end


@pytest.mark.parametrize("place", ["google/umt5-xxl", "tokenizer"])
def test_wans_own_file(folder, theirs, close, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).symlink_to(folder / "tokenizer")
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    tensors = wan_names(theirs)
    assert len(tensors) == 2 + 10 * 3 and "blocks.2.pos_embedding.embedding.weight" in tensors
    torch.save(tensors, path)
    close(load_umt5(path, dtype=torch.float32, length=LENGTH).encode(PROMPTS), reference(theirs), 1e-4)


def test_comfys_scaled_fp8_file(folder, theirs, close, tmp_path):
    """With scales, and with the things that lie in that file beside the weights."""
    stored, expected = {}, {}
    for name, tensor in theirs.state_dict().items():
        if re.search(r"(\.[qkvo]|\.w[io]\w*)\.weight$", name):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            expected[name] = stored[name].float() * scale
        elif "embed_tokens" not in name:
            stored[name] = expected[name] = tensor.clone()
    stored |= {
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
    }
    save_file(stored, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    encoder = load(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", folder)
    dequantised = UMT5EncoderModel(theirs.config).requires_grad_(False).eval()
    dequantised.load_state_dict(expected | {"encoder.embed_tokens.weight": expected["shared.weight"]})
    close(encoder.encode(PROMPTS), reference(dequantised), 1e-4)


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


@pytest.mark.parametrize("naming, dtype", [("transformers", torch.float16), ("wan", torch.float8_e4m3fn)])
def test_comfys_other_files(folder, theirs, close, tmp_path, naming, dtype):
    """`umt5_xxl_fp16.safetensors` in transformers' names, `umt5-xxl-enc-fp8_e4m3fn.safetensors` in Wan's, no scales."""
    plain = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name}
    low = {name: tensor.to(dtype if tensor.ndim == 2 else torch.float16) for name, tensor in plain.items()}
    rounded = UMT5EncoderModel(theirs.config).requires_grad_(False).eval()
    values = {name: tensor.float() for name, tensor in low.items()}
    rounded.load_state_dict(values | {"encoder.embed_tokens.weight": values["shared.weight"]})
    for old, new in TO_WAN if naming == "wan" else ():
        low = {name.replace(old, new): tensor for name, tensor in low.items()}
    save_file(low, tmp_path / "umt5.safetensors")
    close(load(tmp_path / "umt5.safetensors", folder).encode(PROMPTS), reference(rounded), 1e-4)


def test_nothing_is_read_before_the_first_prompt(folder, tmp_path):
    save_file(load_file(folder / "text_encoder" / "model.safetensors"), tmp_path / "umt5.safetensors")
    encoder = load(tmp_path / "umt5.safetensors", folder)
    (tmp_path / "umt5.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        encoder.encode(["the sea"])


def test_it_is_bfloat16_by_default_and_never_float16(folder, theirs):
    embeds = load_umt5(folder / "text_encoder", length=LENGTH).encode(PROMPTS)
    assert embeds.dtype == torch.bfloat16
    exact, low = reference(theirs), reference(copy.deepcopy(theirs).bfloat16())
    assert (embeds - exact).abs().max() <= 2 * (low - exact).abs().max()
    with pytest.raises(ValueError, match="float16: umT5's feed-forward overflows"):
        load_umt5(folder / "text_encoder", dtype=torch.float16)


def test_it_works_inside_inference_mode_and_after_it(folder):
    encoder = load(folder / "text_encoder", folder)
    with torch.inference_mode():
        inside = encoder.encode(["the sea"])
    assert encoder.encode(["the sea"]).equal(inside)
    torch.nn.Linear(24, 2)(encoder.encode(["the sea"])).sum().backward()  # an inference tensor cannot do this


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"decoder.upsamples.0.residual.0.gamma": torch.zeros(2)}, "the Wan 2.1 VAE: give it as vae="),
        ({"blocks.0.self_attn.q.weight": torch.zeros(2)}, "holds a DiT; expected a umT5 text encoder"),
        ({"visual.weight": torch.zeros(2)}, "no model that is known here (its first names: visual.weight); expected"),
        ({"shared.weight": torch.zeros(2, 2)}, "sizes can be inferred; it lacks 'encoder.block.0"),
    ],
)
def test_a_file_that_is_no_text_encoder_is_named(tmp_path, folder, tensors, words):
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(words)}"):
        load(path, folder)


def test_a_file_that_lacks_a_tensor_is_named_at_once(tmp_path, folder, theirs):
    tensors = wan_names(theirs)
    del tensors["blocks.1.pos_embedding.embedding.weight"]
    torch.save(tensors, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match="1 missing: encoder.block.1.layer.0.SelfAttention.relative_attention_bias"):
        load(tmp_path / "t5.pth", folder)


def test_a_missing_tokenizer_is_named(tmp_path, theirs):
    torch.save(wan_names(theirs), tmp_path / "t5.pth")
    with pytest.raises(FileNotFoundError, match="umt5-xxl.*tokenizer.*no such folder; umT5 needs its tokenizer"):
        load_umt5(tmp_path / "t5.pth")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="no tokenizer that transformers can read"):
        load_umt5(tmp_path / "t5.pth")


def test_without_transformers_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape("it comes with dsa-engine[models]")):
        load_umt5(folder / "text_encoder")


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


@pytest.fixture
def encoded(folder, tmp_path):
    save_prompts(tmp_path / "new" / "prompts.safetensors", load(folder / "text_encoder", folder), PROMPTS[:2])
    return tmp_path / "new" / "prompts.safetensors"


def test_encoded_prompts_serve_without_a_model(encoded, theirs, close, monkeypatch):
    real = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        assert not name.startswith("transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    encoder = load_text(encoded)
    assert isinstance(encoder, EncodedPrompts) and encoder.text_dim == 24
    embeds = encoder.encode(["the  sea", PROMPTS[0]])
    wanted = reference(theirs, [PROMPTS[1], PROMPTS[0]])
    close(embeds, wanted[:, : embeds.shape[1]], 1e-4)
    assert embeds.shape[1] == 7  # six words and the end; what follows is zero
    with pytest.raises(ValueError, match=f"'the see': not among the 2 that {encoded} has.*'the sea'"):
        encoder.encode(["the see"])


def test_encoded_prompts_are_a_file_to_train_a_head_with(encoded):
    assert read_prompts(encoded).shape == (2, 7, 24)


def test_encoded_prompts_that_are_none_are_named(encoded, tmp_path):
    header = {"format": PROMPTS_FORMAT}
    for number, (tensors, more) in enumerate(
        [
            ({"prompt_embeds": torch.zeros(2, 3, 4)}, {}),
            ({"prompt_embeds": torch.zeros(2, 3, 4)}, {"prompts": "["}),
            ({"prompt_embeds": torch.zeros(2, 3, 4)}, {"prompts": '["a"]'}),
            ({"prompt_embeds": torch.zeros(2, 3)}, {"prompts": '["a", "b"]'}),
            ({"x": torch.zeros(2, 3, 4)}, {"prompts": '["a", "b"]'}),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {**header, **more})
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_text(path)
    with pytest.raises(ValueError, match="must be at least one"):
        save_prompts(tmp_path / "x.safetensors", EncodedPrompts(encoded), [])
    with pytest.raises(ValueError, match="2 prompts, 1 different"):
        save_prompts(tmp_path / "x.safetensors", EncodedPrompts(encoded), ["the sea", "the  sea"])


def test_the_header_says_what_it_is(encoded):
    with encoded.open("rb") as file:
        about = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert about["__metadata__"]["format"] == "dsa_engine.prompts/1"
    assert json.loads(about["__metadata__"]["prompts"]) == PROMPTS[:2]
