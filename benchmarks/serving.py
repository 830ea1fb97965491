"""Live streams that a server holds at their pace, and what becomes of them when there are twice as many.

    python benchmarks/serving.py                                          # the small model, on two cores in ten minutes
    python benchmarks/serving.py --save benchmarks/results/serving-cpu.json --plot serving.png
    python benchmarks/serving.py --url http://127.0.0.1:8000 --format m4s     # a server that runs; no batching figure

The server is a process of its own that this one starts; all clients are in this process, and talk to it as browsers do,
over WebSockets. A trial has N clients that come at random (a Poisson process, all of them within the first --ramp
seconds), draw their prompts from the synthetic world's grammar and change them at random (Poisson again, --change
seconds apart on average, 60 % to another object and 40 % to another motion), each change with its recache. After
--settle more seconds all are measured for --measure seconds. The clients are the same for every policy at the same N.

Streams held: the largest N of a search in whose trial every client got at least 98 % of its frames per second and at
most 1 % of all chunks were late. A client's frames per second are those of its player, which stalls when a chunk is not
there in time: that chunk is late. (late_by_server counts what the server itself called late.) The search begins at what
a flood of --flood streams gets through, goes up or down by a tenth, a fifth and so on, and bisects, to one stream or
3 %.

policies: fixed, all steps for every chunk; confidence, the model's own threshold; budget, the same with one that falls
under load; relative, where asked for, each chunk measured by the one before it. one_at_a_time: the policy of --alone
on a server whose forwards have one row. overload: twice the
streams that `fixed` holds, under each policy; beyond: twice those that `confidence` holds, which may be more than
budget's floor of one step per chunk can do. pressure, threshold: from /metrics before, in and after the trial.
latency_ms: of a chunk since it was due to start, by the server's clock; interval_ms: between two chunks at a client;
applied_ms: from a prompt's change to its acknowledgement; steps_spread: the difference between the largest and the
smallest mean of steps of a stream; cores: processor time of the server and of this process over the time that is
measured; lag_ms: by how much this process woke up late, which its clients took for the server's delay.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import complete, format_table
from benchmarks.common.environment import commit, machine, save
from benchmarks.loadgen.client import figures, percentiles, run_client, scenarios
from benchmarks.loadgen.plot import draw
from benchmarks.loadgen.server_process import Server, ServerUnderTest
from dsa_engine.evaluation.summary import rounded
from dsa_engine.media.stream_encoders import FORMATS

POLICIES = {"fixed": "fixed", "confidence": "dsa", "budget": "budget", "relative": "relative"}  # for `session.start`
DEFAULT_POLICIES = ("fixed", "confidence", "budget")
FPS, LATE = 0.98, 0.01  # of a stream that is held: share of its frames per second, and of late chunks
STRIDE, RESOLUTION = 0.1, 0.03  # of the search, in shares of the streams: the first one, and the last
PRESSURE = ("pressure", "threshold")  # parts of the names of metrics that say how hard the load presses
TICK = 0.02  # seconds; how often the client's own lag is sampled


@dataclass(frozen=True)
class Load:
    """Of a trial: seconds in which the clients come, until it is measured, and that are measured; mean seconds between
    two prompts of a client; format of the frames."""

    ramp: float
    settle: float
    measure: float
    change: float
    format: str
    seed: int

    @property
    def until(self) -> float:
        return self.ramp + self.settle + self.measure


async def trial(server: ServerUnderTest, streams: int, policy: str, load: Load) -> dict:
    """Figures of one trial."""
    start = {"step_policy": POLICIES[policy], "format": load.format}
    rng = np.random.default_rng([load.seed, streams])
    clients = scenarios(rng, streams, load.ramp, load.until, load.change, start)
    before = pressing(server)
    begin = time.monotonic() + 0.1
    measured = begin + load.ramp + load.settle
    sampled = asyncio.create_task(_sample(server, measured, begin + load.until))
    records = await asyncio.gather(*(run_client(server.url, one, begin, load.until) for one in clients))
    own = await sampled
    result = figures(records, measured, begin + load.until)
    result |= {"policy": policy, "held": held(result), **own}
    cores = own["cores"]["server"]
    result["chunks_per_cpu_s"] = result["chunks_per_s"] / cores if cores else None
    result["pressing"] = {"before": before, "during": own["pressing"], "after": pressing(server)}
    return result


def held(result: dict) -> bool:
    fps = result["fps"]
    return fps["least"] >= FPS * fps["wanted"] and result["late"] <= LATE and not result["errors"]


def pressing(server: ServerUnderTest) -> dict[str, float]:
    """NaN, of what nobody has yet requested, is left out."""
    found = server.metrics().items()
    return {name: value for name, value in found if any(part in name for part in PRESSURE) and value == value}


async def _sample(server: ServerUnderTest, start: float, stop: float) -> dict:
    """Processor time, this process's lag, and metrics once per second."""
    await asyncio.sleep(start - time.monotonic())
    before, client, lags, found = server.stats(), time.process_time(), [], {}
    due = time.monotonic()
    while (now := time.monotonic()) < stop:
        await asyncio.sleep(TICK)
        lags.append(1e3 * (time.monotonic() - now - TICK))
        if now >= due:
            for name, value in (await asyncio.to_thread(pressing, server)).items():
                found.setdefault(name, []).append(value)
            due = now + 1.0
    span = time.monotonic() - start
    cores = {"server": before and (server.stats().cpu - before.cpu) / span}
    return {
        "cores": cores | {"client": (time.process_time() - client) / span},
        "lag_ms": percentiles(lags),
        "pressing": {name: {"mean": float(np.mean(v)), "max": max(v)} for name, v in found.items()},
    }


def search(holds: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest N found to hold, to one or RESOLUTION of it; 0 where not even one does, `most` at most. It goes
    up or down from the guess in strides that double, then bisects."""
    low, high, n, stride = 0, most + 1, min(max(guess, 1), most), STRIDE
    missed = False  # whether `high` was tried
    while low < most and high - low > max(1, int(RESOLUTION * high)):
        if holds(n):
            low = n
        else:
            high, missed = n, True
        if low and missed:
            n = (low + high) // 2
        elif low:
            n = min(most, math.ceil(low * (1 + stride)))
        else:
            n = max(1, math.floor(high * (1 - stride)))
        stride = min(2 * stride, 0.5)
    return low


class Bench:
    """Trials on one server."""

    def __init__(self, server: ServerUnderTest, load: Load, flood: int, most: int):
        self.server, self.load, self.flood, self.most = server, load, flood, most

    def trial(self, streams: int, policy: str) -> dict:
        found = asyncio.run(trial(self.server, streams, policy, self.load))
        line = zip(("policy", *HEADER), (policy, *cells(found)))
        sys.stderr.write("  " + "  ".join(f"{head} {cell}" for head, cell in line) + "\n")
        return found

    def capacity(self, policy: str) -> dict:
        """How many streams a policy holds, with all trials that said so; `at` is the trial of that number."""
        trials = {}

        def holds(streams: int) -> bool:
            trials[streams] = self.trial(streams, policy)
            return trials[streams]["held"]

        flood = self.trial(self.flood, policy)
        if flood["chunk_ms"] is None:
            raise RuntimeError(f"no chunk of any of {self.flood} streams came: {flood['errors'] or 'not in time'}")
        streams = search(holds, int(1e-3 * flood["chunks_per_s"] * flood["chunk_ms"]), self.most)
        tried = [trials[n] for n in sorted(trials)]
        return {"held": streams, "at": trials.get(streams), "flood": flood, "trials": tried}


def evaluate(args: argparse.Namespace) -> dict:
    """All figures as one object."""
    load = Load(args.ramp, args.settle, args.measure, args.change, args.format, args.seed)
    with server_for(args, args.rows) as server:
        bench = Bench(server, load, args.flood, args.most)
        model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        policies = {name: bench.capacity(name) for name in args.policies}
        overload, beyond = {}, {}
        if "fixed" in policies:
            overload = {name: bench.trial(2 * max(1, policies["fixed"]["held"]), name) for name in policies}
        if {"confidence", "budget"} <= set(policies):
            beyond = {"budget": bench.trial(2 * max(1, policies["confidence"]["held"]), "budget")}
    alone = None
    if args.url is None and args.alone in policies:
        with server_for(args, 1) as server:
            alone = Bench(server, load, args.flood, args.most).capacity(args.alone)
    result = {
        "benchmark": "serving",
        "model": model,
        "device": args.device or "default",
        "server": args.url or {"rows": args.rows, "sessions": sessions(args), "threads": args.threads},
        "load": vars(load) | {"flood": args.flood},
        "rule": {"fps": FPS, "late": LATE},
        "deadline_ms": next(iter(policies.values()))["flood"]["chunk_ms"],
        "policies": policies,
        "one_at_a_time": alone and {"policy": args.alone, **alone},
        "overload": overload,
        "beyond": beyond,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
    }
    return result | {"verdict": verdict(result)}


def verdict(result: dict) -> dict:
    """Ratios, None where one of the two was not tried or holds none: of streams held; of chunks per second in a flood,
    finer than whole streams; and of those per second of the server's processor time, which other work on the machine
    does not lengthen."""
    policies, alone, deadline = result["policies"], result["one_at_a_time"], result["deadline_ms"]

    def ratio(ours: dict | None, theirs: dict | None) -> dict | None:
        if ours is None or theirs is None:
            return None
        found = {"held": (ours["held"], theirs["held"])}
        for name in ("s", "cpu_s"):
            found[name] = tuple(part["flood"][f"chunks_per_{name}"] for part in (ours, theirs))
        return {name: a / b if a is not None and b else None for name, (a, b) in found.items()}

    def in_time(found: dict | None) -> bool | None:
        return found and found["latency_ms"] is not None and found["latency_ms"]["p95"] <= deadline

    return {
        "confidence_vs_fixed": ratio(policies.get("confidence"), policies.get("fixed")),
        "batching_vs_one_at_a_time": ratio(alone and policies[alone["policy"]], alone),
        "budget_p95_under_deadline": in_time(result["overload"].get("budget")),
        "beyond_p95_under_deadline": in_time(result["beyond"].get("budget")),
    }


def sessions(args: argparse.Namespace) -> int:
    return max(2 * args.most, args.flood)


def server_for(args: argparse.Namespace, rows: int) -> AbstractContextManager[ServerUnderTest]:
    if args.url is not None:
        return nullcontext(ServerUnderTest(args.url))
    options = ["--model", args.model, "--rows", str(rows), "--max-sessions", str(sessions(args))]
    for name in ("device", "threads"):
        options += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    return Server(options)


HEADER = ("streams", "held", "fps least", "late", "p50 ms", "p95", "p99", "first", "steps", "jain", "cores", "client")


def cells(found: dict) -> list[str]:
    nothing = dict.fromkeys(("p50", "p95", "p99"), math.nan)
    latency, first = found["latency_ms"] or nothing, found["first_frame_ms"] or nothing
    steps, cores = found["mean_steps"], found["cores"]
    return [
        str(found["streams"]),
        "yes" if found["held"] else "no",
        f"{found['fps']['least']:.2f}",
        f"{found['late']:.1%}",
        *(f"{latency[p]:.0f}" for p in nothing),
        f"{first['p50']:.0f}",
        "-" if steps is None else f"{steps:.2f}",
        f"{found['fairness']['jain']:.3f}",
        "-" if cores["server"] is None else f"{cores['server']:.2f}",
        f"{cores['client']:.2f}",
    ]


def report(result: dict) -> list[str]:
    """The table that goes to stdout."""
    parts, alone = dict(result["policies"]), result["one_at_a_time"]
    if alone:
        parts |= {f"{alone['policy']}, one at a time": alone}
    rows = [[name, *cells(part["at"] or part["trials"][0])] for name, part in parts.items()]
    rows += [
        [f"{kind}: {name}", *cells(found)] for kind in ("overload", "beyond") for name, found in result[kind].items()
    ]
    return [
        *format_table([["", *HEADER], *rows]),
        f"a chunk plays {result['deadline_ms']:.0f} ms; verdict: {json.dumps(rounded(result['verdict']))}",
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="shipped name, folder or checkpoint, as for serve")
    add("--device", help="as for serve")
    add("--threads", type=int, help="as for serve")
    add("--url", help="of a server that runs, instead of starting one; it needs room for all streams")
    add("--rows", type=int, default=8, help="of a forward of the server that is started")
    add("--policies", nargs="+", choices=POLICIES, default=list(DEFAULT_POLICIES))
    add("--alone", choices=POLICIES, default="fixed", help="the policy of the server with forwards of one row")
    add("--format", choices=FORMATS, default="rgb24")
    add("--most", type=int, help="streams of the search (default 64)")
    add("--flood", type=int, help="streams of the trial that the search begins with (default 40)")
    usual = {"ramp": 3.0, "settle": 4.0, "measure": 10.0, "most": 64, "flood": 40}
    for name, text in (("ramp", "in which the clients come"), ("settle", "after that"), ("measure", "of a trial")):
        add(f"--{name}", type=float, help=f"seconds {text} (default {usual[name]:g})")
    add("--change", type=float, default=5.0, help="mean seconds between two prompts of a client")
    add("--quick", action="store_true", help="trials of two seconds with at most two streams; no figures to quote")
    add("--seed", type=int, default=0, help="of arrivals, prompts and noise")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    add("--plot", type=Path, metavar="PNG", help="draw latency over streams, and the steps")
    args = parser.parse_args(argv)
    usual |= {"ramp": 0.3, "settle": 0.3, "measure": 1.5, "most": 2, "flood": 3} if args.quick else {}
    return complete(args, **usual)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    result = evaluate(args)
    sys.stdout.write("\n".join(report(result)) + "\n")
    result = rounded(result)
    if args.save:
        save(result, args.save)
    if args.plot:
        draw(result, args.plot)
    sys.stdout.write(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
