"""Quantized weights, read as what the file says they are: W = stored * scale, rotated back where it was rotated.

How a weight is to be read stands in a companion `<layer>.comfy_quant` (JSON as bytes) or in the header's
`_quantization_metadata`; older files have scales alone. A format that is not known here is refused by its name: read as
another it would be noise.
Sources: ComfyUI `QUANTIZATION.md`, `comfy/utils.py` (`convert_old_quants`); ConvRot (arXiv 2512.03673): W H with a
normalised regular Hadamard matrix H for every group of columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.tensor_io import LazyTensor, TensorFile

MARKER = ".comfy_quant"
PLAIN = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
GROUP = 256  # of ConvRot where a file does not say
# Keys of a layer's JSON that do not change its values: how it is multiplied, and what the scale's shape shows as well.
NEUTRAL = frozenset({"full_precision_matrix_mult", "per_row", "per_channel", "orig_dtype", "orig_shape"})
# Companions of formats that are not read: DeepSeek's blocks, NVFP4, GPTQ and AWQ, bitsandbytes, ModelOpt, SVDQuant.
FOREIGN = re.compile(
    r"\.(weight_scale_inv|weight_scale_2|weight_zero_point|weight_s_rel|weight_s_channel|weight_codebook|qweight|qzeros|"
    r"g_idx|weight\.(absmax|quant_map|nested_absmax|quant_state\..+)|SCB|pre_quant_scale|smooth_factor|wscales)$"
)


@dataclass(frozen=True)
class Format:
    """How one layer's weight is stored. group: columns that were rotated together, None for none."""

    name: str
    group: int | None = None

    def __str__(self) -> str:
        return self.name if self.group is None else f"{self.name}, rotated in groups of {self.group} (ConvRot)"


def formats_of(file: TensorFile) -> dict[str, Format]:
    """Format of each layer (stored names) whose companion or header gives one.

    Raises ValueError for one that is not known here, or where companion and header differ.
    """
    formats: dict[str, Format] = {}
    for layer, said in file.formats.items():
        formats[layer] = _parse(said, f"{file.path}: {layer}")
    for name, tensor in file.tensors.items():
        if not name.endswith(MARKER):
            continue
        layer = name.removesuffix(MARKER)
        try:
            said = json.loads(bytes(tensor.read().flatten().tolist()))
        except ValueError as error:
            raise ValueError(f"{file.path}: {name}: no JSON that says how its weight is read ({error})") from error
        format = _parse(said, f"{file.path}: {layer}")
        if formats.setdefault(layer, format) != format:
            raise ValueError(f"{file.path}: {layer}: its header says {formats[layer]}, and {name} {format}")
    return formats


def _parse(said: Any, where: str) -> Format:
    said = {"format": said} if isinstance(said, str) else said
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise ValueError(f"{where}: quantized as {said!r}, which names no format; read are {', '.join(PLAIN)}")
    values = {**(said.get("params") or {}), **{key: value for key, value in said.items() if key != "params"}}
    name, rotated, group = values.pop("format"), values.pop("convrot", False), values.pop("convrot_groupsize", None)
    if name not in PLAIN:
        raise ValueError(f"{where}: quantized as {name}, which is not read; read are {', '.join(PLAIN)}")
    if others := [f"{key}={value!r}" for key, value in values.items() if key not in NEUTRAL and value]:
        raise ValueError(f"{where}: quantized as {name} with {', '.join(others)}, which is not known here")
    if not rotated:
        return Format(name)
    group = GROUP if group is None else group
    if not isinstance(group, int) or group < 4 or group & (group - 1) or isqrt(group) ** 2 != group:
        raise ValueError(f"{where}: convrot_groupsize={group!r}: must be a power of 4, such as {GROUP}")
    return Format(name, group)


def dequantize(
    tensors: Mapping[str, LazyTensor], source: str | Path, formats: Mapping[str, Format] | None = None
) -> dict[str, LazyTensor]:
    """W = stored * scale, in float32, for every weight that has a scale; rotated back where its format says so.

    A scale goes by its shape: one value; one per row, [out] or [out, 1]; or one per column, [1, in].
    formats: by the weight's name, as in `tensors`.
    Raises ValueError for a scale without its weight or of another shape, a format without its weight or of another
    dtype, and packed weights (NVFP4, MXFP4).
    """
    formats = formats or {}
    scales = {}
    kept = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if FOREIGN.search(name):
            raise ValueError(f"{source}: {name} belongs to a quantized format that is not read; read are {_known()}")
        if last in key_maps.SCALES:
            if (weight := f"{stem}.weight") in scales:
                raise ValueError(f"{source}: two scales for {weight}; expected is one")
            scales[weight] = tensor
        elif not key_maps.IGNORED.search(name):
            kept[name] = tensor
    for name, format in formats.items():
        dtype = kept[name].dtype if name in kept else None
        if dtype != PLAIN[format.name]:
            held = "not there" if dtype is None else f"of {dtype}"
            raise ValueError(f"{source}: {name} is said to be quantized as {format}, but it is {held}")
    for name, scale in scales.items():
        shape = kept[name].shape if name in kept else None
        if shape is None or _broadcast(scale.shape, shape) is None:
            has = "not there" if shape is None else f"of shape {list(shape)}"
            raise ValueError(
                f"{source}: a scale of shape {list(scale.shape)} for {name}, which is {has}; expected is one value, or "
                "one per row"
            )
        kept[name] = LazyTensor(torch.float32, kept[name].shape, partial(_scaled, kept[name], scale))
    for name, format in formats.items():
        columns = kept[name].shape[-1] if len(kept[name].shape) == 2 else 0
        if format.group is None:
            continue
        if not columns or columns % format.group:
            raise ValueError(
                f"{source}: {name} of shape {list(kept[name].shape)} is said to be {format}: must be a matrix whose "
                "columns are a multiple of that"
            )
        kept[name] = LazyTensor(kept[name].dtype, kept[name].shape, partial(_unrotated, kept[name], format.group))
    packed = [name for name, tensor in kept.items() if not tensor.dtype.is_floating_point]
    if packed:
        raise ValueError(
            f"{source}: {len(packed)} weights of dtype {kept[packed[0]].dtype} ({', '.join(packed[:4])}); read are "
            f"{_known()}"
        )
    return kept


def hadamard(size: int) -> Tensor:
    """The normalised regular Hadamard matrix of a power of 4, [size, size] in float32: symmetric, its own inverse."""
    four = torch.ones(4, 4, device="cpu") - 2 * torch.eye(4, device="cpu").flip(0)
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def _known() -> str:
    return f"floating-point weights, and FP8 or INT8 with a scale ({', '.join(PLAIN)})"


def _broadcast(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a scale multiplies a weight; None where it does not fit."""
    out, *inner = weight
    if all(size == 1 for size in scale):
        return (1,) * len(weight)
    if scale == (out,) or (scale[0] == out and len(scale) <= len(weight) and all(size == 1 for size in scale[1:])):
        return (out, *[1] * len(inner))
    return scale if len(weight) == 2 and scale == (1, weight[1]) else None


def _scaled(weight: LazyTensor, scale: LazyTensor, device: Any = "cpu") -> Tensor:
    shape = _broadcast(scale.shape, weight.shape)
    return weight.read(device).float() * scale.read(device).float().reshape(shape)


def _unrotated(weight: LazyTensor, group: int, device: Any = "cpu") -> Tensor:
    rotated = weight.read(device).float()
    return (rotated.unflatten(1, (-1, group)) @ hadamard(group).to(device)).flatten(1)
