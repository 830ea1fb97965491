"""Video files and the picture of a run: MP4 in and out, and a contact sheet over the steps that each chunk took.

A file is written under a temporary name beside its own and renamed when it is whole, so a failure or Ctrl-C leaves
neither half a file nor a broken old one. Knows nothing of the engine. Frames are uint8 [T, H, W, 3].
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CRF = 16  # x264's quality: 18 passes for transparent, and flat synthetic colours show errors sooner than film
BT709 = 1  # in FFmpeg's enumerations of primaries, transfer and matrix alike
LIMITED_RANGE = 1


def encoder_options() -> dict[str, str]:
    """Options of libx264. x264's AVX-512 code (core 165) lets memory that was never written into its choice of
    quantisers where a picture's macroblocks do not fill a vector: a clip's bytes would change from run to run. What
    the CPU has is asked, which is what x264 takes; torch may have been told to take less (ATEN_CPU_CAPABILITY)."""
    import torch

    narrow = {"x264-params": "asm=avx2"} if torch.cpu._is_avx512_supported() else {}
    return {"crf": str(CRF)} | narrow


def check_target(path: str | Path, suffix: str) -> Path:
    """The path of a file to be written. Raises ValueError for another suffix or a folder of that name."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: must end in {suffix}, as in {Path(path.name or 'clip').with_suffix(suffix)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a {suffix} file")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` (its folder is created): renamed to `path` when the block succeeds, else deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()  # a folder that cannot be written to is an error before the work, not after it
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Mp4Writer:
    """H.264 (yuv420p, BT.709) in an MP4 file, chunk by chunk:

        with Mp4Writer("clip.mp4", fps=12, scale=4) as video:
            video.write(frames)

    fps: frames per second; scale: each pixel becomes scale x scale pixels; threads: of the encoder, None for its own
    choice (the file's bytes depend on their number, and on nothing else). The file appears when the block ends well.
    Raises ValueError for a path that does not end in .mp4, fps or scale that are not above 0, or a clip of no frames.
    """

    def __init__(self, path: str | Path, fps: float, scale: int = 1, threads: int | None = None):
        self.path = check_target(path, ".mp4")
        if isinstance(fps, bool) or not isinstance(fps, (int, float, Fraction)) or not 0 < fps <= 1000:
            raise ValueError(f"fps={fps!r}: must be a number above 0 and at most 1000, e.g. 16")
        if isinstance(scale, bool) or not isinstance(scale, (int, np.integer)) or scale < 1:
            raise ValueError(f"scale={scale!r}: must be a whole number of at least 1, e.g. 4")
        self.fps, self.scale, self.threads = Fraction(fps).limit_denominator(1001), int(scale), threads
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Mp4Writer:
        import av

        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            # faststart: the index comes first, so a browser plays the file while it is still loading
            options = {"movflags": "+faststart"}
            self._container = stack.enter_context(av.open(str(temporary), "w", format="mp4", options=options))
            stack.push(self._finish)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._exits.__exit__(*error)
        self._container = self._stream = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [T, H, W, 3]. Raises ValueError for other arrays, another size than before, or one that
        is odd after scaling; RuntimeError outside the `with` block."""
        import av

        if self._container is None:
            raise RuntimeError(f"{self.path}: not open; write inside `with Mp4Writer(...) as video:`")
        frames = check_frames(frames)
        frames = frames.repeat(self.scale, axis=1).repeat(self.scale, axis=2)
        size = frames.shape[1:3]
        if self._stream is None:
            self._stream = self._open(*size)
        if size != (self._stream.height, self._stream.width):
            before = f"{self._stream.height}x{self._stream.width}"
            raise ValueError(f"frames of {size[0]}x{size[1]} (scaled) after {before}: a clip must have one size")
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            self._container.mux(self._stream.encode(frame))

    def _open(self, height: int, width: int):
        if height % 2 or width % 2:
            raise ValueError(
                f"frames of {height}x{width} after scaling by {self.scale}: H.264 needs even sides; "
                f"the nearest legal scale is {self.scale + 1}"
            )
        stream = self._container.add_stream("libx264", rate=self.fps, options=encoder_options())
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        if self.threads is not None:
            context.thread_count = self.threads
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        return stream

    def _finish(self, kind, *_) -> None:
        if kind is None:
            if self._stream is None:
                raise ValueError(f"{self.path}: no frames were written; a clip needs at least one")
            self._container.mux(self._stream.encode())


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] as they are. Raises ValueError for anything else."""
    kind = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames {kind}: must be a numpy array uint8 [T, H, W, 3]")
    if 0 in frames.shape:
        raise ValueError(f"frames {kind}: must hold at least one frame of at least one pixel")
    return frames


def write_mp4(path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, scale: int = 1) -> None:
    """Write a clip: frames uint8 [T, H, W, 3], or an iterable of such chunks. Errors as `Mp4Writer`'s."""
    with Mp4Writer(path, fps, scale) as video:
        for chunk in [frames] if isinstance(frames, np.ndarray) else frames:
            video.write(chunk)


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """(frames uint8 [T, H, W, 3], frames per second). Raises FileNotFoundError, or ValueError for what is no video."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: holds no video")
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    if not frames:
        raise ValueError(f"{path}: its video has no frames")
    return np.stack(frames), float(rate)


# The report. Sizes are inches.

MOST_COLUMNS = 24  # a longer clip shows one frame for every few chunks
BARS_HEIGHT, MARGIN, GAP = 1.7, 0.8, 0.06
INK, BLUES, ACCENT = "#1f2933", ("#c6dbef", "#08519c"), "#d9480f"
BANDS = ("#e9eef5", "#f6ead9")


def write_report(path: str | Path, chunks: Sequence, **options) -> None:
    """Write `report_figure` to a PNG file; `options` are its own. ValueError for a path that does not end in .png."""
    path = check_target(path, ".png")
    figure = report_figure(chunks, **options)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def report_figure(
    chunks: Sequence, *, threshold: float | None = None, max_steps: int | None = None, title: str | None = None
) -> Figure:
    """What a clip shows and what it cost: frames of each chunk over a bar of its denoising steps.

    chunks: anything with `frames` (uint8 [T, H, W, 3]), `steps`, `confidence` (a value per frame, drawn as the least of
    them, or None) and `prompt`, such as the engine's. threshold: drawn with the confidence. max_steps: the top of the
    scale, default the most steps taken.
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

    path, clips = check_target(path, ".png"), np.stack([check_frames(clip) for clip in clips])
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
    with replacing(path) as temporary:
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
            style = {"ha": "center", "size": 8, "color": "white" if s > (top + 1) / 2 else INK}
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
    style = {"color": ACCENT, "marker": "o", "markersize": 5, "markeredgecolor": "white", "linewidth": 1.4}
    handles = right.plot(range(len(confidence)), confidence, label="confidence (least frame)", **style)
    if threshold is not None:
        label = f"threshold {threshold:g}"
        handles.append(right.axhline(threshold, color=ACCENT, linewidth=1, linestyle=":", label=label))
    return handles
