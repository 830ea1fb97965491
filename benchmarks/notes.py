"""The table of `results/NOTES.md`: for each part of a chunk what no version can beat, what is expected, what was
measured.

    python benchmarks/notes.py                                  # writes the table anew from the plan; needs no GPU
    python benchmarks/notes.py --kernels results/gpu-kernels.json --fps results/gpu-fps.json --to results/gpu-NOTES.md

Floors are those of `kernels.py --plan` at the datasheet's rates, predictions its "expect" with what is stated beside
them. Both files must be of Wan2.1 1.3B at 480 x 832 on a GPU; what one of them lacks stays "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks import kernels
from benchmarks.micro import roofline
from benchmarks.micro.backends import DISPATCHED
from benchmarks.targets import MODEL, SIZE
from dsa_engine.config import PRESETS
from dsa_engine.media.mp4 import replacing

NOTES = Path(__file__).parent / "results" / "NOTES.md"
BEGIN, END = "<!-- table: benchmarks/notes.py -->\n", "<!-- end of table -->\n"
NONE = "not measured: no GPU yet"
VAE_TFLOP = 40.65  # of the Wan VAE's decoder for a chunk of 3 latent frames
VAE_MS = 120.0  # a chunk, expected of a bfloat16 decoder that copies and pads nothing by itself
FIRST_VAE = 0.75  # of a chunk's decoding, for the first one: 9 of 12 pixel frames
GAPS_MS = 0.4  # a forward, some 400 kernels a microsecond apart
H100, H200 = roofline.GPUS
SIZES = roofline.Sizes(PRESETS[MODEL], *SIZE)
ROWS = roofline.rows(SIZES)

Line = tuple[str, str, str, str, str, str]  # part, unit, floor on an H100, on an H200, predicted there, measured


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def line(part: str, unit: str, floor: dict[str, float], expect: dict[str, float], measured: str | None) -> Line:
    both = dict.fromkeys((number(expect[H100]), number(expect[H200])))
    return part, unit, number(floor[H100]), number(floor[H200]), " / ".join(both), measured or NONE


def of_row(name: str, found: dict | None) -> Line:
    """One op at one shape, by the fastest backend that dispatch may pick."""
    row = next(r for r in ROWS if r.name == name)
    timed = kernels.fastest([r for r in found["results"] if r["row"] == name], DISPATCHED) if found else None
    floor, expect = (
        {gpu: row.floor(rates) for gpu, rates in some.items()} for some in (roofline.GPUS, roofline.PRACTICAL)
    )
    return line(name, "us", floor, expect, timed and f"{timed['us']:.1f} ({timed['backend']})")


def planned(frames: int) -> dict:
    return kernels.plan_forward(ROWS, SIZES, "bf16", frames)


def measured_forward(found: dict | None, frames: int) -> dict | None:
    forwards = found["measured_forward"]["dispatched"] if found else []
    wanted = {"precision": "bf16", "kv": frames * SIZES.S}
    return next((f for f in forwards if wanted.items() <= f.items()), None)


def of_forward(name: str, frames: int, found: dict | None) -> Line:
    plan, timed = planned(frames), measured_forward(found, frames)
    return line(
        f"forward, kernels alone, {name}", "ms", plan["floor_ms"], plan["expect_ms"], timed and number(timed["ms"])
    )


def of_elementwise(found: dict | None) -> Line:
    some, timed = roofline.forward(ROWS, "bf16", roofline.CHUNK), measured_forward(found, roofline.KEY_FRAMES[1])
    moved = roofline.elementwise_bytes(some, "bf16")
    floor, expect = (
        {gpu: 1e3 * moved / rates.memory for gpu, rates in rates_of.items()}
        for rates_of in (roofline.GPUS, roofline.PRACTICAL)
    )
    name = f"elementwise, {moved / 1e9:.2f} GB a forward"
    return line(name, "ms", floor, expect, timed and number(timed["elementwise"]))


def chunk_ms(plan: dict, kind: str, steps: float) -> dict[str, float]:
    """Milliseconds of a chunk's DiT with its commit; between two whole numbers of steps their mean."""
    around = {int(steps), int(-(-steps // 1))}
    return {gpu: sum(plan[f"chunk_{kind}_ms"][str(n)][gpu] for n in around) / len(around) for gpu in roofline.GPUS}


def of_fps(name: str, frames: int, steps: float, measured: float | None) -> Line:
    """Frames a second with decoding and commit: a chunk's DiT and the decoder, one after the other."""
    plan, (floor, expect) = planned(frames), vae_ms()
    gaps = (steps + 1) * GAPS_MS
    best = {gpu: 12e3 / (ms + floor[gpu]) for gpu, ms in chunk_ms(plan, "floor", steps).items()}
    likely = {gpu: 12e3 / (ms + gaps + expect[gpu]) for gpu, ms in chunk_ms(plan, "expect", steps).items()}
    return line(f"fps, {name}", "1/s", best, likely, number(measured) if measured else None)


def vae_ms() -> tuple[dict[str, float], dict[str, float]]:
    floor = 1e3 * VAE_TFLOP * 1e12 / roofline.HOPPER["bf16"]
    return dict.fromkeys(roofline.GPUS, floor), dict.fromkeys(roofline.GPUS, VAE_MS)


def of_first_frame(steps: int, measured: float | None) -> Line:
    """From the encoded text to the first chunk's frames: its steps without a commit, then its decoding."""
    plan = planned(roofline.CHUNK)
    parts = [(plan[f"{kind}_ms"], vae) for kind, vae in zip(("floor", "expect"), vae_ms())]
    floor, expect = ({gpu: steps * ms[gpu] + FIRST_VAE * vae[gpu] for gpu in roofline.GPUS} for ms, vae in parts)
    name = f"first frame after the text, {steps} steps, the whole chunk decoded"
    return line(name, "ms", floor, expect, number(measured) if measured else None)


def a_chunk(row: dict, which: str) -> float:
    return 12e3 / row["fps"][which]


def at(found: dict | None, *names: str) -> Any:
    """A figure of nested dicts; None where a run has not got so far."""
    for name in names:
        found = (found or {}).get(name)
    return found


def lines(found: dict | None, fps: dict | None) -> list[Line]:
    """All rows; found, fps: what `kernels.py` and `fps.py` have saved, None where they have not run."""
    mean, full = roofline.KEY_FRAMES[1:]
    four, steady, vae = at(fps, "fixed", "4"), at(fps, "steady", "fixed", "4"), at(fps, "ops", "vae")
    forward, here = planned(mean), measured_forward(found, full)
    gaps = a_chunk(steady, "dit_commit") / 5 - here["ms"] if steady and here else None
    commit = a_chunk(four, "dit_commit") - a_chunk(four, "dit") if four else None
    zero, decided = dict.fromkeys(roofline.GPUS, 0.0), at(fps, "decision_us")
    rows = [of_row(r.name, found) for r in ROWS if r.op == "attention" and r.precision == "bf16"]
    rows += [
        of_row(r.name, found) for r in ROWS if r.op in ("linear", "linear_gelu", "cross_attention") and r.calls["bf16"]
    ]
    rows += [
        of_elementwise(found),
        of_forward("first chunk", roofline.CHUNK, found),
        of_forward("clip mean", mean, found),
        of_forward("full window", full, found),
        line("VAE, a chunk", "ms", *vae_ms(), vae and number(vae)),
        line(
            "gaps between launches, a forward", "ms", zero, dict.fromkeys(roofline.GPUS, GAPS_MS), gaps and number(gaps)
        ),
        line("commit, a chunk, clip mean", "ms", forward["floor_ms"], forward["expect_ms"], commit and number(commit)),
        line("decision, host asked", "us", zero, dict.fromkeys(roofline.GPUS, 40.0), decided and number(decided)),
        of_first_frame(4, four and four["first_frame_ms"]),
        of_fps("fixed 4, clip mean", mean, 4, four and four["fps"]["decode"]),
        of_fps("fixed 4, full window", full, 4, steady and steady["fps"]["decode"]),
        of_fps("fixed 2, clip mean", mean, 2, at(fps, "fixed", "2", "fps", "decode")),
        of_fps("2.5 steps by histogram, clip mean", mean, 2.5, at(fps, "fps", "decode")),
    ]
    return rows


def table(found: dict | None, fps: dict | None) -> str:
    """In Markdown."""
    head = ("part", "unit", "floor H100", "floor H200", "predicted (H100 / H200)", "measured")
    body = [head, tuple("---" for _ in head), *lines(found, fps)]
    return "".join(f"| {' | '.join(row)} |\n" for row in body)


def with_table(text: str, new: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{NOTES.name}: must hold the lines {BEGIN.strip()} and {END.strip()}, each once")
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def opened(path: Path | None) -> dict[str, Any] | None:
    """Figures of the model that the notes are about, on a GPU; None where a run has left no file."""
    if path is None or not path.is_file():
        return None
    found = json.loads(path.read_text())
    size = found.get("size") or [found.get("height"), found.get("width")]
    if found["model"] != MODEL or size != SIZE or not found["machine"]["gpu"]:
        raise ValueError(f"{path}: figures of {found['model']} at {size}; must be of {MODEL} at {SIZE} on a GPU")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=Path, metavar="JSON", help="what kernels.py has saved")
    parser.add_argument("--fps", type=Path, metavar="JSON", help="what fps.py has saved")
    parser.add_argument("--to", type=Path, default=NOTES, metavar="FILE", help="default: the notes themselves")
    args = parser.parse_args(argv)
    text = with_table(NOTES.read_text(), table(opened(args.kernels), opened(args.fps)))
    with replacing(args.to) as part:
        part.write_text(text)


if __name__ == "__main__":
    main()
