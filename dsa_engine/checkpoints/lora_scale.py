"""What files say of an adapter's scale, alpha / r or alpha / sqrt(r): a safetensors header, PEFT's adapter_config.json.

Sources: PEFT `tuners/lora/config.py`; diffusers `loaders/lora_base.py` (`lora_adapter_metadata`); kohya's sd-scripts
(`ss_network_alpha`, `ss_network_dim`, `ss_network_args`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from dsa_engine.checkpoints.tensor_io import read_json

CONFIG = "adapter_config.json"
DIFFUSERS = "lora_adapter_metadata"  # JSON in a header, its keys under the component's name
COMPONENT = "transformer."
ALPHAS, RANKS, ROOTS = ("lora_alpha", "alpha", "ss_network_alpha"), ("r", "rank", "ss_network_dim"), ("use_rslora",)
# Settings that make an adapter more than W + scale * B A.
UNSUPPORTED = ("alpha_pattern", "use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora")
CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
)  # `init_lora_weights` that take the adapter out of the base's weights
_EMPTY = ("", "none", "null", "false", "0", "{}", "[]")


@dataclass(frozen=True)
class Scaling:
    """What one source says. alpha, rank: of all modules, None where it does not say; root: whether r's root divides."""

    source: str
    alpha: float | None = None
    rank: float | None = None
    root: bool | None = None


def header_scaling(header: Mapping[str, str], path: Path) -> Scaling:
    """What the header of an adapter's file says. Raises ValueError for a setting that cannot be honoured."""
    values: dict[str, Any] = dict(header)
    if DIFFUSERS in values:
        values |= _json(values.pop(DIFFUSERS), f"{path}: its header's {DIFFUSERS}")
    values = {key.removeprefix(COMPONENT): value for key, value in values.items()}
    if "ss_network_args" in values and not _is_empty(values["ss_network_args"]):
        args = _json(values["ss_network_args"], f"{path}: its header's ss_network_args")
        values.setdefault("use_rslora", args.get("use_rslora", args.get("rs_lora")))
    if _is_empty(values.get("ss_network_alpha", "0")) or _number(values, "ss_network_alpha", path) == 0:
        values.pop("ss_network_alpha", None)  # kohya's 0 means r
    return _scaling(values, path, "its header's ")


def config_scaling(path: Path) -> Scaling:
    """What an `adapter_config.json` says, nothing where there is none; errors as for `header_scaling`."""
    return _scaling(read_json(path), path, f"{path.name}'s ") if path.is_file() else Scaling("")


def _scaling(values: Mapping[str, Any], path: Path, where: str) -> Scaling:
    for key in UNSUPPORTED:
        if not _is_empty(values.get(key)):
            raise ValueError(f"{path}: {key}={values[key]!r}: only LoRA with one alpha for all modules is merged")
    if str(values.get("peft_type") or "LORA").rpartition(".")[2] != "LORA":
        raise ValueError(f"{path}: peft_type={values['peft_type']!r}: only plain LoRA is merged")
    begun = str(values.get("init_lora_weights")).lower()
    if begun.startswith(CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={begun!r}: its base model was changed when it began, so it does not fit the "
            "base as published; have PEFT's save_pretrained convert it to plain LoRA"
        )
    told = {key: number for key in (*ALPHAS, *RANKS) if (number := _number(values, key, path)) is not None}
    alpha, rank = (next((key for key in keys if key in told), None) for keys in (ALPHAS, RANKS))
    root = next((not _is_empty(values[key]) for key in ROOTS if values.get(key) is not None), None)
    return Scaling(where + (alpha or ROOTS[0]), told.get(alpha or ""), told.get(rank or ""), root)


def _number(values: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = values.get(key)
    if value is None or isinstance(value, str) and value.strip().lower() in ("", "none", "null", "dynamic"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {key}={value!r}: must be a number") from error
    if not isfinite(number):
        raise ValueError(f"{path}: {key}={value!r}: must be finite")
    return number


def _is_empty(value: Any) -> bool:
    """Whether a setting is off; in a header all values are text."""
    return value.strip().lower() in _EMPTY if isinstance(value, str) else not value


def _json(text: Any, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: holds {type(values).__name__}, expected a JSON object")
    return values
