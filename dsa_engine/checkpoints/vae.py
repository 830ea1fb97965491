"""The video VAEs from files: Wan's in its own or diffusers' names, and TAEHV; a file's names say which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.quantized import formats_of
from dsa_engine.checkpoints.tensor_io import SUFFIXES, find_weights, open_checkpoint, visible
from dsa_engine.checkpoints.weights import load_strict
from dsa_engine.models.taehv import TAEHV, TGrow
from dsa_engine.models.wan_vae import WanVAE

# What a name of a VAE means: (kinds of `key_maps.VAES`, the stems of its usual files)
VAE_FILES = {
    "wan": ((key_maps.WAN_VAE, key_maps.DIFFUSERS_VAE), ("Wan2.1_VAE", "wan_2.1_vae")),
    "taehv": ((key_maps.TAEHV,), ("taew2_1",)),
}


def load_vae(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanVAE | TAEHV:
    """The Wan VAE (`Wan2.1_VAE.pth`, diffusers' `vae/`) or TAEHV (`taew2_1.pth`), whichever a file or a folder holds.

    A Wan VAE has the width of its file, so a narrower one of the same layers loads too.
    Raises FileNotFoundError, or ValueError for a file that is broken, does not fit, or holds something else, which is
    said before any of it is read.
    """
    path = Path(path)
    path = find_weights(path) if path.is_dir() else path
    file = open_checkpoint(path)
    file = file.part(*key_maps.part_prefixes(file.tensors, key_maps.WAN_VAE))
    kind = key_maps.kind_of(file.tensors)
    key_maps.check_kind(kind, file.tensors, path, *key_maps.VAES)
    if path.stem.startswith("lighttae"):  # the same names and shapes, but its colours would be wrong
        raise ValueError(
            f"{path}: LightTAE, whose latents have Wan's mean and deviation in them, which is not done here; expected "
            f"is TAEHV's taew2_1.pth, or the Wan VAE"
        )
    if layers := formats_of(file):
        raise ValueError(f"{path}: {next(iter(layers))} is quantized as {next(iter(layers.values()))}; a VAE is not")
    tensors = {name: tensor.read() for name, tensor in file.tensors.items()}
    vae: WanVAE | TAEHV
    with torch.device("meta"):
        if kind == key_maps.TAEHV:
            vae = TAEHV()
            tensors = _last_frames(vae, tensors)
        else:
            tensors = key_maps.wan_vae_names(tensors)
            vae = WanVAE(dim=tensors["decoder.upsamples.0.residual.0.gamma"].numel() // 4)
    load_strict(vae, tensors, path)
    vae = vae.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return vae.to_channels_last() if isinstance(vae, WanVAE) else vae


def find_vae(model: Path, kind: str) -> Path:
    """The VAE that a name of VAE_FILES means: its file, or a folder vae, in the folder of `model` (a file or a folder),
    in the folder above, or in a folder in either. Candidates are checked by their tensors.

    Raises FileNotFoundError with the places searched and the file expected, ValueError for a broken candidate.
    """
    kinds, stems = VAE_FILES[kind]
    folder = (model if model.is_dir() else model.parent).absolute()
    folder = folder.parent if folder.name == "transformer" else folder
    children, siblings = (visible(parent) for parent in (folder, folder.parent))
    rejected = []
    # Self-Forcing has its checkpoints/ beside wan_models/Wan2.1-T2V-1.3B/.
    for parent in (folder, *children, folder.parent, *siblings, *sorted(folder.parent.glob("*/Wan2.1*"))):
        files = [parent / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        for path in (*files, parent / "vae"):
            weights = _only_weights(path) if os.path.isdir(path) else path
            if weights is None or not os.path.isfile(weights):  # False for an unreadable folder, too
                continue
            held = key_maps.kind_of(open_checkpoint(weights).tensors)
            if held in kinds:
                return weights
            rejected.append(f"{weights} holds {held or 'no model that is known here'}")
    raise FileNotFoundError(
        f"vae={kind!r}: no {stems[0]}.pth or .safetensors, nor a folder vae with {kinds[0]}, in {folder}, in "
        f"{folder.parent} or in a folder in either; put it there, or give its path as vae="
        + "".join(f"; {other}" for other in dict.fromkeys(rejected))
    )


def _only_weights(folder: Path) -> Path | None:
    try:
        return find_weights(folder)
    except (FileNotFoundError, ValueError):  # none, or several, which are tried by name
        return None


def _last_frames(vae: TAEHV, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with the decoder's TGrow weights cut to the frames that `vae` makes: the last ones.

    A file may hold a stage that makes two frames of one where the model makes one; the later frame is the one to keep.
    """
    tensors = dict(tensors)
    for i, layer in enumerate(vae.decoder):
        name = f"decoder.{i}.conv.weight"
        if isinstance(layer, TGrow) and name in tensors:
            tensors[name] = tensors[name][-layer.conv.out_channels :].clone()
    return tensors
