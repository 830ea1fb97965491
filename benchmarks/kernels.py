"""Kernels of one forward: what each must do, what it takes on this GPU with every backend, and which is fastest.

    python benchmarks/kernels.py --plan                   # FLOP, bytes and floors of each op; needs no GPU
    python benchmarks/kernels.py --save benchmarks/results/kernels-h200.json           # on a GPU: times everything
    python benchmarks/kernels.py --ops attention --backends triton cuda --quick
    python benchmarks/kernels.py --ops vae_decode                       # the Wan VAE's decode of a chunk, only by name
    python benchmarks/kernels.py --check --height 64 --width 96         # only whether the values are right
    python benchmarks/kernels.py --time --model shapes                  # plain torch on a CPU, to try the harness

An op's floor is the larger of its FLOP over the peak rate and its bytes over the bandwidth, at the rates of the
datasheets (`micro/roofline.py`); "expect" takes rates that good kernels reach. Sums are of one forward of the whole
model; a chunk is n denoising steps, each with its noise and epilogue, and the commit, which is a forward without them.

Every backend (`micro/backends.py`) is first compared with float32 on poisoned inputs: error is ||out - ref|| / ||ref||
of the worst output, at most twice that of plain torch in the same dtype. Then it is timed as replays of a CUDA graph on
fresh random inputs that take turns and together exceed the L2 cache. us is the median, again what a second round
differed by: differences below that are noise. "of limit" is the rate or the bandwidth reached, whichever bounds the op,
over that of a large GEMM or copy measured in the same process. `choice` holds, by compute capability, the fastest
correct backend that `ops.dispatch` may pick, over the sum of an op's rows. `twins` sets every FP8 GEMM and attention
beside what does the same in bfloat16: how many times faster the fastest is than the fastest, the goal being 1.4. Where
GELU is in the bfloat16 GEMM's epilogue the FP8 one has the time of `gelu_bias` added. A backend that raises or hangs is
reported and the others go on. On a GPU where dispatch could not run Triton, or a kernel of --backends, nothing is
timed: the figures would be those of plain torch.

The rows that weigh most in a forward come first, and --save is written anew after every result, with `unfinished` true
until the last one. --limit SECONDS of the process's life: what no longer fits is "skipped". --resume takes the results
that the file of --save holds, if they are of the same commit, GPU and arguments, and goes on with the others.

The exit code is 1 if the values of any backend are wrong or, with --check or in vae_decode, if one fails; else 75 if
anything was skipped. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import complete, format_table
from benchmarks.common.environment import commit, machine, save
from benchmarks.common.isolation import Worker, WorkerDied
from benchmarks.common.limit import UNFINISHED, WHY, Limit
from benchmarks.micro import roofline
from benchmarks.micro.backends import BACKENDS, DISPATCHED, backends_of, refuse_others
from benchmarks.micro.measure import OpCase, machine_peaks, measure_op
from benchmarks.micro.roofline import GPUS, PRACTICAL, PRECISIONS, STEPS, Row, Sizes
from benchmarks.micro.summary import absent, choices, measured_forwards, report, twins
from dsa_engine.config import PRESETS, ModelConfig
from dsa_engine.evaluation.summary import rounded

WAN = "wan2.1-t2v-1.3b"
SMALL = 1000  # tokens of a chunk, up to which a CPU times it
PATIENCE = 90.0  # seconds for one backend on one row; the first one of an op may compile
VAE_OPS = ("norm_silu", "bias_residual")


# ---- the plan


def plan_row(row: Row) -> dict:
    fields = {name: getattr(row, name) for name in ("op", "precision", "flop", "read", "written", "calls")}
    return fields | {
        "row": row.name,
        "bound": {name: row.bound(rates) for name, rates in GPUS.items()},
        "floor_us": {name: row.floor(rates) for name, rates in GPUS.items()},
        "expect_us": {name: row.floor(rates) for name, rates in PRACTICAL.items()},
    }


def plan_forward(rows: Sequence[Row], s: Sizes, precision: str, frames: int) -> dict:
    """Sums over a forward, and over a chunk of n steps and the commit."""
    some = roofline.forward(rows, precision, frames)
    found = {"precision": precision, "kv": frames * s.S}
    for name, gpus in (("floor", GPUS), ("expect", PRACTICAL)):
        total = roofline.total(some, precision, gpus)
        steps = {gpu: sum(r.floor(rates) for r in rows if r.op in roofline.STEP_OPS) for gpu, rates in gpus.items()}
        found[f"{name}_ms"] = {gpu: us / 1e3 for gpu, us in total.us.items()}
        found[f"chunk_{name}_ms"] = {
            str(n): {gpu: ((n + 1) * us + n * steps[gpu]) / 1e3 for gpu, us in total.us.items()} for n in STEPS
        }
    return found | {
        "tflop": sum(total.flop.values()) / 1e12,
        "tflop_by_kind": {name: flop / 1e12 for name, flop in total.flop.items()},
        "elementwise_gb": total.elementwise / 1e9,
        "elementwise_gb_in_epilogues": roofline.elementwise_bytes(roofline.in_epilogues(some, s), precision) / 1e9,
    }


def plan(rows: Sequence[Row], s: Sizes) -> dict:
    forwards = [plan_forward(rows, s, precision, frames) for precision in PRECISIONS for frames in roofline.KEY_FRAMES]
    return {"plan": [plan_row(r) for r in rows], "forward": forwards, "not_timed": roofline.NOT_TIMED}


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
    more = "with GELU, gate and residual in the epilogues of the GEMMs"
    return [*lines, "", f"elementwise in {one['precision']}: {now:.2f} GB a forward, {then:.2f} GB {more}"]


# ---- measuring


def cases(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str) -> Iterator[OpCase]:
    """By the minimum time that a row takes of a forward, the longest first."""
    seconds = None if args.check else 0.1 if args.quick else 0.3
    some = [(row, args.seed + 1000 * number) for number, row in enumerate(chosen(args, rows))]
    for row, seed in sorted(some, key=lambda one: -one[0].floor(GPUS["H200"]) * max(one[0].calls.values())):
        for backend in backends_of(row.op):
            if backend in args.backends if args.backends else not (args.quick and backend == "compile"):
                yield OpCase(row, s, backend, device, seed, seconds)


def chosen(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """--ops, and with --quick one KV length."""
    middle = roofline.KEY_FRAMES[1]
    some = [r for r in rows if (r.op in args.ops if args.ops else r.op != "vae_decode")]
    return [r for r in some if not args.quick or r.frames in (None, middle)]


@dataclass
class Progress:
    """What a run has found so far. ceilings: None where nothing is timed; results: of every case that was done."""

    ceilings: dict | None = None
    results: list[dict] = field(default_factory=list)

    def of(self, case: OpCase) -> dict | None:
        return next((r for r in self.results if (r["row"], r["backend"]) == (case.row.name, case.backend)), None)


def run(
    todo: Sequence[OpCase],
    device: str,
    limit: Limit,
    worker: Worker | None,
    progress: Progress,
    saved: Callable[[], object] = lambda: None,
) -> None:
    """Adds what is missing, and calls `saved` after each result. Without a worker all runs here."""

    def call(function, *args) -> dict:
        if limit.over():
            return {"status": "skipped", "why": WHY}
        seconds = min(PATIENCE, limit.left())
        try:
            return worker.call(function, *args, seconds=seconds) if worker else function(*args)
        except WorkerDied as reason:
            cut = limit.over()
            return {"status": "skipped" if cut else "failed", "why": WHY if cut else str(reason)}

    if progress.ceilings is None and todo and todo[0].seconds is not None:
        progress.ceilings = call(machine_peaks, device, todo[0].seconds)
        saved()
    for case in (case for case in todo if progress.of(case) is None):
        found = call(measure_op, case)
        if found.pop("broken", False) and worker:
            worker.end()
        progress.results.append({"op": case.row.op, "row": case.row.name, "backend": case.backend} | found)
        if found["status"] != "absent":
            sys.stderr.write(f"{case.row.name:32} {case.backend:13} {found.get('us') or found['status']}\n")
            saved()


def refuse(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Raises SystemExit where the installation lacks kernels that were asked for; csrc is only by name."""
    ops = {row.op for row in chosen(args, rows)}
    if "vae_decode" in ops:
        refuse_others(only=VAE_OPS)
    for backend in args.backends or ["triton"]:
        if backend in DISPATCHED:
            refuse_others(backend, only=ops)


# ---- the result


def summed(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, progress: Progress, about: dict) -> dict:
    """What the results come to; about: `machine()`."""
    results = [r for r in progress.results if r["status"] != "skipped"]
    capability = about["gpu"]["capability"] if about["gpu"] else "cpu"
    groups = {"fastest": BACKENDS, "dispatched": DISPATCHED}
    return {
        "ceilings": progress.ceilings,
        "results": [r for r in progress.results if r["status"] != "absent"],
        "absent": absent(results),
        "choice": {capability: choices(chosen(args, rows), results)},
        "measured_forward": {name: measured_forwards(rows, s, results, names) for name, names in groups.items()},
        "twins": {name: twins(rows, results, names) for name, names in groups.items()},
        "machine": about,
    }


def measured(args: argparse.Namespace, rows: Sequence[Row], s: Sizes, device: str, front: dict) -> dict:
    """All figures, with what every result of this run begins with in front; saved after each of them."""
    limit, todo, about = Limit(args.limit), list(cases(args, rows, s, device)), machine()
    progress = resumed(args, front, about)

    def result() -> dict:
        done = all((progress.of(case) or {"status": "skipped"})["status"] != "skipped" for case in todo)
        return front | {"unfinished": not done} | summed(args, rows, s, progress, about)

    def saved() -> None:
        if args.save:
            save(rounded(result()), args.save)

    with nullcontext() if device == "cpu" or args.inline else Worker() as worker:
        run(todo, device, limit, worker, progress, saved)
    return result()


def resumed(args: argparse.Namespace, front: dict, about: dict) -> Progress:
    """What the file of --save holds of the same commit, GPU and arguments; nothing without --resume."""
    if not (args.resume and args.save and args.save.is_file()):
        return Progress()
    found = json.loads(args.save.read_text())
    gpu, before = ((machine.get("gpu") or {}).get("name") for machine in (about, found.get("machine", {})))
    same = json.loads(json.dumps(rounded(front)))
    if gpu != before or any(found.get(name) != same[name] for name in same if name not in ("date", "plan", "forward")):
        sys.stderr.write(f"--resume: {args.save} holds results of something else: all is timed anew\n")
        return Progress()
    ceilings, results = found["ceilings"], [r for r in found["results"] if r["status"] != "skipped"]
    sys.stderr.write(f"--resume: {len(results)} results of {args.save}\n")
    return Progress(None if ceilings and "status" in ceilings else ceilings, results)


# ---- the command


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plan", action="store_true", help="what the ops must do; the default without a GPU")
    mode.add_argument("--time", action="store_true", help="check and time; the default with a GPU")
    mode.add_argument("--check", action="store_true", help="only check the values")
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
    return complete(args)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
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
    for r in result.get("results", ()):
        # Of a check that could not run nothing is known; the ways to decode need no package that may be absent.
        if r["status"] == "wrong" or (r["status"] == "failed" and (args.check or r["op"] == "vae_decode")):
            return 1
    return UNFINISHED if result.get("unfinished") else 0


if __name__ == "__main__":
    sys.exit(main())
