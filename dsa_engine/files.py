"""Output files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_path(path: str | Path, suffix: str) -> Path:
    """The path of a file to be written. Raises ValueError for another suffix or a folder of that name."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: must end in {suffix}, as in {Path(path.name or 'clip').with_suffix(suffix)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a {suffix} file")
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """An empty file beside `path` (its folder is created): renamed to `path` when the block succeeds, else deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()  # a folder that cannot be written to is an error before the work, not after it
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
