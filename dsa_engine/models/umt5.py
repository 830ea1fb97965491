"""Prompts for the Wan family: the umT5-XXL encoder through transformers, or embeddings that were computed before.

Wan encodes a prompt of at most 512 tokens under an attention mask and sets everything after its end to zero; the DiT
attends to those zeros. So a prompt is encoded alone and unpadded, which gives the same, and padded with zeros.
Source: Wan 2.1 `wan/modules/{t5,tokenizers}.py`, `wan/text2video.py`; the mapping of names is in `names.py`.
"""

from __future__ import annotations

import difflib
import html
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.tensor_io import Entry, find_weights, open_tensors, write_tensors
from dsa_engine.checkpoints.wan import check_fit, dequantised, fill
from dsa_engine.models.memory_estimate import TextSize
from dsa_engine.models.offload import lend

logger = logging.getLogger(__name__)

LENGTH = 512  # tokens of a prompt at most, the DiT's text_len
CACHED = 64  # prompts whose embeddings are kept, at most 4 MiB each
PROMPTS_FORMAT = "dsa_engine.prompts/1"
TENSOR = "prompt_embeds"  # as `train --prompts` reads it
EXTRA = "it comes with dsa-engine[models]"
EMBEDDING = "encoder.embed_tokens.weight"  # the token embedding once more, see `tie`
_PLAIN = re.compile(r"[\t\n\r -~]*")  # characters that ftfy leaves as they are, but for what it takes for entities:
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
# sizes of `UMT5Config` -> (tensor in transformers' names, axis) that shows it
SIZES = {
    "vocab_size": ("shared.weight", 0),
    "d_model": ("shared.weight", 1),
    "d_ff": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    "num_heads": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    "relative_attention_num_buckets": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),
    "d_kv": ("encoder.block.0.layer.0.SelfAttention.q.weight", 0),  # of all heads
}


def clean_prompt(text: str) -> str:
    """A prompt as Wan's tokenizer gets it: ftfy's repairs, HTML entities resolved twice, each run of spaces one space.

    Without ftfy only texts that it would not change are taken: printable ASCII without HTML entities.
    Raises ImportError for any other where ftfy is not installed.
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
    """A `TextEncoder`: transformers' `UMT5EncoderModel` with Wan's cleaning and padding, and a cache of prompts.

    model: may be on the meta device, then `load(model, device)` puts its weights in place there when the first prompt
    is encoded. tokenizer: of transformers. length: tokens of an embedding, the DiT's text_len. cache: prompts kept, the
    least recently used goes first. device: where prompts are encoded; offload: whether the weights, the largest part of
    a Wan model (11.4 GB in bfloat16), live on the CPU and a layer is on the device for its turn only (0.4 GB).
    Raises ValueError for a model whose two token embeddings are not one.
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
        if length < 1 or cache < 0:
            raise ValueError(f"length={length}, cache={cache}: must be at least 1 and at least 0")
        check_tied(model)
        self.model, self.tokenizer = model, tokenizer
        self.length, self.device, self.offload = length, torch.device(device), offload
        self._load, self._kept, self._placed = load, cache, False
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, length, d_model] in the model's dtype on `device`, zero after each prompt's end."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable under any mode
            found = [self._find(clean_prompt(prompt)) for prompt in prompts]
            result = found[0].new_zeros(len(found), self.length, found[0].shape[1])
            for row, embedding in zip(result, found):
                row[: len(embedding)] = embedding
        return result

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return self.model.shared.embedding_dim

    @property
    def size(self) -> TextSize:
        """Parameters of all and of a layer."""
        layers = [sum(p.numel() for p in layer.parameters()) for layer in self._layers()]
        return TextSize("umT5", sum(p.numel() for p in self.model.parameters()), max(layers))

    def send_home(self) -> None:
        """From the next prompt on as with `offload=True`."""
        if not self.offload:
            self.offload, self._placed = True, False

    def _layers(self) -> list[nn.Module]:
        return [*self.model.encoder.block, self.model.encoder.final_layer_norm]

    def _place(self) -> None:
        """Weights to where they are to be; the token embedding, a table of 2.1 GB, is looked up there."""
        home = "cpu" if self.offload else self.device
        if self._load is not None:
            self._load(self.model, home)
            self._load = None
        self.model.to(home)
        if self.offload:
            for layer in self._layers():
                lend(layer, self.device, pin=True)  # pageable, a prompt of umT5-XXL waits seconds for its copies
        self._placed = True

    def _find(self, prompt: str) -> Tensor:
        """The embedding [L, d_model] of a clean prompt."""
        embedding = self._cache.pop(prompt, None)
        if embedding is None:
            embedding = self._encode(prompt)
        self._cache[prompt] = embedding
        while len(self._cache) > self._kept:
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


class EncodedPrompts(nn.Module):
    """A `TextEncoder` that knows the prompts of a file written by `save_prompts`, and needs no model."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        super().__init__()
        file = open_tensors(path)
        try:
            self.prompts = json.loads(file.header["prompts"])
            entry = file.entries[TENSOR]
            fits = len(entry.shape) == 3 and len(self.prompts) == entry.shape[0]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: holds no encoded prompts as `save_prompts` writes them ({error})") from error
        if not fits:
            raise ValueError(f"{path}: {TENSOR} {list(entry.shape)} for {len(self.prompts)} prompts")
        self.path, self.embeds = Path(path), entry.read(device)

    @property
    def text_dim(self) -> int:
        """Width of the embeddings."""
        return self.embeds.shape[2]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, L, text_dim]. Raises ValueError for one that is not in the file, with the nearest that is."""
        rows = []
        for prompt in prompts:
            plain = re.sub(r"\s+", " ", prompt).strip()
            if plain not in self.prompts:
                near = difflib.get_close_matches(plain, self.prompts, 1, 0)
                raise ValueError(
                    f"prompt {prompt!r}: not among the {len(self.prompts)} that {self.path} has encoded; the nearest "
                    f"is {near[0]!r}"
                )
            rows.append(self.prompts.index(plain))
        return self.embeds[rows]


def save_prompts(path: str | Path, encoder: Any, prompts: Sequence[str]) -> None:
    """Encode prompts once, for `EncodedPrompts` on a machine without room for the encoder (and `train --prompts`).

    A safetensors file with the tensor `prompt_embeds` [P, L, text_dim], L the longest prompt's, and the texts in its
    header. Raises ValueError for no prompts, or one that is there twice.
    """
    plain = [re.sub(r"\s+", " ", prompt).strip() for prompt in prompts]
    if not plain or len(set(plain)) < len(plain):
        raise ValueError(f"{len(plain)} prompts, {len(set(plain))} different: must be at least one, each of them once")
    embeds = torch.cat([encoder.encode([prompt]) for prompt in plain])
    used = embeds.ne(0).any(0).any(-1).nonzero()  # the DiT pads with zeros again
    embeds = embeds[:, : int(used[-1]) + 1 if len(used) else 1]
    header = {"format": PROMPTS_FORMAT, "prompts": json.dumps(plain)}
    write_tensors(Path(path), {TENSOR: embeds}, header)


def load_text(
    path: str | Path, tokenizer: str | Path | None = None, device: torch.device | str = "cpu", **options
) -> nn.Module:
    """A text encoder from a file or folder: encoded prompts, or umT5 in Wan's or transformers' names (`load_umt5`)."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file() and open_tensors(path).header.get("format") == PROMPTS_FORMAT:
        return EncodedPrompts(path, device)
    return load_umt5(path, tokenizer, device, **options)


def load_umt5(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    length: int = LENGTH,
    cache: int = CACHED,
    offload: bool = False,
) -> UMT5:
    """umT5 from `models_t5_umt5-xxl-enc-bf16.pth`, a safetensors file in Wan's or transformers' names (FP8 with scales
    too), or a folder of transformers' layout. The file is looked at now, its weights are read for the first prompt.

    tokenizer: its folder; else `google/umt5-xxl` or `tokenizer` near the weights. Sizes come from the tensors.
    dtype: bfloat16 or float32; float16 is too narrow for umT5's feed-forward. Other arguments as for `UMT5`.
    Raises ImportError without transformers, FileNotFoundError, or ValueError for a file that is no umT5 encoder.
    """
    if dtype == torch.float16:
        raise ValueError(
            "dtype=torch.float16: umT5's feed-forward overflows in it; use torch.bfloat16 or torch.float32"
        )
    try:
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise ImportError(f"{path}: umT5 is run by transformers, which is not installed; {EXTRA}") from error
    path = Path(path)
    weights = find_weights(path) if path.is_dir() else path
    file = open_tensors(weights)
    if (kind := key_maps.kind_of(file.entries)) != key_maps.TEXT:
        use = f": {key_maps.USES[kind]}" if kind in key_maps.USES else ""
        raise ValueError(f"{weights}: holds {kind or 'no model that is known here'}{use}; expected {key_maps.TEXT}")
    entries = dequantised(transformers_names(file.entries), weights)
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**sizes_of(entries, weights))).to(dtype).requires_grad_(False).eval()
    tie(model)
    fits = {name: tensor for name, tensor in model.state_dict().items() if name != EMBEDDING}
    check_fit(fits, entries, weights)

    def load(model: nn.Module, place: torch.device | str) -> None:
        model.encoder.embed_tokens = None  # one embedding is read, not two
        fill(model, entries, weights, place, dtype)
        tie(model)
        check_tied(model)

    words = _tokenizer(AutoTokenizer, weights, tokenizer)
    return UMT5(model, words, length=length, cache=cache, device=device, offload=offload, load=load)


def transformers_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """An encoder's tensors under transformers' names, the token embedding once."""
    named = {key_maps.to_dialect(key_maps.bare(name), key_maps.UMT5): entry for name, entry in entries.items()}
    embedding = named.pop(EMBEDDING, None)
    return named if embedding is None else {"shared.weight": embedding} | named


def sizes_of(entries: Mapping[str, Entry], source: Path) -> dict[str, Any]:
    """`UMT5Config`'s sizes as the tensors (transformers' names) show them; ValueError where they do not."""
    try:
        sizes = {size: entries[name].shape[axis] for size, (name, axis) in SIZES.items()}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{source}: no umT5 encoder whose sizes can be told; it lacks {error}") from error
    layers = {int(match[1]) for name in entries if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return {**sizes, "d_kv": sizes["d_kv"] // sizes["num_heads"], "num_layers": max(layers) + 1, "dropout_rate": 0.0}


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


def _tokenizer(kind: Any, weights: Path, given: str | Path | None) -> Any:
    """transformers' tokenizer from the folder given, or from one near the weights."""
    near = (weights.parent / "google/umt5-xxl", weights.parent / "tokenizer", weights.parent.parent / "tokenizer")
    places = near if given is None else (Path(given),)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{', '.join(map(str, places))}: no such folder; umT5 needs its tokenizer (google/umt5-xxl), as tokenizer="
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer that transformers can read ({error}); {EXTRA}") from error
