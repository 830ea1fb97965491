"""A tiny umT5 with random weights, its folder as transformers saves it, and Wan's way to run it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dsa_engine.checkpoints.text import load_umt5

LENGTH = 12

PROMPTS = ["a red panda eats a leaf", "the sea", "a red panda on the sea eats the leaf of a tree on the sea at night"]

WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


def tiny_umt5() -> UMT5EncoderModel:
    """Vocabulary: padding, end, unknown, and the words of the prompts."""
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=3 + len(WORDS), d_model=24, d_kv=6, d_ff=20, num_layers=3, num_heads=2)
    model = UMT5EncoderModel(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    return model


def save_tokenizer(words: list[str], folder: Path) -> None:
    """A tokenizer of whole words, numbered from 3 on."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_umt5(model: UMT5EncoderModel, folder: Path) -> Path:
    """text_encoder and tokenizer, as transformers saves them."""
    model.save_pretrained(folder / "text_encoder")
    save_tokenizer(WORDS, folder / "tokenizer")
    return folder


def reference(theirs, prompts=PROMPTS, length=LENGTH):
    """As Wan does it: all prompts padded to the full length under a mask, then everything after their ends zeroed."""
    rows = [[3 + WORDS.index(word) for word in prompt.split()][: length - 1] + [1] for prompt in prompts]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def load(path, folder, dtype=torch.float32, **options):
    return load_umt5(path, folder / "tokenizer", dtype=dtype, length=LENGTH, **options)
