"""The log of a training run: a CSV that survives a kill, and a plot of its curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from dsa_engine.files import atomic_write

NOT_CURVES = ("step", "seconds")


class CsvLog:
    """Rows of one run in `folder/log.csv`, drawn in `folder/log.png`."""

    def __init__(self, folder: Path):
        self.csv, self.png = Path(folder) / "log.csv", Path(folder) / "log.png"
        self.rows: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all interruptions."""
        return self.rows[-1].get("seconds", 0.0) if self.rows else 0.0

    def resume(self, step: int) -> None:
        """Continue the file after a step: the rows of later steps are dropped, for the run will add them again."""
        if not self.csv.exists():
            return
        with self.csv.open(newline="") as f:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f) if None not in row.values()]
        self.rows = [{**row, "step": int(row["step"])} for row in rows if row["step"] <= step]
        with atomic_write(self.csv) as part, part.open("w", newline="") as f:
            if self.rows:
                writer = csv.DictWriter(f, self.rows[0])
                writer.writeheader()
                writer.writerows(self.rows)

    def add(self, row: Mapping[str, float]) -> None:
        """One row; its columns are those of the first."""
        fresh = not self.rows
        self.rows.append(dict(row))
        with self.csv.open("w" if fresh else "a", newline="") as f:
            writer = csv.DictWriter(f, self.rows[0])
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def plot(self, title: str) -> None:
        """Each column over the steps, one panel a column: the points, and their mean over a twentieth of the run."""
        from matplotlib.figure import Figure

        names = [name for name in self.rows[0] if name not in NOT_CURVES] if self.rows else []
        if not names:
            return
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure((4.2 * columns, 2.7 * rows + 0.3), dpi=110, layout="constrained")
        figure.suptitle(f"{title}: {self.rows[-1]['step']} steps, {self.seconds / 60:.1f} min", weight="bold")
        steps = [row["step"] for row in self.rows]
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(panels, names):
            values = [row[name] for row in self.rows]
            width = max(1, len(values) // 20)
            smooth = [sum(values[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(values))]
            axes.plot(steps, values, color="#9db8d9", linewidth=0.8)
            axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.6)
            axes.set(title=name, xlabel="step")
            if min(values) > 0 and max(values) > 5 * min(values):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
        with atomic_write(self.png) as part:
            figure.savefig(part, format="png")
