"""What a checkpoint of the Wan family is: its kind, dialect, sizes and family, told without reading its weights.

Sizes are read from the tensors' shapes, and a config.json beside the weights must agree with them. Whose rollout a
model gets is told by its config or its name, never by its tensors, which are the same in all families; `Found` says by
what it was told.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.lora import lora_of
from dsa_engine.checkpoints.tensor_io import (
    INDEX,
    NESTED_KEYS,
    SUFFIXES,
    Entry,
    TensorFile,
    find_weights,
    open_tensors,
    read_json,
    shard_count,
)
from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig

ENGINE_FORMAT = "dsa_engine/"
HEAD_DIM = 128  # of every Wan model; the tensors do not tell it
# A size of the model -> (tensor, axis) that shows it
SIZES = {
    "dim": ("patch_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0),
    "text_dim": ("text_embedding.0.weight", 1),
    "freq_dim": ("time_embedding.0.weight", 1),
}

# What a name of a VAE means: (kinds of `key_maps.VAES`, the stems of its usual files)
VAE_FILES = {
    "wan": ((key_maps.vae_names.WAN, key_maps.vae_names.DIFFUSERS), ("Wan2.1_VAE", "wan_2.1_vae")),
    "taehv": ((key_maps.vae_names.TINY,), ("taew2_1",)),
}


@dataclass(frozen=True)
class Found:
    """What a file or folder is, without its weights having been read.

    kind: as in `key_maps.KINDS`; None for something unknown. dtypes: elements in each; quantised: weights that have a
    scale; bytes: on the disk; key: the entry of a pickle's dictionary. dialect: of a DiT's names. family: whose rollout
    it gets, None where nothing tells, and family_by: what told it; rollout: of that family, Self-Forcing's where there
    is none. config: a DiT's sizes, None where they cannot be told, and config_by: where they stand, or why not.
    lora: ranks, modules and alpha of an adapter. parts: what else lies in the folder (vae, text, tokenizer).
    note: what to know before it is used.
    """

    path: Path
    weights: Path
    kind: str | None
    tensors: int
    parameters: int
    bytes: int
    files: int
    dtypes: dict[str, int]
    quantised: int = 0
    key: str | None = None
    dialect: str | None = None
    family: str | None = None
    family_by: str = ""
    rollout: RolloutConfig | None = None
    config: ModelConfig | None = None
    config_by: str = ""
    lora: dict[str, Any] | None = None
    parts: dict[str, Path] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values |= {"path": str(self.path), "weights": str(self.weights)}
        values["parts"] = {name: str(path) for name, path in self.parts.items()}
        for key, part in (("config", self.config), ("rollout", self.rollout)):
            values[key] = None if part is None else part.to_dict()
        return values


def inspect(path: str | Path, family: str | None = None) -> Found:
    """What a checkpoint file, an index of shards or a model's folder is; weights are not read.

    family: one of `key_maps.FAMILIES`, instead of the one that the file's config or name tells.
    Raises FileNotFoundError, or ValueError for a file that is broken or foreign.
    """
    return look(Path(path), family)[0]


def look(path: Path, family: str | None) -> tuple[Found, TensorFile]:
    if family is not None and family not in key_maps.FAMILIES:
        raise ValueError(f"family={family!r}: must be one of {', '.join(key_maps.FAMILIES)}")
    weights = _weights_of(path)
    if count := shard_count(weights):
        raise ValueError(f"{weights}: one of {count} shards; give the folder, or the *{INDEX} beside it")
    beside = weights.parent / "config.json"
    values = read_json(beside) if beside.is_file() else {}
    told, family_by = (family, "as asked for") if family else _told_family(path, values)
    best = key_maps.FAMILIES[told].keys if told else ()
    file = open_tensors(weights, (*best, *NESTED_KEYS))
    entries = file.entries
    found = Found(
        path,
        weights,
        key_maps.kind_of(entries),
        tensors=len(entries),
        parameters=_count(entries),
        bytes=file.nbytes,
        files=len(file.files),
        dtypes=_dtypes(entries),
        quantised=sum(name.rpartition(".")[2] in key_maps.SCALES for name in entries),
        key=file.key,
        dialect=key_maps.dialect_of(entries),
        parts=companions(path) if path.is_dir() else {},
    )
    if found.kind == key_maps.LORA:
        adapter = lora_of(file)
        more = {"lora": {"ranks": adapter.ranks, "modules": len(adapter.pairs), "alpha": adapter.alpha}}
    elif str(values.get("format")).startswith(ENGINE_FORMAT) and weights.name == "model.safetensors":
        more = {"kind": key_maps.ENGINE, "rollout": RolloutConfig.from_dict(values["rollout"])}
        more |= {"config": read_model_config(beside), "config_by": "config.json"}
    elif found.kind == key_maps.DIT:
        more = {"family": told, "family_by": family_by} | _rollout(told, {} if family else values, beside)
        try:
            more["config"] = config_of(key_maps.wan_names(entries), weights)
            more["config_by"] = "config.json" if values else "the tensors"
        except (FileNotFoundError, ValueError) as error:
            more["config_by"] = str(error)
    else:
        more = {}
    return dataclasses.replace(found, **more), file


def _told_family(path: Path, values: Mapping[str, Any]) -> tuple[str | None, str]:
    """(family, what told it) of a model's folder or file, with the config.json that lies beside its weights."""
    index = path / "model_index.json"
    classes = [(read_json(index) if index.is_file() else {}).get("_class_name"), values.get("_class_name")]
    return key_maps.family_of(_words(path), classes)


def _rollout(family: str | None, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """rollout and note of a family, with the window, sink and chunk that a causal model's own config.json gives."""
    base, note = RolloutConfig(), "nothing tells how it is rolled out: done as Self-Forcing; give family="
    if family is not None:
        base, note = key_maps.FAMILIES[family].rollout, key_maps.FAMILIES[family].note
    own = {ours: values[key] for key, ours in key_maps.ROLLOUT_KEYS.items() if isinstance(values.get(key), int)}
    if own.get("window") == -1:  # no window there
        own["window"] = None
    try:
        return {"rollout": dataclasses.replace(base, **own), "note": note}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_model_config(path: Path) -> ModelConfig:
    """The sizes in a config.json of Wan, diffusers or this project; errors name the file."""
    values = read_json(path)
    values = values["model"] if isinstance(values.get("model"), dict) else values  # this project's format
    values = {key: value for key, value in values.items() if key not in key_maps.ROLLOUT_KEYS}
    try:
        return ModelConfig.from_dict(
            key_maps.from_diffusers_config(values) if "num_attention_heads" in values else values
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def sizes_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The sizes that a DiT's tensors (Wan's names) show: those of SIZES, num_layers, patch_size and out_dim."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    sizes: dict[str, Any] = {
        size: shapes[name][axis] for size, (name, axis) in SIZES.items() if len(shapes.get(name, ())) > axis
    }
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    if layers:
        sizes["num_layers"] = max(layers) + 1
    patch, head = shapes.get("patch_embedding.weight", ())[2:], shapes.get("head.head.weight")
    if len(patch) == 3:
        sizes["patch_size"] = patch
        if head:
            sizes["out_dim"] = head[0] // prod(patch)
    return sizes


def companions(folder: Path) -> dict[str, Path]:
    """The other parts of a model that lie in a folder of Wan's or diffusers' layout: vae, text, tokenizer."""
    found = {}
    for part, places in key_maps.PLACES.items():
        there = [folder / place for place in places if (folder / place).exists()]
        if there:
            found[part] = there[0]
    return found


def find_vae(model: Path, kind: str) -> Path:
    """The VAE that a name of VAE_FILES means: its file, or a folder vae, in the folder of `model` (a file or a folder),
    in the folder above, or in a folder in either. What a candidate holds is told by its tensors.

    Raises FileNotFoundError that says where it was looked for and which file is expected, ValueError for a candidate
    that is broken.
    """
    kinds, stems = VAE_FILES[kind]
    folder = (model if model.is_dir() else model.parent).absolute()
    folder = folder.parent if folder.name == "transformer" else folder
    inside, beside = (sorted(place.glob("*")) for place in (folder, folder.parent))
    others = []
    # Self-Forcing has its checkpoints/ beside wan_models/Wan2.1-T2V-1.3B/.
    for place in (folder, *inside, folder.parent, *beside, *sorted(folder.parent.glob("*/Wan2.1*"))):
        files = [place / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        for path in (*files, place / "vae"):
            weights = _only_weights(path) if os.path.isdir(path) else path
            if weights is None or not os.path.isfile(weights):  # also where others' folders cannot be looked into
                continue
            held = key_maps.kind_of(open_tensors(weights).entries)
            if held in kinds:
                return weights
            others.append(f"{weights} holds {held or 'no model that is known here'}")
    raise FileNotFoundError(
        f"vae={kind!r}: no {stems[0]}.pth or .safetensors, nor a folder vae with {kinds[0]}, in {folder}, in "
        f"{folder.parent} or in a folder in either; put it there, or give its path as vae="
        + "".join(f"; {other}" for other in dict.fromkeys(others))
    )


def _only_weights(folder: Path) -> Path | None:
    try:
        return find_weights(folder)
    except (FileNotFoundError, ValueError):  # none, or several: those are looked for by their names
        return None


def _weights_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    return find_weights(path / "transformer" if (path / "transformer").is_dir() else path)


def _words(path: Path) -> list[str]:
    """The names that may tell a family: of the file and its folder, or of the folder that a model is."""
    path = path.resolve()
    if path.is_dir():
        return [path.parent.name if path.name == "transformer" else path.name]
    return [path.name, path.parent.name]


def config_of(entries: Mapping[str, Entry], source: Path) -> ModelConfig:
    """The sizes of a config.json beside the weights, which must be the tensors' own; without one, the tensors' own."""
    beside, sizes = source.parent / "config.json", sizes_of(entries)
    if beside.is_file():
        config = read_model_config(beside)
        check_sizes(config, sizes, source, "config.json")
        return config
    lacking = [name for name in (*SIZES, "num_layers", "patch_size", "out_dim") if name not in sizes]
    if lacking:
        raise ValueError(f"{source}: no config.json beside it, and its tensors do not show {', '.join(lacking)}")
    if sizes["dim"] % HEAD_DIM:
        raise FileNotFoundError(
            f"{beside}: no such file; it has to say num_heads, since dim={sizes['dim']} of {source.name} is no "
            f"multiple of {HEAD_DIM}, the width of a head in every Wan model"
        )
    return ModelConfig(num_heads=sizes["dim"] // HEAD_DIM, **sizes)


def check_sizes(config: ModelConfig, sizes: Mapping[str, Any], source: Path, said: str) -> None:
    """Raises ValueError where the tensors' sizes are not the config's; `said`: where that config is from."""
    wrong = [f"{n}={size} and not {getattr(config, n)}" for n, size in sizes.items() if size != getattr(config, n)]
    if wrong:
        like = [n for n, p in PRESETS.items() if all(getattr(p, size) == value for size, value in sizes.items())]
        alike = f" (the sizes of {like[0]})" if like else ""
        raise ValueError(
            f"{source}: its tensors have {', '.join(wrong)} as {said} says{alike}; give the weights and the config of "
            "one model"
        )


def _dtypes(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Elements in each dtype, the most first."""
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[str(entry.dtype).removeprefix("torch.")] += prod(entry.shape)
    return dict(counts.most_common())


def _count(entries: Mapping[str, Entry]) -> int:
    """Parameters: what is neither a scale nor beside the point."""
    return sum(
        prod(entry.shape)
        for name, entry in entries.items()
        if name.rpartition(".")[2] not in key_maps.SCALES and not key_maps.IGNORED.search(name)
    )
