"""Files of tensors: what is in them without reading it, and one tensor after the other.

Headers are read by the safetensors library and by torch, pickles with `weights_only=True`: no code of a file is run.
A tensor is copied out of its file when it is read, so only one at a time is in memory beside the model.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsa_engine.files import atomic_write

SUFFIXES = (".safetensors", ".pt", ".pth", ".sft")
SAFETENSORS = (".safetensors", ".sft")
INDEX = ".safetensors.index.json"
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")  # diffusers puts a variant in: index.fp16.json
QUANTIZATION = "_quantization_metadata"  # ComfyUI's, in a header: JSON {"layers": {layer: {"format": name, ...}}}
# Where training scripts keep the weights, best first: Self-Forcing's demo runs the EMA weights.
NESTED_KEYS = ("generator_ema", "generator", "generator_lora", "model", "state_dict")
STEMS = ("diffusion_pytorch_model", "model")  # file names that diffusers, Wan and transformers give their weights

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class LazyTensor(NamedTuple):
    """A tensor that still lies in a file. read(device) gives a tensor of its own, in that dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[..., Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, or of an index and its shards, by their stored names."""

    path: Path
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    key: str | None = None  # the entry of a pickle's dictionary that holds them
    header: dict[str, str] = field(default_factory=dict)  # metadata of a safetensors file
    formats: dict[str, Any] = field(default_factory=dict)  # by layer, how the header says its weight is quantized

    def part(self, own: tuple[str, ...], others: tuple[str, ...]) -> TensorFile:
        """Only the tensors whose names begin with one of `own`, without it; formats of `others` are left out."""

        def cut(name: str) -> str:
            return name.removeprefix(next(filter(name.startswith, own), ""))

        tensors = {cut(name): tensor for name, tensor in self.tensors.items() if name.startswith(own)}
        formats = {cut(layer): said for layer, said in self.formats.items() if not layer.startswith(others)}
        return replace(self, tensors=tensors, formats=formats)

    @property
    def nbytes(self) -> int:
        """Bytes of all files on the disk."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(path: str | Path, keys: tuple[str, ...] = NESTED_KEYS) -> TensorFile:
    """What is in a `.safetensors` or pickle file, or in the shards of a `*.safetensors.index.json`.

    keys: the dictionary entries of a pickle to look under, best first.
    Raises FileNotFoundError for a missing file or shard, and ValueError for one that is truncated, foreign,
    or holds anything but tensors.
    """
    path = Path(path)
    if is_index(path):
        return _open_index(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint ending in {', '.join(SUFFIXES)}")
    suffix = path.suffix if path.suffix in SUFFIXES else path.resolve().suffix  # a link may be called anything
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a checkpoint must end in one of {', '.join(SUFFIXES)}, not {path.suffix or 'nothing'}"
        )
    _check_magic(path, suffix)
    if suffix in SAFETENSORS:
        return _open_safetensors(path)
    return _open_pickle(path, keys)


def is_index(path: Path) -> bool:
    """Whether a path is called like an index of shards, of a variant too."""
    return _INDEX.search(path.name) is not None


def beside(path: Path, name: str) -> Path:
    """A file that lies beside a path as it was given, or beside what it points at; the first where neither is there."""
    places = (path.parent / name, path.resolve().parent / name)
    return next(filter(Path.is_file, places), places[0])


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, sorted, without hidden files, such as macOS' `._model.safetensors`."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, by their stored names.

    Raises FileNotFoundError for a missing file and ValueError for one that is truncated, foreign, or holds anything
    but tensors; no code from the file is ever run.
    """
    return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


def find_weights(folder: str | Path) -> Path:
    """The weights' file or index in a folder: by the usual names, or the only checkpoint in it.

    Raises FileNotFoundError for none, ValueError for several.
    """
    folder = Path(folder)
    for stem in STEMS:
        for path in (folder / f"{stem}{INDEX}", folder / f"{stem}.safetensors"):
            if path.is_file():
                return path
    files = [path for path in visible(folder) if path.suffix in SUFFIXES]
    found = [path for path in visible(folder) if is_index(path)] + [path for path in files if not shard_count(path)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in (found or files)[:6])
    if files and not found:
        raise FileNotFoundError(
            f"{folder}: holds shards ({names}) without the index that goes with them, e.g. {STEMS[0]}{INDEX}"
        )
    if found:
        raise ValueError(f"{folder}: holds {len(found)} checkpoints ({names}); give one of them instead of the folder")
    raise FileNotFoundError(
        f"{folder}: a folder without a model; expected is config.json with model.safetensors (this project's format), "
        f"a folder transformer (diffusers), {STEMS[0]}.safetensors or its shards with {STEMS[0]}{INDEX}, or one file "
        f"ending in {', '.join(SUFFIXES)}"
    )


def shard_count(path: Path) -> int:
    """The number of shards in a shard's file name; 0 for a file that is whole."""
    match = re.search(r"-\d{5}-of-(\d{5})(\.\w+)+$", path.name)
    return int(match[1]) if match else 0


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A safetensors file, renamed into place; its folder is created. header: its metadata.

    dtype: for floating-point tensors, None leaves theirs. The tensors must not overlap in memory.
    """
    plain = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_write(path) as part:
        mode = part.stat().st_mode
        save_file(plain, part, {"format": "pt", **(header or {})})
        part.chmod(mode)  # some versions of the library leave a file that only its owner may read


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError, naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a JSON file is expected beside the weights")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin a file with a BOM
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    return values


def _check_magic(path: Path, suffix: str) -> None:
    """Refuses what is often saved under a checkpoint's name: a web page, a git-lfs pointer, the other format."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise ValueError(f"{path}: empty, 0 bytes; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer of {path.stat().st_size} bytes, not the file; run `git lfs pull`")
    if re.match(rb"\s*<(!doctype|!--|html|head|\?xml)", start, re.IGNORECASE):
        line = start.lstrip().splitlines()[0][:40].decode(errors="replace")
        raise ValueError(
            f"{path}: a web page (it begins {line!r}), not a checkpoint; download it again, perhaps after signing in"
        )
    if suffix in SAFETENSORS and start.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: written by torch.save, not a safetensors file; it should end in .pt")
    if suffix not in SAFETENSORS and start[8:10] == b'{"':
        raise ValueError(f"{path}: a safetensors file, not one that torch.save has written; rename it to .safetensors")


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(path, "numpy") as file:
            header, slices = file.metadata() or {}, {name: file.get_slice(name) for name in file.offset_keys()}
            kinds = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except SafetensorError as error:
        if "unknown variant" in str(error) and (foreign := _foreign_dtype(path)):
            raise ValueError(f"{path}: {foreign}; known are {', '.join(DTYPES)}") from error
        raise ValueError(
            f"{path}: not a whole safetensors file, cut off or damaged ({error}); copy or download it again"
        ) from error
    if unknown := [f"{name} is of dtype {code}" for name, (code, _) in kinds.items() if code not in DTYPES]:
        raise ValueError(f"{path}: {unknown[0]}; known are {', '.join(DTYPES)}")
    # The library has checked that the tensors follow each other up to the end. Its `get_tensor` maps the whole file,
    # which the system refuses for one larger than its memory, and counts every page that was read as the process's.
    sizes = [prod(shape) * DTYPES[code].itemsize for code, shape in kinds.values()]
    starts = accumulate(sizes, initial=path.stat().st_size - sum(sizes))
    tensors = {
        name: LazyTensor(DTYPES[code], shape, partial(_read, path, start, DTYPES[code], shape))
        for (name, (code, shape)), start in zip(kinds.items(), starts)
    }
    return TensorFile(path, tensors, (path,), header=header, formats=_formats(header, path))


def _formats(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    if QUANTIZATION not in header:
        return {}
    try:
        return dict(json.loads(header[QUANTIZATION])["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header's {QUANTIZATION} is not JSON with layers ({error!r})") from error


def _foreign_dtype(path: Path) -> str:
    """A tensor of a dtype that the library does not know, which it takes for damage; nothing where there is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        codes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    return next((f"{name} is of dtype {code}" for name, code in codes.items() if code not in DTYPES), "")


def _read(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], device: Any = "cpu") -> Tensor:
    raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, device="cpu")
    with path.open("rb") as file:
        file.seek(offset)
        missing = len(raw) - file.readinto(raw.numpy().data)
    if missing:
        raise ValueError(f"{path}: {missing} bytes fewer than when it was opened")
    return raw.view(dtype).view(shape).to(device)


def _open_index(path: Path) -> TensorFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an index of shards")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(p, str) for p in weight_map.values()):
        raise ValueError(f"{path}: lacks a weight_map, which says in which shard each tensor is")
    tensors: dict[str, LazyTensor] = {}
    formats: dict[str, Any] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        listed = {name for name, file in weight_map.items() if file == shard}
        if os.path.basename(shard) != shard or not beside(path, shard).is_file():
            raise FileNotFoundError(
                f"{path.parent / shard}: no such file; {path.name} puts {len(listed)} tensors there, such as "
                f"{min(listed)}; the {len(shards)} shards belong beside it"
            )
        file = open_checkpoint(beside(path, shard))
        held, formats = file.tensors, formats | file.formats
        for what, names in ((f"puts into {shard}", listed - held.keys()), ("does not name", held.keys() - listed)):
            if names:
                where = "which are not there" if names <= listed else f"which {shard} holds"
                raise ValueError(
                    f"{path}: {what} {len(names)} tensors, {where}: {', '.join(sorted(names)[:4])}; index and shards "
                    "are not of one download"
                )
        tensors |= held
    return TensorFile(path, tensors, (path, *(beside(path, shard) for shard in shards)), formats=formats)


def _open_pickle(path: Path, keys: tuple[str, ...]) -> TensorFile:
    key, tensors = _unpickle(path, keys, "meta")
    size = path.stat().st_size
    content = functools.cache(lambda: _unpickle(path, keys, "cpu")[1])

    def read(name: str, device: Any = "cpu") -> Tensor:
        """A copy: a mapped tensor would keep the file open and change with it."""
        if path.stat().st_size < size:
            raise ValueError(f"{path}: {size - path.stat().st_size} bytes fewer than when it was opened")
        return content()[name].detach().to(device, copy=True).contiguous()

    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), partial(read, name)) for name, t in tensors.items()}
    return TensorFile(path, lazy, (path,), key)


def _plain_reason(path: Path, error: Exception) -> str:
    """torch's message in one sentence, without its control codes and advice on how to run the file's code."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if foreign := re.search(r"(?:GLOBAL|global) ([\w.]+)", text):
        return f"it needs {foreign[1]}, which is not a tensor; save its tensors alone, best as .safetensors"
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and not _is_whole_archive(path):
        return "it is cut off or damaged; copy or download it again"
    return text.splitlines()[0] if text else type(error).__name__


def _is_whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path):
            return True
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _unpickle(path: Path, keys: tuple[str, ...], device: str) -> tuple[str | None, dict[str, Tensor]]:
    """(the key that the tensors are under, the tensors by name): on the meta device, or mapped where possible."""
    try:
        # torch maps any archive, also one with compressed records, which would be read as if they were not.
        mmap = device == "cpu" and zipfile.is_zipfile(path)
        mmap = mmap and not any(record.compress_type for record in zipfile.ZipFile(path).infolist())
        content = torch.load(path, map_location=device, mmap=mmap, weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, EOFError and whatever else a foreign file provokes
        reason = _plain_reason(path, error)
        raise ValueError(
            f"{path}: not a plain dictionary of tensors, so it is not loaded (weights_only=True): {reason}"
        ) from error
    nested = content if isinstance(content, Mapping) else {}
    key = next((k for k in keys if isinstance(nested.get(k), Mapping) and nested[k]), None)
    content = content if key is None else content[key]
    if not isinstance(content, Mapping) or not content:
        held = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: holds {held}, expected a dictionary of tensors by name")
    if others := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path}: entries that are not tensors: {', '.join(others[:5])}; expected tensors by name, "
            f"bare or under one of {', '.join(keys)}"
        )
    return key, {str(name): tensor for name, tensor in content.items()}
