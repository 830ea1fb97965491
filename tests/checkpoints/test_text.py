"""umT5 from every file it comes in, against transformers' own run of the same weights; encoded prompts."""

from __future__ import annotations

import builtins
import copy
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from dsa_engine.checkpoints.text import PROMPTS_FORMAT, EncodedPrompts, load_text, load_umt5, save_prompts
from dsa_engine.training.prompts import read_prompts
from tests.support.umt5 import LENGTH, PROMPTS, load, reference, save_umt5, tiny_umt5

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
    return tiny_umt5()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return save_umt5(theirs, tmp_path_factory.mktemp("diffusers"))


def wan_names(theirs) -> dict:
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name}
    for old, new in TO_WAN:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
