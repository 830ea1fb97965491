"""What the results of all backends come to: the fastest of each op, sums over a forward, FP8 beside bfloat16,
tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from benchmarks.common.cli import format_table
from benchmarks.micro import roofline
from benchmarks.micro.backends import BACKENDS, DISPATCHED
from benchmarks.micro.roofline import GPUS, PRECISIONS, Row, Sizes
from dsa_engine.evaluation.summary import rounded

GOAL = 1.4  # times as fast in FP8 as in bfloat16


def absent(results: Sequence[dict]) -> dict[str, list[str]]:
    """Why a backend is not in the results, or not on every row."""
    found: dict[str, set[str]] = {}
    for r in results:
        if r["status"] == "absent":
            found.setdefault(r["backend"], set()).add(r["why"])
    return {backend: sorted(why) for backend, why in found.items()}


def fastest(results: Sequence[dict], row: Row, names: Sequence[str] = BACKENDS) -> dict | None:
    timed = [r for r in results if r["row"] == row.name and "us" in r and r["backend"] in names]
    return min(timed, key=lambda r: r["us"], default=None)


def choices(rows: Sequence[Row], results: Sequence[dict]) -> dict[str, dict]:
    """By op (and fp8): the backend that dispatch may pick with the lowest sum of microseconds over the op's rows, all
    of them right; how often longer the next one takes; and the fastest of all on each row."""
    table, groups = {}, {}
    for row in rows:
        if row.op not in ("linear", "vae_decode"):
            fp8 = " fp8" if row.fp8 and "fp8" not in row.op else ""
            groups.setdefault(row.op + fp8, []).append(row)
    for name, group in groups.items():
        times = {backend: [fastest(results, row, [backend]) for row in group] for backend in DISPATCHED}
        sums = {backend: math.fsum(r["us"] for r in found) for backend, found in times.items() if all(found)}
        if sums:
            first, *others = sorted(sums, key=sums.get)
            lead = sums[others[0]] / sums[first] if others else None
            best = {row.name: fastest(results, row)["backend"] for row in group}
            table[name] = {"backend": first, "us": sums[first], "lead": lead, "fastest": best}
    return table


def twins(rows: Sequence[Row], results: Sequence[dict], names: Sequence[str]) -> dict[str, dict]:
    """By FP8 row with FLOP: the fastest of the named in both precisions, and how many times faster FP8 is; those with
    both timed."""
    found = {}
    gelu = next((fastest(results, r, names) for r in rows if r.name == "gelu_bias fp8"), None)
    for row in (r for r in rows if r.fp8 and r.flop):
        twin = next(t for t in rows if (t.precision, t.what, t.kind) == ("bf16", row.what, row.kind))
        fp8, bf16 = (fastest(results, r, names) for r in (row, twin))
        more = gelu if twin.op == "linear_gelu" else {"us": 0.0}
        if fp8 and bf16 and more:
            times = bf16["us"] / (fp8["us"] + more["us"])
            found[row.name] = {"fp8": fp8["backend"], "bf16": bf16["backend"], "times": times, "goal": times >= GOAL}
    return found


def measured_forwards(rows: Sequence[Row], s: Sizes, results: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Milliseconds of a forward by kind of op, each row with the fastest of the named; those with every row timed."""
    found = []
    for precision in PRECISIONS:
        for frames in roofline.KEY_FRAMES:
            some = roofline.forward(rows, precision, frames)
            best = [fastest(results, row, names) for row in some]
            if all(best):
                by_kind = dict.fromkeys((row.kind for row in some), 0.0)
                for row, result in zip(some, best):
                    by_kind[row.kind] += row.calls[precision] * result["us"] / 1e3
                found.append({"precision": precision, "kv": frames * s.S, "ms": sum(by_kind.values()), **by_kind})
    return found


def report(rows: Sequence[Row], found: dict) -> list[str]:
    """A line for every backend that is there, the fastest of a row starred; then sums and ceilings."""
    lines: list[str] = []

    def table(head: Sequence[str], body: list[list[str]]) -> None:
        lines.extend(["", *format_table([head, *body])] if body else [])

    head = ["op", "backend", "us", "again", "TF/s", "GB/s", "of limit", "error", "allowed", ""]
    body = [
        report_row(row, r, r is fastest(found["results"], row), found["ceilings"])
        for row in rows
        for r in found["results"]
        if r["row"] == row.name
    ]
    lines += [*format_table([head, *body]), "", *(f"no {b}: {'; '.join(why)}" for b, why in found["absent"].items())]
    for capability, choice in found["choice"].items():
        head = [f"choice on {capability}", "backend", "us", "times ahead"]
        body = [
            [op, c["backend"], f"{c['us']:.1f}", f"{c['lead']:.2f}" if c["lead"] else "-"] for op, c in choice.items()
        ]
        table(head, body)
    for which, forwards in found["measured_forward"].items():
        kinds = ("ms", "products", "attention", "cross_attention", "elementwise")
        body = [[f["precision"], str(f["kv"]), *(f"{f[k]:.2f}" for k in kinds)] for f in forwards]
        table([f"one forward, {which}", "KV", *kinds], body)
    for which, pairs in found["twins"].items():
        body = [[n, p["fp8"], p["bf16"], f"{p['times']:.2f}", "yes" if p["goal"] else "NO"] for n, p in pairs.items()]
        table([f"FP8 beside bfloat16, {which}", "fp8", "bf16", "times as fast", f"{GOAL} reached"], body)
    return lines + (["", f"ceilings: {json.dumps(rounded(found['ceilings']))}"] if found["ceilings"] else [])


def report_row(row: Row, r: dict, best: bool, ceilings: dict | None) -> list[str]:
    def text(name: str, form: str) -> str:
        return form.format(r[name]) if r.get(name) is not None else "-"

    reached, ceiling = (
        ("gbs", "copy_gbs") if row.bound(GPUS["H200"]) == "bytes" else ("tflops", f"{row.precision}_tflops")
    )
    peak = (ceilings or {}).get(ceiling)
    return [
        row.name,
        r["backend"] + ("*" if best else ""),
        text("us", "{:.1f}"),
        text("again", "{:+.1%}"),
        text("tflops", "{:.1f}") if row.flop else "-",
        text("gbs", "{:.0f}"),
        f"{r[reached] / peak:.0%}" if peak and "us" in r else "-",
        text("error", "{:.1e}"),
        text("limit", "{:.1e}"),
        " ".join(filter(None, (r["status"].replace("ok", ""), r.get("why")))),
    ]
