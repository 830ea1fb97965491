"""Kernels of one forward: what each must do, what it takes on this GPU with every backend, and which is fastest.

    python benchmarks/kernels.py --plan                   # FLOP, bytes and floors of each op; needs no GPU
    python benchmarks/kernels.py --save benchmarks/results/kernels-h200.json           # on a GPU: times everything
    python benchmarks/kernels.py --ops attention --backends triton cuda --quick
    python benchmarks/kernels.py --check --height 64 --width 96         # only whether the numbers are right
    python benchmarks/kernels.py --time --model shapes                  # plain torch on a CPU, to try the harness

The VAE's decode of a chunk is planned by layer and stage, before and after its fusions (`vae_work.py`), and timed three
ways on a GPU (`vae_decode.py`).

An op's floor is the larger of its FLOP over the rate of the products and its bytes over the bandwidth, at the rates of
the datasheets (`work.py`); "expect" takes rates that good kernels reach. Sums are of one forward of the whole model;
a chunk is n denoising steps, each with its noise and epilogue, and the commit, which is a forward without them.

Every backend (`contenders.py`) is first compared with float32 on hostile inputs: error is ||out - ref|| / ||ref|| of
the worst output, at most twice that of plain torch in the same dtype. Then it is timed as replays of a CUDA graph on
fresh random inputs that take turns and together exceed the L2 cache. us is the median, again what a second round
differed by: differences below that are noise. "of limit" is the rate or the bandwidth reached, whichever bounds the op,
over that of a large product or copy measured in the same process. `choice` holds, by compute capability, the fastest
correct backend that `ops.dispatch` may pick, over the sum of an op's rows. `twins` sets every FP8 product and attention
beside what does the same in bfloat16: how many times faster the fastest is than the fastest, the goal being 1.4. Where
GELU is in the bfloat16 product's epilogue the FP8 one has the time of `gelu_bias` added. A backend that raises or hangs
is reported and the others go on.

The exit code is 1 if the numbers of any backend are wrong. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks import vae_decode, vae_work, work
from benchmarks.contenders import BACKENDS, DISPATCHED
from benchmarks.judge import Job, ceilings, judge
from benchmarks.record import aligned, commit, machine, save
from benchmarks.work import GPUS, PRACTICAL, PRECISIONS, STEPS, Row, Sizes
from benchmarks.worker import Lost, Worker
from dsa_engine.config import PRESETS, ModelConfig
from dsa_engine.training.figures import rounded
from dsa_engine.video import check_target

WAN = "wan2.1-t2v-1.3b"
SMALL = 1000  # tokens of a chunk, up to which a CPU times it
PATIENCE = 90.0  # seconds for one backend on one row; the first one of an op may compile


def plan_row(row: Row) -> dict:
    return {
        "op": row.op,
        "row": row.name,
        "precision": row.precision,
        "flop": row.flop,
        "read": row.read,
        "written": row.written,
        "calls": row.calls,
        "bound": {name: row.bound(rates) for name, rates in GPUS.items()},
        "floor_us": {name: row.floor(rates) for name, rates in GPUS.items()},
        "expect_us": {name: row.floor(rates) for name, rates in PRACTICAL.items()},
    }


def plan_forward(rows: Sequence[Row], s: Sizes, precision: str, frames: int) -> dict:
    """Sums over a forward, and over a chunk of n steps and the commit."""
    some = work.forward(rows, precision, frames)
    floor, expect = (work.total(some, precision, rates) for rates in (GPUS, PRACTICAL))
    others = [r for r in rows if r.op in work.STEP_OPS]

    def chunk(total: work.Total, gpus: dict) -> dict:
        step = {name: sum(r.floor(rates) for r in others) for name, rates in gpus.items()}
        return {str(n): {name: ((n + 1) * us + n * step[name]) / 1e3 for name, us in total.us.items()} for n in STEPS}

    return {
        "precision": precision,
        "kv": frames * s.S,
        "tflop": sum(floor.flop.values()) / 1e12,
        "tflop_by_kind": {name: flop / 1e12 for name, flop in floor.flop.items()},
        "elementwise_gb": floor.elementwise / 1e9,
        "elementwise_gb_in_epilogues": work.elementwise_bytes(work.in_epilogues(some, s), precision) / 1e9,
        "floor_ms": {name: us / 1e3 for name, us in floor.us.items()},
        "expect_ms": {name: us / 1e3 for name, us in expect.us.items()},
        "chunk_floor_ms": chunk(floor, GPUS),
        "chunk_expect_ms": chunk(expect, PRACTICAL),
    }


def plan(rows: Sequence[Row], s: Sizes) -> dict:
    forwards = [plan_forward(rows, s, precision, frames) for precision in PRECISIONS for frames in work.KEY_FRAMES]
    vae = vae_work.plan(*s.latent, s.F) if s.config != ModelConfig.preset("shapes") else None  # that has a pixel codec
    return {"plan": [plan_row(r) for r in rows], "forward": forwards, "not_timed": work.NOT_TIMED, "vae": vae}


def report_plan(found: dict) -> list[str]:
    """Two tables: the rows, and the sums."""
    head = ["op", "GFLOP", "MB", "bound", *(f"{name} us" for name in GPUS), *(f"expect {name}" for name in GPUS)]
    body = [
        [r["row"], f"{r['flop'] / 1e9:.1f}", f"{(r['read'] + r['written']) / 1e6:.1f}", r["bound"]["H200"]]
        + [f"{r[key][name]:.1f}" for key in ("floor_us", "expect_us") for name in GPUS]
        + ["/".join(str(n) for n in r["calls"].values())]
        for r in found["plan"]
    ]
    lines = aligned([[*head, "calls " + "/".join(PRECISIONS)], *body])
    for name in GPUS:
        head = [f"one forward, {name}", "KV", "TFLOP", "elementwise GB", "floor ms", "expect ms"]
        head += [f"chunk n={n}" for n in STEPS]
        body = [
            [f["precision"], str(f["kv"]), f"{f['tflop']:.1f}", f"{f['elementwise_gb']:.1f}"]
            + [f"{f[key][name]:.1f}" for key in ("floor_ms", "expect_ms")]
            + [f"{f['chunk_floor_ms'][str(n)][name]:.0f}..{f['chunk_expect_ms'][str(n)][name]:.0f}" for n in STEPS]
            for f in found["forward"]
        ]
        lines += ["", *aligned([head, *body])]
    one = found["forward"][0]
    now, then = one["elementwise_gb"], one["elementwise_gb_in_epilogues"]
    more = "with GELU, gate and residual in the epilogues of the products"
    lines += ["", f"elementwise in {one['precision']}: {now:.2f} GB a forward, {then:.2f} GB {more}"]
    if found["vae"]:
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in found["vae"]["assumed_tflops"].items())
        share = found["vae"]["assumed_of_bandwidth"]
        lines += [
            "",
            *aligned(vae_work.report(found["vae"])),
            f"assumed: TF/s of {rates}; {share:.1%} of the bandwidth",
        ]
    return lines


def jobs(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str) -> Iterator[Job]:
    seconds = None if args.check else 0.1 if args.quick else 0.3
    for number, row in enumerate(chosen(args, rows)):
        for backend in args.backends or [b for b in BACKENDS if not (args.quick and b == "compile")]:
            yield Job(row, s, backend, device, args.seed + 1000 * number, seconds)


def chosen(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """--ops, and with --quick one KV length."""
    middle = work.KEY_FRAMES[1]
    some = [r for r in rows if not args.ops or r.op in args.ops]
    return [r for r in some if not args.quick or r.frames in (None, middle)]


def run(todo: Sequence[Job], device: str, until: float, worker: Worker | None) -> tuple[dict | None, list[dict]]:
    """The ceilings (None where nothing is timed) and a result for every job. Without a worker all runs here."""

    def call(function, *args):
        return worker.call(function, *args, seconds=PATIENCE) if worker else function(*args)

    limits = None
    if todo and todo[0].seconds is not None:
        try:
            limits = call(ceilings, device, todo[0].seconds)
        except Lost as reason:
            limits = {"why": str(reason)}
    results = []
    for job in todo:
        if time.monotonic() > until:
            found = {"status": "skipped", "why": "--limit is over"}
        else:
            try:
                found = call(judge, job)
            except Lost as reason:
                found = {"status": "failed", "why": str(reason)}
        if found.pop("broken", False) and worker:
            worker.end()
        results.append({"op": job.row.op, "row": job.row.name, "backend": job.backend} | found)
        if found["status"] != "absent":
            sys.stderr.write(f"{job.row.name:32} {job.backend:9} {found.get('us') or found['status']}\n")
    return limits, results


def decoded(args: argparse.Namespace, s: Sizes, device: str, worker: Worker | None) -> list[dict]:
    """The VAE's decode of a chunk in its ways, where a GPU is there and it is of this model."""
    if device == "cpu" or args.model == "shapes" or args.backends or (args.ops and vae_decode.ROW not in args.ops):
        return []
    seconds = None if args.check else 1.0 if args.quick else 3.0
    asked = (1, s.F, s.config.in_dim, *s.latent), device, args.seed, seconds
    try:
        if worker:
            return worker.call(vae_decode.judge, *asked, seconds=4 * PATIENCE)
        return vae_decode.judge(*asked)
    except (Lost, RuntimeError) as reason:
        return [{"op": vae_decode.ROW, "row": vae_decode.ROW, "backend": "all", "status": "failed", "why": str(reason)}]


def absent(results: Sequence[dict]) -> dict[str, list[str]]:
    """Why a backend is not in the results, or not on every row."""
    some = [r for r in results if r["status"] == "absent"]
    return {b: sorted({r["why"] for r in some if r["backend"] == b}) for b in dict.fromkeys(r["backend"] for r in some)}


def share(row: Row, result: dict, limits: dict | None) -> float | None:
    """What it reaches of the machine's own product or copy, whichever bounds the op."""
    if not limits or "us" not in result:
        return None
    if row.bound(GPUS["H200"]) == "bytes":
        return result["gbs"] / limits["copy_gbs"]
    rate = limits.get(f"{row.precision}_tflops")
    return result["tflops"] / rate if rate else None


def fastest(results: Sequence[dict], names: Sequence[str] = BACKENDS) -> dict | None:
    """Of the results of one row."""
    timed = [r for r in results if "us" in r and r["backend"] in names]
    return min(timed, key=lambda r: r["us"], default=None)


def choices(rows: Sequence[Row], results: Sequence[dict]) -> dict[str, dict]:
    """By op (and fp8): the backend that dispatch may pick with the least sum of microseconds over the op's rows, all of
    them right; how often longer the next one takes; and the fastest of all on each row."""
    table = {}
    by_row = {r.name: [x for x in results if x["row"] == r.name] for r in rows}
    for name in dict.fromkeys(key(r) for r in rows if r.op != "linear"):
        mine = [r.name for r in rows if key(r) == name]
        sums = {}
        for backend in DISPATCHED:
            times = [x["us"] for n in mine for x in by_row[n] if x["backend"] == backend and "us" in x]
            if len(times) == len(mine):
                sums[backend] = math.fsum(times)
        if sums:
            first, *others = sorted(sums, key=sums.get)
            lead = sums[others[0]] / sums[first] if others else None
            best = {n: fastest(by_row[n])["backend"] for n in mine}
            table[name] = {"backend": first, "us": sums[first], "lead": lead, "fastest": best}
    return table


GOAL = 1.4  # times as fast as in bfloat16


def twins(rows: Sequence[Row], results: Sequence[dict], names: Sequence[str]) -> dict[str, dict]:
    """By FP8 row with products: the fastest of the named in both precisions, and how many times faster FP8 is; those
    with both timed."""

    def best(row: Row) -> dict | None:
        return fastest([r for r in results if r["row"] == row.name], names)

    found = {}
    gelu = next((best(r) for r in rows if r.op == "gelu_bias" and r.precision == "fp8"), None)
    for row in (r for r in rows if r.precision == "fp8" and r.flop):
        twin = next(t for t in rows if (t.precision, t.what, work.kind(t)) == ("bf16", row.what, work.kind(row)))
        fp8, bf16, more = best(row), best(twin), gelu if twin.op == "linear_gelu" else {"us": 0.0}
        if fp8 and bf16 and more:
            times = bf16["us"] / (fp8["us"] + more["us"])
            found[row.name] = {"fp8": fp8["backend"], "bf16": bf16["backend"], "times": times, "goal": times >= GOAL}
    return found


def key(row: Row) -> str:
    return row.op + (" fp8" if row.precision == "fp8" and "fp8" not in row.op else "")


def measured_forwards(rows: Sequence[Row], s: Sizes, results: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Milliseconds of a forward by kind of op, each row with the fastest of the named; those with every row timed."""
    found = []
    for precision in PRECISIONS:
        for frames in work.KEY_FRAMES:
            some = work.forward(rows, precision, frames)
            best = [fastest([x for x in results if x["row"] == r.name], names) for r in some]
            if all(best):
                by_kind = dict.fromkeys(map(work.kind, some), 0.0)
                for r, x in zip(some, best):
                    by_kind[work.kind(r)] += r.calls[precision] * x["us"] / 1e3
                found.append({"precision": precision, "kv": frames * s.S, "ms": sum(by_kind.values()), **by_kind})
    return found


def report(rows: Sequence[Row], found: dict) -> list[str]:
    """A line for every backend that is there, the fastest of a row starred; then sums and ceilings."""
    body = []
    for row in rows:
        mine = [r for r in found["results"] if r["row"] == row.name]
        best = fastest(mine)
        body += [line(row, r, r is best, found["ceilings"]) for r in mine]
    head = ["op", "backend", "us", "again", "TF/s", "GB/s", "of limit", "error", "allowed", ""]
    lines = [*aligned([head, *body]), "", *(f"no {b}: {'; '.join(why)}" for b, why in found["absent"].items())]
    for capability, table in found["choice"].items():
        body = [
            [op, c["backend"], f"{c['us']:.1f}", f"{c['lead']:.2f}" if c["lead"] else "-"] for op, c in table.items()
        ]
        lines += ["", *aligned([[f"choice on {capability}", "backend", "us", "times ahead"], *body])] if body else []
    for which, forwards in found["measured_forward"].items():
        kinds = ("ms", "products", "attention", "cross_attention", "elementwise")
        body = [[f["precision"], str(f["kv"]), *(f"{f[k]:.2f}" for k in kinds)] for f in forwards]
        lines += ["", *aligned([[f"one forward, {which}", "KV", *kinds], *body])] if body else []
    if found["vae_decode"]:
        body = [[r["backend"], f"{r['us'] / 1e3:.2f}" if "us" in r else "-", f"{r.get('error', float('nan')):.1e}",
                 " ".join(filter(None, (r["status"], r.get("why"))))] for r in found["vae_decode"]]  # fmt: skip
        lines += ["", *aligned([["VAE decode of a chunk", "ms", "error", ""], *body])]
    for which, pairs in found["twins"].items():
        body = [[n, p["fp8"], p["bf16"], f"{p['times']:.2f}", "yes" if p["goal"] else "NO"] for n, p in pairs.items()]
        head = [f"FP8 beside bfloat16, {which}", "fp8", "bf16", "times as fast", f"{GOAL} reached"]
        lines += ["", *aligned([head, *body])] if body else []
    if found["ceilings"]:
        lines += ["", f"ceilings: {json.dumps(rounded(found['ceilings']))}"]
    return lines


def line(row: Row, r: dict, best: bool, limits: dict | None) -> list[str]:
    def text(name: str, form: str) -> str:
        return form.format(r[name]) if r.get(name) is not None else "-"

    part, why = share(row, r, limits), " ".join(filter(None, (r["status"].replace("ok", ""), r.get("why"))))
    return [
        row.name, r["backend"] + ("*" if best else ""), text("us", "{:.1f}"), text("again", "{:+.1%}"),
        text("tflops", "{:.1f}") if row.flop else "-", text("gbs", "{:.0f}"), f"{part:.0%}" if part else "-",
        text("error", "{:.1e}"), text("limit", "{:.1e}"), why,
    ]  # fmt: skip


def measured(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str) -> dict:
    todo = list(jobs(args, rows, s, device))
    until = time.monotonic() + (args.limit or float("inf"))
    with nullcontext() if device == "cpu" or args.inline else Worker() as worker:
        limits, results = run(todo, device, until, worker)
        decodes = decoded(args, s, device, worker) if time.monotonic() < until else []
    about = machine()
    capability = about["gpu"]["capability"] if about["gpu"] else "cpu"
    return {
        "ceilings": limits,
        "results": [r for r in results if r["status"] != "absent"],
        "vae_decode": decodes,
        "absent": absent(results),
        "choice": {capability: choices(chosen(args, rows), results)},
        "measured_forward": {
            "fastest": measured_forwards(rows, s, results, BACKENDS),
            "dispatched": measured_forwards(rows, s, results, DISPATCHED),
        },
        "twins": {"fastest": twins(rows, results, BACKENDS), "dispatched": twins(rows, results, DISPATCHED)},
        "machine": about,
    }


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan", action="store_true", help="what the ops must do; the default without a GPU")
    mode.add_argument("--time", action="store_true", help="check and time; the default with a GPU")
    mode.add_argument("--check", action="store_true", help="only check the numbers")
    add("--model", choices=PRESETS, default=WAN)
    add("--height", type=int, metavar="PIXELS", help="of the video; default 480, of the small model 64")
    add("--width", type=int, metavar="PIXELS", help="default 832, of the small model 64")
    add("--ops", nargs="+", metavar="OP", help="only these")
    add("--backends", nargs="+", choices=BACKENDS, metavar="BACKEND", help=f"only these of {', '.join(BACKENDS)}")
    add("--quick", action="store_true", help="one KV length, short rounds, no torch.compile")
    add("--inline", action="store_true", help="all in this process, as a memory checker wants it")
    add("--limit", type=float, metavar="SECONDS", help="start nothing after that")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    side = (64, 64) if args.model == "shapes" else (480, 832)
    args.height, args.width = args.height or side[0], args.width or side[1]
    known = sorted(
        {vae_decode.ROW} | {r.op for r in work.rows(Sizes(ModelConfig.preset(args.model), args.height, args.width))}
    )
    if args.ops and not set(args.ops) <= set(known):
        parser.error(f"--ops {' '.join(args.ops)}: must be of {', '.join(known)}")
    if args.save:
        check_target(args.save, ".json")  # before the work, not after it
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    s = Sizes(ModelConfig.preset(args.model), args.height, args.width)
    rows, device = work.rows(s), "cuda" if torch.cuda.is_available() else "cpu"
    asked = args.time or args.check
    if device == "cpu" and asked and s.T > SMALL:
        raise SystemExit(f"a chunk of {s.T} tokens on a CPU: at most {SMALL} are timed there; give --model shapes")
    result = {"benchmark": "kernels", "model": args.model, "height": args.height, "width": args.width}
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()} | plan(rows, s)
    if args.plan or (device == "cpu" and not asked):
        result |= {"mode": "plan", "machine": machine()}
        lines = report_plan(result) + ([] if args.plan else ["", "no GPU here: this is the plan, nothing was timed"])
    else:
        result |= {"mode": "check" if args.check else "time"} | measured(args, rows, s, device)
        lines = report(chosen(args, rows), result)
    sys.stdout.write("\n".join(lines) + "\n")
    result = rounded(result)
    if args.save:
        save(result, args.save)
    sys.stdout.write(json.dumps(result, separators=(",", ":")) + "\n")
    some = [*result.get("results", ()), *result.get("vae_decode", ())]
    return int(any(r["status"] == "wrong" for r in some))


if __name__ == "__main__":
    sys.exit(main())
