"""The plot of a serving benchmark: latency over streams for each policy, and the steps under twice the load."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common.plot import png_figure

COLORS = {"fixed": "#a03030", "confidence": "#1f5fbf", "budget": "#3b8f5a"}
ALONE = "#8a8a8a"


def draw(result: dict, path: Path) -> None:
    with png_figure(path, 11, 4.8) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        latencies(left, result)
        steps(right, result)
        for axes, corner in ((left, "outside lower left"), (right, "outside lower right")):
            figure.legend(*axes.get_legend_handles_labels(), loc=corner, ncol=4, fontsize=8)
        held = ", ".join(f"{label} {part['held']}" for part, _, label in capacities(result))
        figure.suptitle(f"{result['model']}: live streams held at their pace: {held}", size=11)


def capacities(result: dict) -> list[tuple[dict, str, str]]:
    """The result of each policy, its color and its name."""
    found = [(part, COLORS[name], name) for name, part in result["policies"].items()]
    alone = result["one_at_a_time"]
    return found + [(alone, ALONE, f"{alone['policy']} one at a time")] * (alone is not None)


def latencies(axes, result: dict) -> None:
    """p95 of each trial over its streams; a large mark at the largest number that the policy held."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for part, color, label in capacities(result):
        more = [result[which][label] for which in ("overload", "beyond") if label in result[which]]
        points = sorted((t["streams"], t["latency_ms"]["p95"]) for t in (*part["trials"], *more) if t["latency_ms"])
        axes.plot(*zip(*points), color=color, lw=1.5, marker=".", ms=6, label=label)
        if part["at"]:
            axes.plot(part["held"], part["at"]["latency_ms"]["p95"], "o", color=color, ms=9)
    deadline = result["deadline_ms"]
    axes.axhline(deadline, color="black", lw=1, ls="--")
    label, where = f"a chunk plays {deadline:.0f} ms", ("axes fraction", "data")
    axes.annotate(label, (1, deadline), (-4, 3), where, "offset points", ha="right", size=8)
    axes.set(xlabel="live streams", ylabel="p95 of a chunk's latency, ms", yscale="log")
    axes.set_title("large marks: the most that are held", size=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")


def steps(axes, result: dict) -> None:
    """Shares of chunks by their steps under twice the load that fixed holds."""
    trials = result["overload"] or {name: part["flood"] for name, part in result["policies"].items()}
    counts = sorted({int(n) for found in trials.values() for n in found["steps_histogram"]})
    width = 0.8 / len(trials)
    for i, (name, found) in enumerate(trials.items()):
        histogram, total = found["steps_histogram"], max(1, sum(found["steps_histogram"].values()))
        shares = [histogram.get(str(n), 0) / total for n in counts]
        x = np.arange(len(counts)) + (i - (len(trials) - 1) / 2) * width
        p95 = f", p95 {found['latency_ms']['p95']:.0f} ms" if found["latency_ms"] else ""
        axes.bar(x, shares, width, color=COLORS[name], label=f"{name}{p95}")
    axes.set_xticks(np.arange(len(counts)), counts)
    axes.set(xlabel="steps of a chunk", ylabel="share of chunks", ylim=(0, 1.05))
    streams = next(iter(trials.values()))["streams"]
    axes.set_title(f"under {streams} streams", size=10, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
