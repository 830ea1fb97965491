"""Checkpoint files: read them safely, bring their names to Wan's own, load them strictly.

Reads `.safetensors` and `.pt`/`.pth` (tensors only, `weights_only=True`), Self-Forcing's training dicts, FSDP and
compile wrappers in the names, and diffusers' `WanTransformer3DModel` names. Names are data, not code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT

SUFFIXES = (".safetensors", ".pt", ".pth")
# Where training scripts keep the generator, best first: Self-Forcing's demo runs the EMA weights.
NESTED_KEYS = ("generator_ema", "generator", "model", "state_dict")
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
PREFIXES = ("diffusion_model.", "generator.", "model.", "net.")  # any number of them, one after another

# (pattern in diffusers' names, Wan's name), applied in order to each name
DIFFUSERS_NAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.self_attn.\2."),
    (r"^(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"^(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"^(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"^(blocks\.\d+)\.attn1\.norm_", r"\1.self_attn.norm_"),
    (r"^(blocks\.\d+)\.attn2\.norm_", r"\1.cross_attn.norm_"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),  # diffusers counts the two norms without weights differently
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, by the names that stand in it.

    Raises FileNotFoundError for a missing file and ValueError for one that is truncated, foreign, or holds anything
    but tensors; no code from the file is ever run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint ending in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a checkpoint must end in one of {', '.join(SUFFIXES)}, not {path.suffix or 'nothing'}"
        )
    return _plain_tensors(path, _unpickle(path))


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the legacy format cannot be mapped; anything that is really wrong fails again
        pass
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, EOFError and whatever else a foreign file provokes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not a plain dictionary of tensors, so it is not loaded (weights_only=True): {reason}"
        ) from error


def _plain_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for key in NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping) and content[key]:
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        held = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: holds {held}, expected a dictionary of tensors by name")
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strange:
        raise ValueError(
            f"{path}: entries that are not tensors: {', '.join(strange[:5])}; expected tensors by name, "
            f"bare or under one of {', '.join(NESTED_KEYS)}"
        )
    return dict(content)


def wan_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Wan's own names: wrappers and prefixes stripped, diffusers' names translated."""
    named = {}
    for name, tensor in tensors.items():
        name = WRAPPERS.sub("", name)
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name[len(prefix) :]
        for pattern, replacement in DIFFUSERS_NAMES:
            name = re.sub(pattern, replacement, name)
        if name in named:
            raise ValueError(f"two tensors of the file are both called {name!r} once prefixes are stripped")
        named[name] = tensor
    return named


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a module whose names and shapes must all agree; ValueError says which do not."""
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    misshapen = [
        f"{k} {list(tensors[k].shape)} instead of {list(own[k].shape)}"
        for k in sorted(own.keys() & tensors.keys())
        if tensors[k].shape != own[k].shape
    ]
    if missing or unexpected or misshapen:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        report = "; ".join(
            f"{len(n)} {what}: {', '.join(n[:4])}{', ...' if len(n) > 4 else ''}" for what, n in parts if n
        )
        raise ValueError(f"{source}: does not fit the model's config: {report}")
    module.load_state_dict(tensors, assign=any(p.is_meta for p in module.parameters()))


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError, naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Wan-style config.json is expected beside the weights")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    return values


def read_model_config(path: Path) -> ModelConfig:
    """The sizes in a Wan-style config.json; errors name the file."""
    values = read_json(path)
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_dit(
    path: str | Path, config: ModelConfig | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalDiT:  # fmt: skip
    """A causal DiT from a checkpoint file; its sizes come from `config`, or from `config.json` beside the file."""
    path = Path(path)
    tensors = wan_names(read_tensors(path))
    config = config or read_model_config(path.parent / "config.json")
    with torch.device("meta"):
        model = CausalDiT(config)
    load_strict(model, tensors, path)
    return model.to(device=device, dtype=dtype).requires_grad_(False).eval()
