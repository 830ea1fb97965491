"""Kernels of one forward: what each must do, what it takes on this GPU with every backend, and which is fastest.

    python benchmarks/kernels.py --plan                   # FLOP, bytes and floors of each op; needs no GPU
    python benchmarks/kernels.py --save benchmarks/results/kernels-h200.json           # on a GPU: times everything
    python benchmarks/kernels.py --ops attention --backends triton cuda --quick
    python benchmarks/kernels.py --check --height 64 --width 96         # only whether the numbers are right
    python benchmarks/kernels.py --time --model shapes                  # plain torch on a CPU, to try the harness

The VAE's decode of a chunk is planned by layer and stage, before and after its fusions (`vae_work.py`); it is timed by
`vae_decode.py`.

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
is reported and the others go on. On a GPU where dispatch could not run Triton, or a kernel of --backends, nothing is
timed: the figures would be those of plain torch.

The rows that weigh most in a forward come first, and --save is written anew after every result, with `unfinished` true
until the last one. --limit SECONDS of the process's life: what no longer fits is "skipped". --resume takes the results
that the file of --save holds, if they are of the same commit, GPU and arguments, and goes on with the others.

The exit code is 1 if the numbers of any backend are wrong or, with --check, if one fails; else 75 if anything was
skipped. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks import vae_work
from benchmarks.common.cli import format_table
from benchmarks.common.environment import commit, machine, save
from benchmarks.common.isolation import Worker, WorkerDied
from benchmarks.common.limit import UNFINISHED, WHY, Limit
from benchmarks.micro import roofline
from benchmarks.micro.backends import BACKENDS, DISPATCHED, refuse_others
from benchmarks.micro.measure import Job, ceilings, judge
from benchmarks.micro.roofline import GPUS, PRACTICAL, PRECISIONS, STEPS, Row, Sizes
from dsa_engine.config import PRESETS, ModelConfig
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import check_output_path

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
    some = roofline.forward(rows, precision, frames)
    floor, expect = (roofline.total(some, precision, rates) for rates in (GPUS, PRACTICAL))
    others = [r for r in rows if r.op in roofline.STEP_OPS]

    def chunk(total: roofline.Total, gpus: dict) -> dict:
        step = {name: sum(r.floor(rates) for r in others) for name, rates in gpus.items()}
        return {str(n): {name: ((n + 1) * us + n * step[name]) / 1e3 for name, us in total.us.items()} for n in STEPS}

    return {
        "precision": precision,
        "kv": frames * s.S,
        "tflop": sum(floor.flop.values()) / 1e12,
        "tflop_by_kind": {name: flop / 1e12 for name, flop in floor.flop.items()},
        "elementwise_gb": floor.elementwise / 1e9,
        "elementwise_gb_in_epilogues": roofline.elementwise_bytes(roofline.in_epilogues(some, s), precision) / 1e9,
        "floor_ms": {name: us / 1e3 for name, us in floor.us.items()},
        "expect_ms": {name: us / 1e3 for name, us in expect.us.items()},
        "chunk_floor_ms": chunk(floor, GPUS),
        "chunk_expect_ms": chunk(expect, PRACTICAL),
    }


def plan(rows: Sequence[Row], s: Sizes) -> dict:
    forwards = [plan_forward(rows, s, precision, frames) for precision in PRECISIONS for frames in roofline.KEY_FRAMES]
    vae = vae_work.plan(*s.latent, s.F) if s.config != ModelConfig.preset("shapes") else None  # that has a pixel codec
    return {"plan": [plan_row(r) for r in rows], "forward": forwards, "not_timed": roofline.NOT_TIMED, "vae": vae}


def report_plan(found: dict) -> list[str]:
    """Two tables: the rows, and the sums."""
    head = ["op", "GFLOP", "MB", "bound", *(f"{name} us" for name in GPUS), *(f"expect {name}" for name in GPUS)]
    body = [
        [r["row"], f"{r['flop'] / 1e9:.1f}", f"{(r['read'] + r['written']) / 1e6:.1f}", r["bound"]["H200"]]
        + [f"{r[key][name]:.1f}" for key in ("floor_us", "expect_us") for name in GPUS]
        + ["/".join(str(n) for n in r["calls"].values())]
        for r in found["plan"]
    ]
    lines = format_table([[*head, "calls " + "/".join(PRECISIONS)], *body])
    for name in GPUS:
        head = [f"one forward, {name}", "KV", "TFLOP", "elementwise GB", "floor ms", "expect ms"]
        head += [f"chunk n={n}" for n in STEPS]
        body = [
            [f["precision"], str(f["kv"]), f"{f['tflop']:.1f}", f"{f['elementwise_gb']:.1f}"]
            + [f"{f[key][name]:.1f}" for key in ("floor_ms", "expect_ms")]
            + [f"{f['chunk_floor_ms'][str(n)][name]:.0f}..{f['chunk_expect_ms'][str(n)][name]:.0f}" for n in STEPS]
            for f in found["forward"]
        ]
        lines += ["", *format_table([head, *body])]
    one = found["forward"][0]
    now, then = one["elementwise_gb"], one["elementwise_gb_in_epilogues"]
    more = "with GELU, gate and residual in the epilogues of the products"
    lines += ["", f"elementwise in {one['precision']}: {now:.2f} GB a forward, {then:.2f} GB {more}"]
    if found["vae"]:
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in found["vae"]["assumed_tflops"].items())
        share = found["vae"]["assumed_of_bandwidth"]
        lines += [
            "",
            *format_table(vae_work.report(found["vae"])),
            f"assumed: TF/s of {rates}; {share:.1%} of the bandwidth",
        ]
    return lines


def jobs(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str) -> Iterator[Job]:
    """By the time that a row takes of a forward at the least, the longest first."""
    seconds = None if args.check else 0.1 if args.quick else 0.3
    some = [(row, args.seed + 1000 * number) for number, row in enumerate(chosen(args, rows))]
    for row, seed in sorted(some, key=lambda one: -one[0].floor(GPUS["H200"]) * max(one[0].calls.values())):
        for backend in args.backends or [b for b in BACKENDS if not (args.quick and b == "compile")]:
            yield Job(row, s, backend, device, seed, seconds)


def chosen(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """--ops, and with --quick one KV length."""
    middle = roofline.KEY_FRAMES[1]
    some = [r for r in rows if not args.ops or r.op in args.ops]
    return [r for r in some if not args.quick or r.frames in (None, middle)]


@dataclass
class Known:
    """What a run has found out so far. ceilings: None where nothing is timed; results: of every job that was done."""

    ceilings: dict | None = None
    results: list[dict] = field(default_factory=list)

    def of(self, job: Job) -> dict | None:
        return next((r for r in self.results if (r["row"], r["backend"]) == (job.row.name, job.backend)), None)


def run(
    todo: Sequence[Job],
    device: str,
    limit: Limit,
    worker: Worker | None,
    known: Known,
    saved: Callable[[], object] = lambda: None,
) -> None:
    """Adds what is not known yet, and calls `saved` after each result. Without a worker all runs here."""

    def call(function, *args) -> dict:
        if limit.over():
            return {"status": "skipped", "why": WHY}
        seconds = min(PATIENCE, limit.left())
        try:
            return worker.call(function, *args, seconds=seconds) if worker else function(*args)
        except WorkerDied as reason:
            cut = limit.over()
            return {"status": "skipped" if cut else "failed", "why": WHY if cut else str(reason)}

    if known.ceilings is None and todo and todo[0].seconds is not None:
        known.ceilings = call(ceilings, device, todo[0].seconds)
        saved()
    for job in (job for job in todo if known.of(job) is None):
        found = call(judge, job)
        if found.pop("broken", False) and worker:
            worker.end()
        known.results.append({"op": job.row.op, "row": job.row.name, "backend": job.backend} | found)
        if found["status"] != "absent":
            sys.stderr.write(f"{job.row.name:32} {job.backend:9} {found.get('us') or found['status']}\n")
            saved()


def refuse(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Raises SystemExit where the installation lacks kernels that were asked for; csrc is only by name."""
    ops = {row.op for row in chosen(args, rows)}
    for backend in args.backends or ["triton"]:
        if backend in DISPATCHED:
            refuse_others(backend, only=ops)


def absent(results: Sequence[dict]) -> dict[str, list[str]]:
    """Why a backend is not in the results, or not on every row."""
    some = [r for r in results if r["status"] == "absent"]
    return {b: sorted({r["why"] for r in some if r["backend"] == b}) for b in dict.fromkeys(r["backend"] for r in some)}


def share(row: Row, result: dict, limits: dict | None) -> float | None:
    """What it reaches of the machine's own product or copy, whichever bounds the op."""
    if not limits or "us" not in result:
        return None
    bytes_ = row.bound(GPUS["H200"]) == "bytes"
    rate = limits.get("copy_gbs" if bytes_ else f"{row.precision}_tflops")
    return result["gbs" if bytes_ else "tflops"] / rate if rate else None


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
        twin = next(
            t for t in rows if (t.precision, t.what, roofline.kind(t)) == ("bf16", row.what, roofline.kind(row))
        )
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
        for frames in roofline.KEY_FRAMES:
            some = roofline.forward(rows, precision, frames)
            best = [fastest([x for x in results if x["row"] == r.name], names) for r in some]
            if all(best):
                by_kind = dict.fromkeys(map(roofline.kind, some), 0.0)
                for r, x in zip(some, best):
                    by_kind[roofline.kind(r)] += r.calls[precision] * x["us"] / 1e3
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
    lines = [*format_table([head, *body]), "", *(f"no {b}: {'; '.join(why)}" for b, why in found["absent"].items())]
    for capability, table in found["choice"].items():
        body = [
            [op, c["backend"], f"{c['us']:.1f}", f"{c['lead']:.2f}" if c["lead"] else "-"] for op, c in table.items()
        ]
        lines += (
            ["", *format_table([[f"choice on {capability}", "backend", "us", "times ahead"], *body])] if body else []
        )
    for which, forwards in found["measured_forward"].items():
        kinds = ("ms", "products", "attention", "cross_attention", "elementwise")
        body = [[f["precision"], str(f["kv"]), *(f"{f[k]:.2f}" for k in kinds)] for f in forwards]
        lines += ["", *format_table([[f"one forward, {which}", "KV", *kinds], *body])] if body else []
    for which, pairs in found["twins"].items():
        body = [[n, p["fp8"], p["bf16"], f"{p['times']:.2f}", "yes" if p["goal"] else "NO"] for n, p in pairs.items()]
        head = [f"FP8 beside bfloat16, {which}", "fp8", "bf16", "times as fast", f"{GOAL} reached"]
        lines += ["", *format_table([head, *body])] if body else []
    if found["ceilings"]:
        lines += ["", f"ceilings: {json.dumps(rounded(found['ceilings']))}"]
    return lines


def line(row: Row, r: dict, best: bool, limits: dict | None) -> list[str]:
    def text(name: str, form: str) -> str:
        return form.format(r[name]) if r.get(name) is not None else "-"

    part, why = share(row, r, limits), " ".join(filter(None, (r["status"].replace("ok", ""), r.get("why"))))
    return [
        row.name,
        r["backend"] + ("*" if best else ""),
        text("us", "{:.1f}"),
        text("again", "{:+.1%}"),
        text("tflops", "{:.1f}") if row.flop else "-",
        text("gbs", "{:.0f}"),
        f"{part:.0%}" if part else "-",
        text("error", "{:.1e}"),
        text("limit", "{:.1e}"),
        why,
    ]


def summed(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, known: Known, about: dict) -> dict:
    """What the results come to. unfinished: something was left out, or is still to come; about: `machine()`."""
    results = [r for r in known.results if r["status"] != "skipped"]
    capability = about["gpu"]["capability"] if about["gpu"] else "cpu"
    return {
        "ceilings": known.ceilings,
        "results": [r for r in known.results if r["status"] != "absent"],
        "absent": absent(results),
        "choice": {capability: choices(chosen(args, rows), results)},
        "measured_forward": {
            "fastest": measured_forwards(rows, s, results, BACKENDS),
            "dispatched": measured_forwards(rows, s, results, DISPATCHED),
        },
        "twins": {"fastest": twins(rows, results, BACKENDS), "dispatched": twins(rows, results, DISPATCHED)},
        "machine": about,
    }


def measured(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str, front: dict) -> dict:
    """All figures, with what every result of this run begins with in front; saved after each of them."""
    limit, todo, about = Limit(args.limit), list(jobs(args, rows, s, device)), machine()
    known = resumed(args, front, about)

    def result() -> dict:
        done = all((known.of(job) or {"status": "skipped"})["status"] != "skipped" for job in todo)
        return front | {"unfinished": not done} | summed(args, rows, s, known, about)

    def saved() -> None:
        if args.save:
            save(rounded(result()), args.save)

    with nullcontext() if device == "cpu" or args.inline else Worker() as worker:
        run(todo, device, limit, worker, known, saved)
    return result()


def resumed(args: argparse.Namespace, front: dict, about: dict) -> Known:
    """What the file of --save holds of the same commit, GPU and arguments; nothing without --resume."""
    if not (args.resume and args.save and args.save.is_file()):
        return Known()
    found = json.loads(args.save.read_text())
    gpu, before = ((machine.get("gpu") or {}).get("name") for machine in (about, found.get("machine", {})))
    same = json.loads(json.dumps(rounded(front)))
    if gpu != before or any(found.get(name) != same[name] for name in same if name not in ("date", "plan", "forward")):
        sys.stderr.write(f"--resume: {args.save} holds results of something else: all is timed anew\n")
        return Known()
    limits, results = found["ceilings"], [r for r in found["results"] if r["status"] != "skipped"]
    sys.stderr.write(f"--resume: {len(results)} results of {args.save}\n")
    return Known(None if limits and "status" in limits else limits, results)


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
    add("--limit", type=float, metavar="SECONDS", help="of this process's life, after which nothing is done")
    add("--resume", action="store_true", help="go on with what the file of --save has")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    side = (64, 64) if args.model == "shapes" else (480, 832)
    args.height, args.width = args.height or side[0], args.width or side[1]
    known = sorted({r.op for r in roofline.rows(Sizes(ModelConfig.preset(args.model), args.height, args.width))})
    if args.ops and not set(args.ops) <= set(known):
        parser.error(f"--ops {' '.join(args.ops)}: must be of {', '.join(known)}")
    if args.save:
        check_output_path(args.save, ".json")  # before the work, not after it
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    s = Sizes(ModelConfig.preset(args.model), args.height, args.width)
    rows, device = roofline.rows(s), "cuda" if torch.cuda.is_available() else "cpu"
    asked = args.time or args.check
    if device == "cpu" and asked and s.T > SMALL:
        raise SystemExit(f"a chunk of {s.T} tokens on a CPU: at most {SMALL} are timed there; give --model shapes")
    result = {"benchmark": "kernels", "model": args.model, "height": args.height, "width": args.width}
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "seed": args.seed, "quick": args.quick}
    result |= plan(rows, s)
    if args.plan or (device == "cpu" and not asked):
        result |= {"mode": "plan", "machine": machine()}
        lines = report_plan(result) + ([] if args.plan else ["", "no GPU here: this is the plan, nothing was timed"])
    else:
        if device == "cuda":
            refuse(args, rows)
        result = measured(args, rows, s, device, result | {"mode": "check" if args.check else "time"})
        lines = report(chosen(args, rows), result)
    sys.stdout.write("\n".join(lines) + "\n")
    result = rounded(result)
    if args.save:
        save(result, args.save)
    sys.stdout.write(json.dumps(result, separators=(",", ":")) + "\n")
    bad = ("wrong", "failed") if args.check else ("wrong",)  # a check that could not run has checked nothing
    if any(r["status"] in bad for r in result.get("results", ())):
        return 1
    return UNFINISHED if result.get("unfinished") else 0


if __name__ == "__main__":
    sys.exit(main())
