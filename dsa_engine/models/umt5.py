"""Prompts for the Wan family: their cleaning, and the umT5-XXL encoder through transformers.

Wan encodes a prompt of at most 512 tokens under an attention mask and sets everything after its end to zero; the DiT
attends to those zeros. So a prompt is encoded alone and unpadded, which gives the same, and padded with zeros.
Source: Wan 2.1 `wan/modules/{t5,tokenizers}.py`, `wan/text2video.py`; the names are in `checkpoints/key_maps.py`.
"""

from __future__ import annotations

import html
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.checks import check_min
from dsa_engine.models.memory_estimate import TextFootprint
from dsa_engine.models.offload import add_offload_hooks

logger = logging.getLogger(__name__)

LENGTH = 512  # tokens of a prompt at most, the DiT's text_len
CACHED = 64  # prompts whose embeddings are kept, at most 4 MiB each
EXTRA = "it comes with dsa-engine[models]"
_PLAIN = re.compile(r"[\t\n\r -~]*")  # characters that ftfy leaves as they are, but for what it takes for entities:
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")


def clean_prompt(text: str) -> str:
    """A prompt as Wan's tokenizer gets it: ftfy's repairs, HTML entities resolved twice, each run of spaces one space.

    Raises ImportError without ftfy, but for texts that it would not change: printable ASCII without HTML entities.
    """
    if not _PLAIN.fullmatch(text) or _ENTITY.search(text) or html.unescape(text) != text:
        try:
            import ftfy
        except ImportError as error:
            raise ImportError(
                f"prompt {text!r}: ftfy is needed to clean it as Wan does (not for ASCII without HTML); {EXTRA}"
            ) from error
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5(nn.Module):
    """A `TextEncoder`: transformers' `UMT5EncoderModel` with Wan's cleaning and padding, and an LRU cache of prompts.

    Args:
        model: may be on the meta device; `load(model, device)` then fills it when the first prompt is encoded.
        tokenizer: of transformers.
        length: tokens of an embedding, the DiT's text_len.
        cache: prompts kept.
        device: where prompts are encoded.
        offload: keep the weights (11.4 GB in bfloat16) on the CPU, and on the device only the layer that runs (0.4 GB).

    Raises ValueError for a model whose two token embeddings differ.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        *,
        length: int = LENGTH,
        cache: int = CACHED,
        device: torch.device | str = "cpu",
        offload: bool = False,
        load: Callable[[nn.Module, torch.device | str], None] | None = None,
    ):
        super().__init__()
        check_min("length", length)
        check_min("cache", cache, 0)
        check_tied(model)
        self.model, self.tokenizer = model, tokenizer
        self.length, self.device, self.offload = length, torch.device(device), offload
        self._load, self._cache_size, self._placed = load, cache, False
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, length, d_model] in the model's dtype on `device`, zero after each prompt's end."""
        with torch.inference_mode(False), torch.no_grad():  # cached tensors must be usable under any mode
            found = [self._embed(clean_prompt(prompt)) for prompt in prompts]
            result = found[0].new_zeros(len(found), self.length, found[0].shape[1])
            for row, embedding in zip(result, found):
                row[: len(embedding)] = embedding
        return result

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return self.model.shared.embedding_dim

    @property
    def footprint(self) -> TextFootprint:
        """Parameters of the whole and of the largest layer."""
        layers = [sum(p.numel() for p in layer.parameters()) for layer in self._layers()]
        return TextFootprint("umT5", sum(p.numel() for p in self.model.parameters()), max(layers))

    def enable_offload(self) -> None:
        """Work as with `offload=True` from the next prompt on."""
        if not self.offload:
            self.offload, self._placed = True, False

    def _layers(self) -> list[nn.Module]:
        return [*self.model.encoder.block, self.model.encoder.final_layer_norm]

    def _place(self) -> None:
        """Load and move the weights; with offload the token embedding, a table of 2.1 GB, stays on the CPU."""
        device = "cpu" if self.offload else self.device
        if self._load is not None:
            self._load(self.model, device)
            self._load = None
        self.model.to(device)
        if self.offload:
            for layer in self._layers():  # pinned: from pageable memory a prompt of umT5-XXL waits seconds for copies
                add_offload_hooks(layer, self.device, pin=True)
        self._placed = True

    def _embed(self, prompt: str) -> Tensor:
        """The embedding [L, d_model] of a clean prompt."""
        embedding = self._cache.pop(prompt, None)
        if embedding is None:
            embedding = self._encode(prompt)
        self._cache[prompt] = embedding
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return embedding

    def _encode(self, prompt: str) -> Tensor:
        if not self._placed:
            self._place()
        tokens = self.tokenizer(prompt).input_ids
        if len(tokens) > self.length:
            logger.warning("prompt of %d tokens: only %d of them are used: %r", len(tokens), self.length, prompt)
            tokens = self.tokenizer(prompt, truncation=True, max_length=self.length).input_ids
        ids = torch.tensor([tokens], device="cpu" if self.offload else self.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def tie(model: nn.Module) -> None:
    """One token embedding under both of its names. Not every release of transformers does it (its issue 43992)."""
    model.encoder.embed_tokens = model.shared


def check_tied(model: nn.Module) -> None:
    """Raises ValueError unless the embedding that the encoder looks tokens up in is the one that was loaded."""
    shared, used = model.shared.weight, model.encoder.embed_tokens.weight
    if shared is not used and not (shared.shape == used.shape and torch.equal(shared, used)):
        raise ValueError(
            "umT5's shared.weight and encoder.embed_tokens.weight differ: tie them, or every prompt is noise"
        )
    if not shared.is_meta and not shared[: min(len(shared), 1024)].any():
        raise ValueError("umT5's token embedding is zero: its weights were not loaded")
