"""What the Wan VAE does to decode a usual chunk: FLOP and bytes of its layers by stage, and predicted milliseconds.

Bytes: what each op reads and writes once, nothing kept in cache between ops. `now` is the decoder as it is
(`models/vae.py`); `before` is plain torch op by op with channels first (`plain_vae.py`), where cuDNN turns bfloat16
around in memory for most convolutions besides, which is not counted. torch adds a cuDNN convolution's bias in a pass of
its own. The rates are assumptions: nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.micro.roofline import BF16, FP32, GPUS

WIDTHS = (384, 384, 192, 96)  # channels of the levels, from the latents to the picture
TIME_UP = (True, True, False)  # whether the frames double on the way to the next level
BLOCKS = 3  # residual blocks a level
PAST = 2  # frames a convolution over time remembers
LATENT, RGB, KERNEL = 16, 3, 27
# FLOP a second that are assumed: of implicit GEMMs as narrow as 96 channels well below large products, and of an
# attention whose head of 384 channels no flash kernel takes. Memory: 87.5 % of the datasheet.
RATES = {"conv": 400e12, "linear": 500e12, "attention": 150e12}
MEMORY = 0.875


@dataclass(frozen=True)
class Part:
    """One layer, or all of a kind at a stage. kind: conv, linear, attention, or an op that only moves bytes."""

    kind: str
    stage: str
    flop: int
    now: int
    before: int
    calls: int = 1

    def ms(self, gpu: str, moved: int) -> float:
        """Predicted, for so many bytes."""
        products = self.flop / RATES[self.kind] if self.flop else 0.0
        return 1e3 * max(products, moved / (MEMORY * GPUS[gpu].memory))


@dataclass(frozen=True)
class Stage:
    """T frames of H x W pixels."""

    T: int
    H: int
    W: int

    @property
    def name(self) -> str:
        return f"{self.T} x {self.H}x{self.W}"

    @property
    def pixels(self) -> int:
        return self.T * self.H * self.W

    def part(self, kind: str, flop: int, now: float, before: float) -> Part:
        """Bytes in units of one number of each pixel, in bfloat16."""
        return Part(kind, self.name, flop, round(now * self.pixels * BF16), round(before * self.pixels * BF16))

    def conv(self, inputs: int, outputs: int, taps: int, past: int = PAST, bias: bool = True) -> Iterator[Part]:
        """One that reads `past` frames more; bias: it adds it itself."""
        moved = inputs * (self.T + past) / self.T + outputs + taps * inputs * outputs / self.pixels
        yield self.part("conv", 2 * taps * inputs * outputs * self.pixels, moved, moved)
        yield self.part("bias", 0, 2 * outputs if bias else 0, 2 * outputs)

    def past(self, channels: int, copied: bool) -> Part:
        """The frames before go to the front, and the last ones to the state. copied: so does the input."""
        frames = 4 * PAST / self.T * channels
        return self.part("past", 0, frames + 2 * channels * copied, frames + 2 * channels)

    def norm(self, channels: int, silu: bool = True) -> Part:
        """Before: to float32, its norm, the quotient, back, times gain, and SiLU."""
        wide = FP32 / BF16
        plain = (1 + wide) + wide + 2 * wide + (wide + 1) + 2 + 2 * silu
        return self.part("norm_silu", 0, 2 * channels, plain * channels)

    def normed_conv(self, inputs: int, outputs: int, bias: bool = False) -> Iterator[Part]:
        yield self.norm(inputs)
        yield self.past(inputs, copied=False)
        yield from self.conv(inputs, outputs, KERNEL, bias=bias)

    def block(self, inputs: int, outputs: int) -> Iterator[Part]:
        yield from self.normed_conv(inputs, outputs)
        yield from self.normed_conv(outputs, outputs)
        if inputs != outputs:
            moved = inputs + outputs + inputs * outputs / self.pixels
            yield self.part("linear", 2 * inputs * outputs * self.pixels, moved, moved + 2 * outputs)
        yield self.part("bias_residual", 0, 3 * outputs, 3 * outputs)

    def attend(self, channels: int) -> Iterator[Part]:
        """One head over the pixels of each frame. Before: frames are taken apart, q, k and v turned, the result too."""
        yield self.norm(channels, silu=False)
        for outputs in (3 * channels, channels):
            moved = channels + outputs + channels * outputs / self.pixels
            yield self.part("linear", 2 * channels * outputs * self.pixels, moved, moved + 2 * outputs)
        flop = 4 * channels * self.pixels * self.H * self.W
        yield self.part("attention", flop, 4 * channels, (4 + 8) * channels)
        yield self.part("bias_residual", 0, 3 * channels, (3 + 2) * channels)

    def enlarge(self, channels: int, in_time: bool) -> Iterator[Part]:
        """To twice the sides, and to half of the channels; before, after frames were put in order and taken apart."""
        after = Stage(self.T * (1 + in_time), 2 * self.H, 2 * self.W)
        if in_time:
            yield self.past(channels, copied=True)
            yield from self.conv(channels, 2 * channels, 3)
        ordered = 2 * in_time + 2
        yield after.part("enlarge", 0, 1.25 * channels, (1.25 + ordered / 4) * channels)
        yield from after.conv(channels, channels // 2, 9, past=0)


def layers(height: int, width: int, frames: int) -> Iterator[Part]:
    """All of a chunk of `frames` latent frames after a clip's first, at a latent size of height x width."""
    stage = Stage(frames, height, width)
    yield stage.part("ends", 0, 4 * LATENT, 4 * LATENT)  # times deviation, plus mean
    moved = 2 * LATENT + LATENT * LATENT / stage.pixels
    yield stage.part("linear", 2 * LATENT * LATENT * stage.pixels, moved, moved + 2 * LATENT)
    yield stage.past(LATENT, copied=True)
    yield from stage.conv(LATENT, WIDTHS[0], KERNEL)
    for _ in range(2):
        yield from stage.block(WIDTHS[0], WIDTHS[0])
    yield from stage.attend(WIDTHS[0])
    channels = WIDTHS[0]
    for level, outputs in enumerate(WIDTHS):
        for block in range(BLOCKS):
            yield from stage.block(outputs if block else channels, outputs)
        if level < len(TIME_UP):
            yield from stage.enlarge(outputs, TIME_UP[level])
            stage = Stage(stage.T * (1 + TIME_UP[level]), 2 * stage.H, 2 * stage.W)
            channels = outputs // 2
    yield from stage.normed_conv(WIDTHS[-1], RGB, bias=True)
    yield stage.part("ends", 0, 6 * RGB, 6 * RGB)  # clamped, halved, moved


def summed(parts: Sequence[Part]) -> list[Part]:
    """One of each kind and stage, in the order in which they first come."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        if part.now or part.before:
            groups.setdefault((part.stage, part.kind), []).append(part)
    return [
        Part(kind, stage, *(sum(getattr(p, name) for p in some) for name in ("flop", "now", "before", "calls")))
        for (stage, kind), some in groups.items()
    ]


def plan(height: int, width: int, frames: int) -> dict:
    """For JSON: the rows by kind and stage, and their sums. height, width: of the latents."""
    parts = list(layers(height, width, frames))

    def ms(which: str) -> dict[str, float]:
        return {gpu: sum(p.ms(gpu, getattr(p, which)) for p in parts) for gpu in GPUS}

    rows = []
    for group in summed(parts):
        some = [p for p in parts if (p.stage, p.kind) == (group.stage, group.kind)]
        times = {w: {gpu: sum(p.ms(gpu, getattr(p, w)) for p in some) for gpu in GPUS} for w in ("now", "before")}
        rows.append(
            {name: getattr(group, name) for name in ("kind", "stage", "calls", "flop", "now", "before")}
            | {"now_ms": times["now"], "before_ms": times["before"]}
        )
    moved = {which: sum(getattr(p, which) for p in parts) for which in ("now", "before")}
    return {
        "assumed_tflops": {kind: rate / 1e12 for kind, rate in RATES.items()},
        "assumed_of_bandwidth": MEMORY,
        "rows": rows,
        "tflop": sum(p.flop for p in parts) / 1e12,
        "gb": {which: count / 1e9 for which, count in moved.items()},
        "ms": {which: ms(which) for which in ("now", "before")},
    }


def report(found: dict) -> list[list[str]]:
    """A table: a row of each kind and stage, and the sum."""
    head = ["VAE decode of a chunk", "frames x size", "calls", "GFLOP", "GB before", "GB now"]
    head += [f"predicted {gpu} ms before..now" for gpu in GPUS]

    def times(row: dict, now: str, before: str) -> list[str]:
        return [f"{row[before][gpu]:.2f}..{row[now][gpu]:.2f}" for gpu in GPUS]

    body = [
        [r["kind"], r["stage"], str(r["calls"]), f"{r['flop'] / 1e9:.1f}"]
        + [f"{r[which] / 1e9:.2f}" for which in ("before", "now")]
        + times(r, "now_ms", "before_ms")
        for r in found["rows"]
    ]
    gb, total = found["gb"], found["ms"]
    body.append(
        ["all", "", "", f"{1e3 * found['tflop']:.1f}", f"{gb['before']:.2f}", f"{gb['now']:.2f}"]
        + times(total, "now", "before")
    )
    return [head, *body]
