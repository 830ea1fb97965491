"""What several commands share: flags, how results are shown, the warm-up with its progress bar."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tqdm import tqdm

from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.models.fp8 import QUANTIZATIONS
from dsa_engine.pipeline import Pipeline

Result = tuple[dict[str, Any] | None, list[str], int]  # for --json, lines for people, the exit code
LOADING = ("family", "lora", "vae", "text", "offload", "quantization")  # what Pipeline.from_pretrained gets as it is


def add_family(parser: argparse.ArgumentParser) -> None:
    text = "whose chunks, window and schedule a checkpoint gets: " + ", ".join(FAMILIES)
    parser.add_argument("--family", choices=tuple(FAMILIES), help=text)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    text = "what is in FP8: GEMMs and cache, or one of them (compute capability 8.9)"
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=text)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Flags of a model that is loaded to make video."""
    add = parser.add_argument
    add("--model", default="shapes", help="shipped name, folder or checkpoint (default shapes)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--threads", type=threads, help="CPU threads (default: 1 for a small model, else torch's own count)")
    add_family(parser)
    add("--lora", metavar="FILE", help="an adapter to merge into a checkpoint")
    add("--vae", metavar="PATH", help="video VAE of a checkpoint, or wan | taehv (default: what lies in its folder)")
    add("--text", metavar="PATH", help="text encoder of a checkpoint, or prompts encoded before")
    add("--offload", metavar="PARTS", help="auto, or of text,vae: they live on the CPU and visit the device")
    add_quantization(parser)


def threads(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError(f"{count}: must be from 1 to 1024; nearest is {min(max(count, 1), 1024)}")
    return count


def warm_up(pipe: Pipeline, graphs: bool = True) -> float:
    """Seconds of `Pipeline.warmup`, with a bar while CUDA graphs are captured."""
    quiet = pipe.engine.dit.device.type != "cuda" or not graphs
    with tqdm(desc="capturing", unit="graph", file=sys.stderr, disable=quiet) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        return pipe.warmup(progress, graphs)


def table(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Lines for people: a name and a value each, nested ones indented."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", *table(value, indent + "  ")]
            continue
        values = value if isinstance(value, (list, tuple)) else [] if value in (None, {}) else [value]
        text = ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)
        label = name.replace("_", " ")
        lines.append(f"{indent}{label:<{max(22 - len(indent), len(label) + 1)}}{text or 'none'}")
    return lines
