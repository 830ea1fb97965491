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


def add_family(parser: argparse.ArgumentParser) -> None:
    text = "whose chunks, window and schedule a checkpoint gets: " + ", ".join(FAMILIES)
    parser.add_argument("--family", choices=tuple(FAMILIES), help=text)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    text = "what is in FP8: GEMMs and cache, or one of them (compute capability 8.9)"
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help=text)


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
