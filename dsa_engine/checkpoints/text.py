"""Text encoders from files: umT5-XXL in any naming, run by transformers, or embeddings that were computed before.

Source of the file layouts: Wan 2.1 `wan/modules/t5.py`; the names are in `key_maps.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.quantized import dequantize, formats_of
from dsa_engine.checkpoints.tensor_io import LazyTensor, find_weights, open_checkpoint, write_tensors
from dsa_engine.checkpoints.weights import check_state_dict, load_weights_streaming
from dsa_engine.models.umt5 import CACHED, EXTRA, LENGTH, UMT5, check_tied, tie

T = TypeVar("T")

PROMPTS_FORMAT = "dsa_engine.prompts/1"
TENSOR = "prompt_embeds"  # as `train --prompts` reads it
EMBEDDING = "encoder.embed_tokens.weight"  # the token embedding once more, see `tie`
# sizes of `UMT5Config` -> (tensor in transformers' names, axis) that shows it
SIZES = {
    "vocab_size": ("shared.weight", 0),
    "d_model": ("shared.weight", 1),
    "d_ff": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    "num_heads": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    "relative_attention_num_buckets": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),
    "d_kv": ("encoder.block.0.layer.0.SelfAttention.q.weight", 0),  # of all heads
}


class EncodedPrompts(nn.Module):
    """A `TextEncoder` that knows the prompts of a file written by `save_prompts`, and needs no model."""

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        super().__init__()
        file = open_checkpoint(path)
        try:
            self.prompts = json.loads(file.header["prompts"])
            tensor = file.tensors[TENSOR]
            fits = len(tensor.shape) == 3 and len(self.prompts) == tensor.shape[0]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: holds no encoded prompts as `save_prompts` writes them ({error})") from error
        if not fits:
            raise ValueError(f"{path}: {TENSOR} {list(tensor.shape)} for {len(self.prompts)} prompts")
        self.path, self.embeds = Path(path), tensor.read(device)

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
    header. Raises ValueError for no prompts, or a repeated one.
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
    if path.suffix == ".safetensors" and path.is_file():
        if open_checkpoint(path).header.get("format") == PROMPTS_FORMAT:
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
    too), or a folder of transformers' layout. The header is read now, the weights for the first prompt.

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
    file = open_checkpoint(weights)
    file = file.part(*key_maps.part_prefixes(file.tensors, key_maps.TEXT))
    key_maps.check_kind(key_maps.kind_of(file.tensors), file.tensors, weights, key_maps.TEXT)
    formats = {next(iter(transformers_names({f"{layer}.weight": None}))): f for layer, f in formats_of(file).items()}
    tensors = dequantize(transformers_names(file.tensors), weights, formats)
    with torch.device("meta"):
        model: nn.Module = UMT5EncoderModel(UMT5Config(**sizes_of(tensors, weights)))
    model = model.to(dtype).requires_grad_(False).eval()
    tie(model)
    fits = {name: tensor for name, tensor in model.state_dict().items() if name != EMBEDDING}
    check_state_dict(fits, tensors, weights)

    def load(model: Any, device: torch.device | str) -> None:
        model.encoder.embed_tokens = None  # one embedding is read, not two
        load_weights_streaming(model, tensors, weights, device, dtype)
        tie(model)
        check_tied(model)

    words = _tokenizer(AutoTokenizer, weights, tokenizer)
    return UMT5(model, words, length=length, cache=cache, device=device, offload=offload, load=load)


def transformers_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """An encoder's tensors under transformers' names, the token embedding once."""
    stripped = {key_maps.strip_wrappers(name): tensor for name, tensor in tensors.items()}
    named = {key_maps.rename(name, key_maps.UMT5_KEYS): tensor for name, tensor in stripped.items()}
    embedding = named.pop(EMBEDDING, None)
    return named if embedding is None else {"shared.weight": embedding} | named


def sizes_of(tensors: Mapping[str, LazyTensor], source: Path) -> dict[str, Any]:
    """`UMT5Config`'s sizes from the tensors (transformers' names). Raises ValueError where they do not show them."""
    try:
        sizes = {size: tensors[name].shape[axis] for size, (name, axis) in SIZES.items()}
    except (KeyError, IndexError) as error:
        raise ValueError(f"{source}: no umT5 encoder whose sizes can be inferred; it lacks {error}") from error
    layers = {int(match[1]) for name in tensors if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return {**sizes, "d_kv": sizes["d_kv"] // sizes["num_heads"], "num_layers": max(layers) + 1, "dropout_rate": 0.0}


def _tokenizer(kind: Any, weights: Path, given: str | Path | None) -> Any:
    """transformers' tokenizer from the folder given, or from one near the weights."""
    near = (weights.parent / "google/umt5-xxl", weights.parent / "tokenizer", weights.parent.parent / "tokenizer")
    folders = near if given is None else (Path(given),)
    folder = next(filter(Path.is_dir, folders), None)
    if folder is None:
        raise FileNotFoundError(
            f"{', '.join(map(str, folders))}: no such folder; umT5 needs its tokenizer (google/umt5-xxl), as tokenizer="
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer that transformers can read ({error}); {EXTRA}") from error
