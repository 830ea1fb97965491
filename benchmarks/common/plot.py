"""A figure that becomes a PNG file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsa_engine.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def png_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """To draw on, in inches; the file appears when it is whole."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=130, layout="constrained")
    yield figure
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
