"""What a checkpoint of the Wan family is: its kind, dialect, sizes and family, without reading its weights.

Sizes are read from the tensors' shapes, and a config.json beside the weights must agree with them. The family (chunk
size, window, schedule) is inferred from the config or the file name, because all families share tensor names;
`family_source` records which.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.families import FAMILIES, ROLLOUT_KEYS, family_of, names_of
from dsa_engine.checkpoints.lora import lora_of
from dsa_engine.checkpoints.quantized import formats_of
from dsa_engine.checkpoints.tensor_io import (
    INDEX,
    NESTED_KEYS,
    LazyTensor,
    TensorFile,
    beside,
    find_weights,
    open_checkpoint,
    read_json,
    shard_count,
)
from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig

logger = logging.getLogger(__name__)

ENGINE_FORMAT = "dsa_engine/"
HEAD_DIM = 128  # of every Wan model; no tensor's shape shows it
# A size of the model -> (tensor, axis) that shows it
SIZES = {
    "dim": ("patch_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0),
    "text_dim": ("text_embedding.0.weight", 1),
    "freq_dim": ("time_embedding.0.weight", 1),
}

# Attributes of `CheckpointInfo` that `dsa-engine info --json` prints under another name.
JSON_KEYS = {
    "quantized": "quantised",
    "family_source": "family_by",
    "config_source": "config_by",
    "components": "parts",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a file or folder is, without its weights having been read."""

    path: Path  # as given
    weights: Path  # the file or index that holds the tensors
    kind: str | None  # as in `key_maps.FILE_KINDS`; None for something unknown
    tensors: int
    parameters: int
    bytes: int  # on the disk
    files: int
    dtypes: dict[str, int]  # elements in each
    quantized: int = 0  # weights that have a scale
    formats: dict[str, int] = field(default_factory=dict)  # layers whose companion or header says how they are read
    key: str | None = None  # the entry of a pickle's dictionary
    dialect: str | None = None  # of a DiT's names
    family: str | None = None  # whose rollout it gets; None: unknown
    family_source: str = ""
    rollout: RolloutConfig | None = None  # of that family, Self-Forcing's for an unknown one
    config: ModelConfig | None = None  # a DiT's sizes; None where they cannot be inferred
    config_source: str = ""  # where the sizes are from, or why there are none
    lora: dict[str, Any] | None = None  # of an adapter: `Lora.to_dict`
    components: dict[str, Path] = field(default_factory=dict)  # vae, text, tokenizer in the same folder
    note: str = ""  # what to know before it is used

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        values = {JSON_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        values |= {"path": str(self.path), "weights": str(self.weights)}
        values["parts"] = {name: str(path) for name, path in self.components.items()}
        for key, config in (("config", self.config), ("rollout", self.rollout)):
            values[key] = None if config is None else config.to_dict()
        return values


def inspect(path: str | Path, family: str | None = None) -> CheckpointInfo:
    """What a checkpoint file, an index of shards or a model's folder is; weights are not read.

    family: one of `FAMILIES`, instead of the one inferred from the config or the file name.
    Raises FileNotFoundError, or ValueError for a file that is broken or foreign.
    """
    return inspect_and_open(Path(path), family)[0]


def inspect_and_open(path: Path, family: str | None) -> tuple[CheckpointInfo, TensorFile]:
    """`inspect`, and the file that it has opened."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family={family!r}: must be one of {', '.join(FAMILIES)}")
    weights = _weights_of(path)
    if count := shard_count(weights):
        raise ValueError(f"{weights}: one of {count} shards; give the folder, or the *{INDEX} beside it")
    config_path = beside(weights, "config.json")
    values = read_json(config_path) if config_path.is_file() else {}
    values = values if _is_models(values) else {}
    inferred, family_source = (family, "as asked for") if family else _infer_family(path, values)
    preferred = FAMILIES[inferred].keys if inferred else ()
    file = open_checkpoint(weights, (*preferred, *NESTED_KEYS))
    whole = len(file.tensors)
    file = file.part(*key_maps.part_prefixes(file.tensors, key_maps.DIT))
    tensors = file.tensors
    kind, detail = key_maps.kind_of(tensors), ""
    if kind == key_maps.DIT:
        kind, detail = _dit_kind(path, weights, sizes_of(key_maps.wan_names(tensors)))
    if len(tensors) < whole:
        detail = f"the DiT of a file with {whole - len(tensors)} tensors of other parts: give it as vae= and text= too"
    info = CheckpointInfo(
        path,
        weights,
        kind,
        tensors=len(tensors),
        parameters=_count(tensors),
        bytes=file.nbytes,
        files=len(file.files),
        dtypes=_dtypes(tensors),
        quantized=sum(name.rpartition(".")[2] in key_maps.SCALES for name in tensors),
        key=file.key,
        dialect=key_maps.dialect_of(tensors),
        components=sibling_components(path) if path.is_dir() else {},
    )
    more: dict[str, Any] = {}
    notes = [detail]
    try:
        more["formats"] = dict(Counter(map(str, formats_of(file).values())))
    except ValueError as error:  # `open_dit` refuses it
        notes.append(str(error))
    if info.kind == key_maps.LORA:
        adapter = lora_of(file)
        more["lora"] = adapter.to_dict()
        notes += adapter.notes
    elif str(values.get("format")).startswith(ENGINE_FORMAT) and weights.name == "model.safetensors":
        more |= {"kind": key_maps.ENGINE, "rollout": RolloutConfig.from_dict(values["rollout"])}
        more |= {"config": read_model_config(config_path), "config_source": "config.json"}
    elif info.kind == key_maps.DIT:
        more |= {"family": inferred, "family_source": family_source}
        more |= _rollout(inferred, {} if family else values, config_path)
        notes.insert(0, more["note"])
        try:
            more["config"] = config_of(key_maps.wan_names(tensors), weights)
            more["config_source"] = "config.json" if values else "the tensors"
        except (FileNotFoundError, ValueError) as error:
            more["config_source"] = str(error)
    return dataclasses.replace(info, **more | {"note": "; ".join(filter(None, notes))}), file


def _dit_kind(path: Path, weights: Path, sizes: Mapping[str, Any]) -> tuple[str, str]:
    """(kind, what tells) of a DiT: one of Wan 2.2's or with image inputs looks like any other by its names."""
    for pair in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        if any(all((folder / name).is_dir() for name in pair) for folder in (path, weights.parent.parent)):
            return key_maps.WAN22_PAIR, f"beside each other are the folders {' and '.join(pair)}"
    inputs, outputs = sizes.get("in_dim"), sizes.get("out_dim")
    if inputs == outputs == 48:
        return key_maps.WAN22_DIT, "48 channels in and out"
    if inputs and outputs and inputs != outputs:
        return key_maps.IMAGE_DIT, f"{inputs} channels in and {outputs} out"
    if half := next((n for n in names_of(path) if re.search(r"(high|low)[-_ ]?noise", n, re.IGNORECASE)), None):
        return key_maps.DIT, f"by its name, {half}, one of the two DiTs of a Wan 2.2 model: it is run for all steps"
    return key_maps.DIT, ""


def _is_models(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is a model's of Wan, diffusers or this project: other tools write that name too."""
    keys = {"model", "dim", "ffn_dim", "attention_head_dim", *ROLLOUT_KEYS}
    name = str(values.get("_class_name") or "Wan")
    if str(values.get("format")).startswith(ENGINE_FORMAT):
        return True
    return "Wan" in name and (not keys.isdisjoint(values) or "_class_name" in values)


def _infer_family(path: Path, values: Mapping[str, Any]) -> tuple[str | None, str]:
    """(family, its source) of a model's folder or file. values: the config.json beside its weights."""
    index = path / "model_index.json"
    classes = [(read_json(index) if index.is_file() else {}).get("_class_name"), values.get("_class_name")]
    return family_of(names_of(path), classes)


def _rollout(family: str | None, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """rollout and note of a family, with the window, sink and chunk that a causal model's own config.json gives."""
    base, note = RolloutConfig(), "nothing tells how it is rolled out: done as Self-Forcing; give family="
    if family is not None:
        base, note = FAMILIES[family].rollout, FAMILIES[family].note
    own = {ours: values[key] for key, ours in ROLLOUT_KEYS.items() if isinstance(values.get(key), int)}
    if own.get("window") == -1:  # means no window
        own["window"] = None
    try:
        return {"rollout": dataclasses.replace(base, **own), "note": note}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_model_config(path: Path) -> ModelConfig:
    """The sizes in a config.json of Wan, diffusers or this project; errors name the file."""
    values = read_json(path)
    values = values["model"] if isinstance(values.get("model"), dict) else values  # this project's format
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{path}: quantization_config says {method}: weights that it has quantized are not read")
    values = {key: value for key, value in values.items() if key not in ROLLOUT_KEYS}
    try:
        return ModelConfig.from_dict(
            key_maps.from_diffusers_config(values) if "num_attention_heads" in values else values
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def sizes_of(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """The sizes that follow from a DiT's tensors (Wan's names): those of SIZES, num_layers, patch_size and out_dim."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
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


def sibling_components(folder: Path) -> dict[str, Path]:
    """The other components of a model that lie in a folder of Wan's or diffusers' layout: vae, text, tokenizer."""
    candidates = {name: [folder / path for path in paths] for name, paths in key_maps.COMPONENT_PATHS.items()}
    return {name: path for name, paths in candidates.items() if (path := next(filter(Path.exists, paths), None))}


def _weights_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    return find_weights(next(filter(Path.is_dir, (path / name for name in ("transformer", "high_noise_model"))), path))


def config_of(tensors: Mapping[str, LazyTensor], source: Path) -> ModelConfig:
    """The sizes of a config.json beside the weights, which must agree with the tensors, or the tensors' own."""
    config_path, sizes = beside(source, "config.json"), sizes_of(tensors)
    has_config = config_path.is_file()
    if has_config and not _is_models(read_json(config_path)):
        logger.warning("%s: no config of a Wan model, passed over: the sizes are those of the tensors", config_path)
        has_config = False
    if has_config:
        config = read_model_config(config_path)
        check_sizes(config, sizes, source, "config.json")
        return config
    missing = [name for name in (*SIZES, "num_layers", "patch_size", "out_dim") if name not in sizes]
    if missing:
        raise ValueError(f"{source}: no config.json beside it, and its tensors do not show {', '.join(missing)}")
    if sizes["dim"] % HEAD_DIM:
        raise FileNotFoundError(
            f"{config_path}: no such file; it has to say num_heads, since dim={sizes['dim']} of {source.name} is no "
            f"multiple of {HEAD_DIM}, the width of a head in every Wan model"
        )
    return ModelConfig(num_heads=sizes["dim"] // HEAD_DIM, **sizes)


def check_sizes(config: ModelConfig, sizes: Mapping[str, Any], source: Path, config_source: str) -> None:
    """Raises ValueError where the tensors' sizes are not those of the config, which is from `config_source`."""
    wrong = [f"{n}={size} and not {getattr(config, n)}" for n, size in sizes.items() if size != getattr(config, n)]
    if wrong:
        presets = [n for n, p in PRESETS.items() if all(getattr(p, size) == value for size, value in sizes.items())]
        alike = f" (the sizes of {presets[0]})" if presets else ""
        raise ValueError(
            f"{source}: its tensors have {', '.join(wrong)} as {config_source} says{alike}; give the weights and the "
            "config of one model"
        )


def _dtypes(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Elements in each dtype, the most first."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += prod(tensor.shape)
    return dict(counts.most_common())


def _count(tensors: Mapping[str, LazyTensor]) -> int:
    """Parameters, without scales and ignored tensors."""
    return sum(
        prod(tensor.shape)
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in key_maps.SCALES and not key_maps.IGNORED.search(name)
    )
