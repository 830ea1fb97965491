"""Checkpoint files for the tests: sparse ones of any size, ones that must be refused; and one chunk of a loaded DiT."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.sampling.kv_cache import KVCache

WEB_PAGE = "<!DOCTYPE html><html><body>404: Not Found</body></html>\n" * 20


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(path, content) -> None:
    """By safetensors or torch.save, as the path's suffix says."""
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)


def write_sparse(path, config: ModelConfig, prefix: str = "") -> dict[str, torch.Tensor]:
    """A bfloat16 DiT of any size whose data is a hole in the file; its tensors, on the meta device."""
    with torch.device("meta"):
        tensors = CausalDiT(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[prefix + name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return tensors


def raises_naming(kind, path, call, *words) -> str:
    """The call fails with the path in its message, which is returned."""
    with pytest.raises(kind, match=re.escape(str(path))) as error:
        call()
    assert [word for word in words if word not in str(error.value)] == [], error.value
    return str(error.value)


def velocity(model: CausalDiT, x, t, text):
    """One chunk with no past, [B, F, C, H, W]."""
    config, frames = model.config, x.shape[1]
    tokens = config.tokens_per_frame(*x.shape[-2:])
    cache = KVCache(config.num_layers, config.num_heads, config.head_dim, tokens, frames, slots=len(x))
    rows = cache.rows(cache.acquire(len(x)), frames)
    return model(x, t[:, None].expand(len(x), frames), rows.frames, model.text_kv(text), rows).velocity
