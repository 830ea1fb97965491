"""Plots of clips as PNG files: the report of a run (frames over denoising steps), and contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsa_engine.files import atomic_write, check_output_path
from dsa_engine.media.h264 import check_frames

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sizes are inches.
MOST_COLUMNS = 24  # a longer clip shows one frame for every few chunks
BARS_HEIGHT, MARGIN, GAP = 1.7, 0.8, 0.06
INK, BLUES, ACCENT = "#1f2933", ("#c6dbef", "#08519c"), "#d9480f"
BANDS = ("#e9eef5", "#f6ead9")


def write_report(path: str | Path, chunks: Sequence, **options) -> None:
    """Write `report_figure` to a PNG file; `options` are its own. ValueError for a path that does not end in .png."""
    path = check_output_path(path, ".png")
    figure = report_figure(chunks, **options)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def report_figure(
    chunks: Sequence, *, threshold: float | None = None, max_steps: int | None = None, title: str | None = None
) -> Figure:
    """What a clip shows and what it cost: frames of each chunk over a bar of its denoising steps.

    chunks: anything with `frames` (uint8 [T, H, W, 3]), `steps`, `confidence` (a value per frame, drawn as their
    minimum, or None) and `prompt`, such as the engine's. threshold: drawn with the confidence. max_steps: the top of
    the scale, default the maximum of the clip.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not chunks:
        raise ValueError("chunks: a report needs at least one")
    n = len(chunks)
    stride = -(-n // MOST_COLUMNS)  # chunks that share a column of the sheet
    columns = -(-n // stride)
    rows = min(3, *(len(check_frames(c.frames)) for c in chunks)) if stride == 1 else 1
    thumb = min(1.6, max(0.62, 14 / columns))
    width = max(5.5, columns * thumb)
    aspect = chunks[0].frames.shape[1] / chunks[0].frames.shape[2]
    prompts = _prompt_bands(chunks, width / (columns * stride))
    lines = max(text.count("\n") + 1 for _, _, text in prompts)
    heights = [0.17 * lines + 0.12, rows * ((thumb - GAP) * aspect + GAP), BARS_HEIGHT]
    gaps = (0.5 if title else 0.15, GAP, 0.38)  # above each: the title, nothing, the legend
    total = sum(heights) + sum(gaps) + 0.55

    figure = Figure((width + 2 * MARGIN, total), dpi=110)
    FigureCanvasAgg(figure)
    left, top, axes = MARGIN / (width + 2 * MARGIN), total, []
    for gap, height in zip(gaps, heights):
        top -= gap + height
        box = (left, top / total, 1 - 2 * left, height / total)
        axes.append(figure.add_axes(box, xlim=(-0.5, columns * stride - 0.5)))
    if title:
        size = min(12, 12 * (width + MARGIN) / (0.115 * len(title)))  # a letter of bold 12 pt is .115 inches wide
        figure.text(left, 1 - 0.2 / total, title, color=INK, size=size, weight="bold", va="center")
    _draw_prompts(axes[0], prompts)
    _draw_sheet(axes[1], chunks, stride, rows, (thumb - GAP) * columns / width, GAP * rows / heights[1])
    _draw_bars(axes[2], chunks, threshold, max_steps or max(c.steps for c in chunks))
    for first, _, _ in prompts[1:]:
        for ax in axes[1 if stride == 1 else 2 :]:  # between the frames of two chunks, never across one
            ax.axvline(first - 0.5, color=INK, linewidth=1.4, linestyle=(0, (4, 2)), label="_switch")
    return figure


def write_sheet(path: str | Path, clips: np.ndarray, labels: Sequence[str], title: str | None = None) -> None:
    """A contact sheet as a PNG file: clips uint8 [B, T, H, W, 3], one row each, with a label over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path, clips = check_output_path(path, ".png"), np.stack([check_frames(clip) for clip in clips])
    if len(labels) != len(clips):
        raise ValueError(f"{len(labels)} labels for {len(clips)} clips: give one each")
    rows, columns, height, width = clips.shape[:4]
    cell = min(1.0, 16 / columns)
    figure = Figure((columns * cell + 0.2, rows * (cell * height / width + 0.25) + 0.35), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, clip, label in zip(figure.subplots(rows, 1, squeeze=False)[:, 0], clips, labels):
        gap = np.full((height, max(1, width // 32), 3), 255, dtype=np.uint8)
        strip = [part for frame in clip for part in (frame, gap)][:-1]
        axes.imshow(np.concatenate(strip, axis=1), interpolation="nearest", aspect="equal")
        axes.set_title(label, fontsize=8, loc="left", pad=2, color=INK)
        axes.axis("off")
    if title:
        figure.suptitle(title, fontsize=10, weight="bold", color=INK)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _prompt_bands(chunks: Sequence, inches: float) -> list[tuple[int, int, str]]:
    """(first chunk, end, prompt wrapped to its own width) of each run of one prompt; a chunk is `inches` wide."""
    firsts = [i for i, c in enumerate(chunks) if i == 0 or c.prompt != chunks[i - 1].prompt]
    bands = []
    for first, end in zip(firsts, [*firsts[1:], len(chunks)]):
        room = max(3, int((end - first) * inches / 0.082))  # characters of DejaVu Sans 9 pt
        prompt = str(chunks[first].prompt or "")
        text = textwrap.wrap(prompt, room, max_lines=3, placeholder=" …", break_long_words=False)
        legible = all(len(line) <= room for line in text)
        bands.append((first, end, "\n".join(text) if legible else ""))
    return bands


def _draw_prompts(ax: Axes, bands: list[tuple[int, int, str]]) -> None:
    ax.set_axis_off()
    for i, (first, end, text) in enumerate(bands):
        ax.axvspan(first - 0.5, end - 0.5, color=BANDS[i % 2], linewidth=0)
        ax.annotate(text, (first - 0.5, 0.5), (4, 0), textcoords="offset points", color=INK, size=9, va="center")


def _draw_sheet(ax: Axes, chunks: Sequence, stride: int, rows: int, fill: float, gap: float) -> None:
    """`rows` frames of every `stride`-th chunk, first to last from the top. A frame takes the share `fill` of its
    column's width and 1 - `gap` of its row's height."""
    for i in range(0, len(chunks), stride):
        frames = chunks[i].frames
        centre, half = i + (stride - 1) / 2, fill * stride / 2
        shown = np.linspace(0, len(frames) - 1, rows).round().astype(int) if rows > 1 else [len(frames) // 2]
        for row, t in enumerate(shown):
            extent = (centre - half, centre + half, -row - 1 + gap / 2, -row - gap / 2)
            ax.imshow(frames[t], extent=extent, aspect="auto")
    ax.set(xlim=ax.get_xlim(), ylim=(-rows, 0), xticks=[])
    names = {1: [""], 2: ["first", "last"], 3: ["first", "middle", "last"]}[rows]
    ax.set_yticks([-row - 0.5 for row in range(rows)], names, color=INK, size=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _draw_bars(ax: Axes, chunks: Sequence, threshold: float | None, top: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    n, steps = len(chunks), [c.steps for c in chunks]
    shades = LinearSegmentedColormap.from_list("steps", BLUES)
    bars = ax.bar(range(n), steps, width=0.8, color=[shades((s - 1) / max(1, top - 1)) for s in steps])
    if n <= 2 * MOST_COLUMNS:
        for bar, s in zip(bars, steps):
            style: dict[str, Any] = {"ha": "center", "size": 8, "color": "white" if s > (top + 1) / 2 else INK}
            ax.annotate(str(s), (bar.get_x() + 0.4, 0), (0, 3), textcoords="offset points", **style)
    every = max(1, -(-n // 25))
    ax.set(ylim=(0, 1.08 * top), xticks=range(0, n, every), xlabel="chunk", yticks=range(0, top + 1, max(1, top // 8)))
    ax.set_ylabel("denoising steps", color=BLUES[1])
    ax.tick_params(labelsize=8, colors=INK, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=shades(0.7), label="steps")]
    if all(c.confidence is not None for c in chunks):
        handles += _draw_confidence(ax, [min(c.confidence) for c in chunks], threshold)
    ax.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8, borderaxespad=0.2
    )


def _draw_confidence(ax: Axes, confidence: Sequence[float], threshold: float | None) -> list:
    """On a second axis over the same bars; the legend's handles."""
    right = ax.twinx()
    right.set(ylim=(0, 1.08), yticks=(0, 0.25, 0.5, 0.75, 1))
    right.set_ylabel("confidence", color=ACCENT)
    right.tick_params(labelsize=8, colors=INK, length=2)
    right.spines[["top", "left"]].set_visible(False)
    style: dict[str, Any] = {
        "color": ACCENT,
        "marker": "o",
        "markersize": 5,
        "markeredgecolor": "white",
        "linewidth": 1.4,
    }
    handles = right.plot(range(len(confidence)), confidence, label="confidence (minimum of its frames)", **style)
    if threshold is not None:
        label = f"threshold {threshold:g}"
        handles.append(right.axhline(threshold, color=ACCENT, linewidth=1, linestyle=":", label=label))
    return handles
