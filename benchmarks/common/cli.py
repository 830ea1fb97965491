"""What the benchmarks' command lines share: argument types and the text that goes to stdout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dsa_engine.files import check_output_path


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1, the nearest legal value")
    return number


def complete(args: argparse.Namespace, **usual: Any) -> argparse.Namespace:
    """Fill in the usual value of each option that was not given. Raises ValueError, before the work and not after it,
    where --save or --plot cannot be written."""
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, suffix in (("save", ".json"), ("plot", ".png")):
        if (path := getattr(args, name, None)) is not None:
            check_output_path(path, suffix)
    return args


def first_line(error: Exception) -> str:
    """Type and first line of an error's message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
