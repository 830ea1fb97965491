"""How each project of the Wan family rolls its models out, and the public names by which a family is inferred."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsa_engine.config import RolloutConfig

# Causal Wan's config.json -> `RolloutConfig`; -1 means global attention.
ROLLOUT_KEYS = {"local_attn_size": "window", "sink_size": "sink", "num_frame_per_block": "chunk_frames"}


@dataclass(frozen=True)
class Family:
    """How the models of one project are rolled out, as its own inference does it.

    keys: the entries of its training dictionaries that it runs, best first. words: in the names of its public files
    and folders, in small letters and digits only. classes: `_class_name` in its configs. note: what to know of it.
    """

    rollout: RolloutConfig
    keys: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    note: str = ""


WARPED_STEPS = (1000.0, 750.0, 500.0, 250.0)
FAMILIES = {
    "self-forcing": Family(
        RolloutConfig(chunk_frames=3, window=None, sink=0, steps=WARPED_STEPS, shift=5.0),
        ("generator_ema",),
        ("selfforcing", "sfwan"),
        ("CausalWanTransformer3DModel",),
        "its demo.py warps with shift=8.0 instead",
    ),
    "longlive": Family(
        RolloutConfig(chunk_frames=3, window=12, sink=3, steps=WARPED_STEPS, shift=5.0),
        ("generator",),
        ("longlive",),
        note="the base needs its LoRA merged: give it as lora=",
    ),
    "causvid": Family(
        RolloutConfig(chunk_frames=3, window=None, sink=0, steps=(1000.0, 757.0, 522.0), shift=1.0),
        ("generator",),
        ("causvid", "autoregressivecheckpoint"),
        note="its steps are the model's timesteps as they are: not warped",
    ),
    "streamdiffusionv2": Family(
        RolloutConfig(chunk_frames=3, window=21, sink=0, steps=WARPED_STEPS, shift=1.0),
        ("generator",),
        ("streamdiffusion", "wancausaldmdv2v"),
        note="its text-to-video rollout; video to video goes frame by frame (chunk_frames=1, window=6, sink=3)",
    ),
    "krea": Family(
        RolloutConfig(chunk_frames=3, window=6, sink=0, steps=WARPED_STEPS, shift=5.0),
        words=("krea",),
        note="its server recomputes the cached frames for every chunk; here they are kept",
    ),
    "wan": Family(
        RolloutConfig(chunk_frames=21, window=None, sink=0, steps=tuple(float(t) for t in range(1000, 0, -20))),
        words=("wan21t2v",),
        classes=("WanPipeline",),
        note="a base model: made for both directions of time, many steps and guidance, which no rollout here gives it",
    ),
}


def family_of(words: Iterable[str], classes: Iterable[str | None]) -> tuple[str | None, str]:
    """(the family, its source) from the configs' `_class_name`, else from the names of the file and its folder."""
    for class_name in classes:
        for name, family in FAMILIES.items():
            if class_name in family.classes:
                return name, f"its config says {class_name}"
    for text in words:
        plain = re.sub(r"[^a-z0-9]", "", text.lower())
        for name, family in FAMILIES.items():
            if any(word in plain for word in family.words):
                return name, f"it is called {text}"
    return None, "neither its config nor its name tells"


def repository_name(path: Path) -> str | None:
    """NAME of a path inside Hugging Face's cache, .../models--ORG--NAME/snapshots/REV/...; None for any other."""
    matches = (re.fullmatch(r"models--(?:.+--)?(.+)", part) for part in reversed(path.parts))
    return next((match[1] for match in matches if match), None)


def names_of(path: Path) -> list[str]:
    """The names that may contain a family's: of the path as given, then of what it points at.

    Of a file these are its own, its folder's and its repository's, of a folder its own and its repository's.
    """
    names = []
    for place in (Path(os.path.abspath(path)), path.resolve()):
        folder = place if place.is_dir() else place.parent
        folder = folder.parent if folder.name == "transformer" else folder
        names += [folder.name] if place.is_dir() else [place.name, folder.name]
        names.append(repository_name(place) or "")
    return [name for name in dict.fromkeys(names) if name]
