"""Frames per second of a whole model, and of the same weights in plain PyTorch (`e2e/eager_baseline.py`), in one run.

    python benchmarks/fps.py                                                 # the small model, on a CPU in two minutes
    python benchmarks/fps.py --quick --plot timeline.png
    python benchmarks/fps.py --model wan2.1-t2v-1.3b --random-weights --save benchmarks/results/fps-h200.json
    python benchmarks/fps.py --model wan2.1-t2v-1.3b --random-weights --quantization fp8 --vae taehv --sessions 4
    python benchmarks/fps.py --model self_forcing_dmd.pt --vae Wan2.1_VAE.pth --steps fixed:4

What is measured, and what the JSON object holds: benchmarks/README.md. The last line of stdout is that object; --save
writes it after every run, `unfinished` until the last one. The exit code is 75 where --limit left something out.
Nothing is timed where dispatch would run another backend than DSA_BACKEND asks for, or plain torch on a GPU for want of
a package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import complete, first_line, format_table, positive_int
from benchmarks.common.environment import commit, machine, save, versions
from benchmarks.common.limit import UNFINISHED, WHY, Limit
from benchmarks.e2e import protocol
from benchmarks.e2e.breakdown import Work, by_op, decision_us, decode_ms, gemm_peak, memory
from benchmarks.e2e.concurrency import concurrent
from benchmarks.e2e.eager_baseline import Baseline, difference, fidelity
from benchmarks.e2e.protocol import HISTOGRAM, VAES, Bench, Rounds, Scenario, Subject, clip_chunks, interleaved
from benchmarks.e2e.timeline import EngineStream, columns, draw, figures, play, ratio
from benchmarks.micro.backends import refuse_others
from dsa_engine import Fixed, Pipeline, pipeline_inputs
from dsa_engine.evaluation.summary import rounded
from dsa_engine.models.fp8 import QUANTIZATIONS, quantization, quantize_linears

BASELINES = ("eager", "compile")
CLIPS, STEADY = 0.55, 0.8  # of --limit, after which no clip and no run of the steady state is begun
FLOAT32_CHUNKS = 3  # of the float32 reference, whose forwards take ten times as long on a GPU
TOLERANCE = 0.01  # of the largest latent: how far float32 may take two orders of the same sums apart over a few chunks


def load(args: argparse.Namespace, plain: bool = False) -> Pipeline:
    """plain: without --quantization."""
    scheme = None if plain else args.quantization
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    if args.random_weights:
        fp8 = quantization(scheme, device)
        pipe = protocol.random_pipeline(args.model, device, args.vae)
        pipe.quantization, pipe.engine.fp8_cache = scheme, fp8.cache
        if fp8.linear:
            quantize_linears(pipe.engine.dit)
    else:
        pipe = Pipeline.from_pretrained(args.model, head=args.head, vae=args.vae, device=device, quantization=scheme)
    pipe.engine.max_sessions = args.sessions or 1
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    pipe.frames = pipeline_inputs.whole_chunks(pipe.engine, args.frames or pipe.frames)
    if device == "cpu":
        torch.set_num_threads(args.threads or pipe.cpu_threads)
    return pipe


def requested_histogram(args: argparse.Namespace) -> tuple[float, ...] | None:
    """Shares of chunks with 1, 2, ... steps; None where a policy decides."""
    if args.policy is None:
        return HISTOGRAM if args.random_weights else None
    return protocol.parse_histogram(args.policy) if args.policy.startswith("histogram:") else None


def make_bench(args: argparse.Namespace, pipe: Pipeline) -> tuple[Bench, str, float | None]:
    """With the policy's label and threshold."""
    histogram = requested_histogram(args)
    embeds = protocol.embeddings(pipe, args.clips, args.seed)
    if histogram:
        counts = protocol.histogram_policy(histogram, pipe.max_steps, args.seed)
        return Bench(pipe, embeds, counts, args.seed), protocol.format_histogram(histogram), None
    policy = pipeline_inputs.resolve_policy(pipe.engine, args.policy)
    threshold = getattr(policy, "threshold", None)
    label = args.policy or (f"fixed:{policy.n}" if isinstance(policy, Fixed) else f"confidence:{threshold:g}")
    return Bench(pipe, embeds, lambda scenario, clip: policy, args.seed), label, threshold


def warm_up(
    subjects: dict[str, Subject], scenario: Scenario, limit: Limit | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each one's first clip. A compiled baseline that fails is removed from the subjects, and so is whoever
    is not warm by the limit: by name, why."""
    seconds, skipped = {}, {}
    for name, subject in list(subjects.items()):
        if limit is not None and limit.over():
            skipped[name] = WHY
            continue
        start = time.perf_counter()
        try:
            subject(scenario, 0)
        except RuntimeError as error:
            if name != "compile":
                raise
            skipped[name] = first_line(error)
        seconds[name] = time.perf_counter() - start
    for name in skipped:
        del subjects[name]
    return seconds, skipped


def compared(bench: Bench, baseline: Baseline, chunks: int) -> dict:
    """The engine's latents against a baseline's. Raises RuntimeError where they differ by more than float32's rounding;
    bfloat16 rounds so often that its distance is only reported."""
    pipe = bench.pipe
    found = difference(pipe, baseline, bench.embeds[0], bench.size, chunks)
    if pipe.engine.dit.dtype == torch.float32 and pipe.quantization is None and not found["relative"] < TOLERANCE:
        raise RuntimeError(f"the engine's latents are not the baseline's: {found}")
    return found


def compared_chunks(bench: Bench, quick: bool) -> int:
    """Over a window that rolls if it ever does."""
    rolls = bench.steady(1, 1).window // bench.pipe.config.chunk_frames + 2
    return min(clip_chunks(bench.pipe), rolls, 2 if quick else 99)


def cold(argv: Sequence[str]) -> dict:
    """The first frame of a fresh process."""
    start = time.perf_counter()
    command = [sys.executable, __file__, *argv, "--cold-child"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - start}


def cold_child(args: argparse.Namespace) -> dict:
    start = time.perf_counter()
    pipe = load(args)
    seconds = time.perf_counter() - start
    bench, _, _ = make_bench(args, pipe)
    scenario = bench.clip(clip_chunks(pipe), 1)
    run = play(lambda: EngineStream(bench.session(scenario, 0, bench.policy(scenario, 0))), 1)
    return {"load_s": seconds, "first_frame_ms": run.first_frame}


def summarize(runs: dict[str, Rounds], whole: bool, baselines: Sequence[str], counts: Sequence[str], rate) -> dict:
    """Figures of a scenario's runs by subject, as far as there are any; empty before the policy has a run. rate: of a
    subject's rounds, see `Work.rate`."""
    runs = {name: rounds for name, rounds in runs.items() if rounds}
    rows = {name: figures(rounds, whole) | {"rate": rate(rounds)} for name, rounds in runs.items()}
    for name in (n for n in baselines if n in rows):
        ours = {"policy": "policy", "fixed": counts[-1]}
        rows[name]["ratio"] = {key: ratio(runs[one], runs[name]) for key, one in ours.items() if one in runs}
    if "policy" not in rows:
        return {}
    parts = {"fixed": counts, "baseline": baselines}
    return rows["policy"] | {key: {n: rows[n] for n in names if n in rows} for key, names in parts.items()}


def evaluate(
    args: argparse.Namespace, argv: Sequence[str], report: Callable[[dict], object] = lambda result: None
) -> dict:
    """All figures as one object; report: called with what there is of it whenever there is more."""
    limit, start = Limit(args.limit), time.perf_counter()
    pipe = load(args)
    seconds = {"load": time.perf_counter() - start}
    result = about(args, pipe) | {"unfinished": True, "backends": refuse_others(device=pipe.engine.dit.device.type)}
    bench, label, threshold = make_bench(args, pipe)
    clip = bench.clip(clip_chunks(pipe), args.clips, args.rounds)
    steady = bench.steady(args.steady_chunks, args.steady_clips)
    warm = bench.clip(2, 1) if args.quick else clip

    def add(**more) -> None:
        result.update(more)
        report(result)

    add(
        policy=label,
        histogram=requested_histogram(args),
        threshold=threshold,
        regime="clip",
        clips={"frames": pipe.frames, "chunks": clip.chunks, "clips": clip.clips, "rounds": clip.rounds},
        tokens_a_frame=pipe.engine.dit.config.tokens_per_frame(*bench.size),
        machine=machine(),
        warmup_s=seconds,
    )
    seconds["capture"] = bench.capture(clip) + bench.capture(steady)
    policy = {"policy": bench.engine(bench.policy)}
    seconds |= warm_up(policy, warm)[0]
    add(memory=memory(pipe))  # while there is no baseline
    dit = load(args, plain=True).engine.dit if args.quantization else pipe.engine.dit
    baselines = {name: Baseline(pipe, compiled=name == "compile", dit=dit) for name in args.baseline}
    counts = [str(n) for n in range(1, pipe.max_steps + 1) if n in (*(args.counts or [n]), pipe.max_steps)]
    others = {name: bench.baseline(baseline) for name, baseline in baselines.items()}
    others |= {n: bench.engine(lambda scenario, clip, n=int(n): Fixed(n)) for n in reversed(counts)}
    more, skipped = warm_up(others, warm, limit.share(CLIPS))
    seconds |= more
    peak, work = gemm_peak(pipe), Work(pipe)
    add(product=peak)

    def summary(runs: dict[str, Rounds], whole: bool) -> dict:
        return summarize(runs, whole, args.baseline, counts, lambda rounds: work.rate(rounds, peak["tflops"]))

    def add_clip(runs: dict[str, Rounds]) -> None:
        found = summary(runs, whole=True)
        add(
            **found
            | {"baseline": found.get("baseline", {}) | {name: {"skipped": why} for name, why in skipped.items()}}
        )

    def add_steady(runs: dict[str, Rounds]) -> None:
        if found := summary(runs, whole=False):
            add(steady={"kv_frames": steady.window, "clips": steady.clips} | found)

    subjects = policy | others
    few = {name: subject for name, subject in subjects.items() if name not in counts[:-1]}
    clip_runs, complete = interleaved(subjects, clip, limit.share(CLIPS), add_clip)
    steady_runs, both = interleaved(few, steady, limit.share(STEADY), add_steady)
    complete = complete and both and WHY not in skipped.values()
    chunks = compared_chunks(bench, args.quick)
    for name in args.baseline:
        if clip_runs.get(name) and "fps" in result and not limit.over():
            result["baseline"][name]["same"] = compared(bench, baselines[name], chunks)

    def ops() -> dict:
        return by_op(bench, steady) | ({"vae": decode_ms(steady_runs["policy"])} if steady_runs["policy"] else {})

    many = args.sessions
    at_last = {  # what matters more comes first
        "decision_us": lambda: decision_us(bench, steady),
        "fidelity": lambda: fidelity(pipe, bench.embeds[0], bench.size, min(chunks, FLOAT32_CHUNKS), dit),
        "ops": ops,
        "concurrent": lambda: concurrent(bench, bench.steady(args.steady_chunks, many)) if many else None,
        "cold": lambda: cold(argv) if args.cold else None,
    }
    for name, measured in at_last.items():
        if limit.over():
            complete = False
        else:
            add(**{name: measured()})
    drawn = {
        scenario: {name: columns(runs[name]) for name in ("policy", *args.baseline) if runs.get(name)}
        for scenario, runs in (("clip", clip_runs), ("steady", steady_runs))
        if runs["policy"]
    }
    add(timeline=drawn, machine=machine(), unfinished=not complete)
    return result


def about(args: argparse.Namespace, pipe: Pipeline) -> dict:
    dit = pipe.engine.dit
    found = {"benchmark": "fps", "model": pipe.name, "weights": "random" if args.random_weights else "trained"}
    found |= {"prompts": "random" if pipe.engine.text is None else "of the synthetic world"}
    found |= {"device": torch.cuda.get_device_name() if dit.device.type == "cuda" else "cpu"}
    found |= {"dtype": str(dit.dtype).removeprefix("torch."), "quantization": pipe.quantization}
    found |= {"vae": type(pipe.engine.decoder).__name__, "size": [pipe.height, pipe.width], "seed": args.seed}
    return found | {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions()}


HEADER = ("steps", "dit", "dit+commit", "decode", "delivered", "p50 ms", "p95", "p99", "max", "TF/s", "of GEMM")


def cells(row: dict) -> list[str]:
    values = [row["mean_steps"], *row["fps"].values(), *row["chunk_ms"].values()]
    return [*(f"{x:.2f}" for x in values), f"{row['rate']['tflops']:.3g}", f"{row['rate']['of_product']:.0%}"]


def report(result: dict) -> list[str]:
    """The tables that go to stdout, of what there is."""
    lines, steady = [], result.get("steady", {})
    for title, part in (("clip", result), (f"steady, {steady.get('kv_frames')} frames of keys", steady)):
        if "fps" not in part:
            lines += [f"{title}: not measured", ""]
            continue
        rows = {result["policy"]: part} | {f"fixed:{n}": row for n, row in part["fixed"].items()}
        baselines = {name: row for name, row in part["baseline"].items() if "skipped" not in row}
        rows |= {f"baseline {name}": row for name, row in baselines.items()}
        lines += format_table([[f"{title}: fps", *HEADER], *([name, *cells(row)] for name, row in rows.items())])
        for name, row in baselines.items():
            for ours, r in row["ratio"].items():
                cpu = f", {r['processor']:.2f} by CPU time" if r["processor"] else ""
                what = result["policy"] if ours == "policy" else f"fixed:{list(part['fixed'])[-1]}"
                lines.append(f"{what}: {r['median']:.2f} times {name} ({r['low']:.2f} to {r['high']:.2f}{cpu})")
        lines.append("")
    for name, row in result.get("baseline", {}).items():
        lines += [f"no baseline {name}: {row['skipped']}"] if "skipped" in row else []
        lines += [f"latents against {name}: {json.dumps(rounded(row['same']))}"] if "same" in row else []
    if "fps" in result:
        decision = result.get("decision_us")
        lines += [
            f"first frame {result['first_frame_ms']:.1f} ms; a decision takes "
            + ("nothing" if decision is None else f"{decision:.0f} us"),
            f"chunks that took longer than they play, of {result['deadlines']}: "
            + ", ".join(f"{n} at {rate} fps" for rate, n in result["missed"].items()),
            f"stages over the wall clock: {result['clock']['stages_over_wall']:.4f}",
        ]
    names = ("steps_histogram", "cold", "concurrent", "fidelity", "ops", "product", "memory", "warmup_s")
    lines += [f"{name}: {json.dumps(rounded(result[name]))}" for name in names if result.get(name)]
    return lines + ["unfinished: --limit left something out"] * result["unfinished"]


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="shipped name, folder or checkpoint; with --random-weights a preset")
    add("--random-weights", action="store_true", help="a preset of the true sizes: right for speed, not for steps")
    add("--vae", help=f"of a checkpoint, as for generate; with --random-weights {' or '.join(VAES)} (default wan)")
    add("--head", type=Path, metavar="FILE", help="confidence head, as for Pipeline.from_pretrained")
    add(
        "--steps",
        "--policy",
        dest="policy",
        metavar="POLICY",
        help="as for generate (default: the model's own), or "
        "histogram:STEPS=SHARE,...: drawn, not decided (default with --random-weights)",
    )
    add("--baseline", nargs="*", choices=BASELINES, help="default: eager, on a GPU compile too")
    add("--clips", type=positive_int, help="default 5")
    add(
        "--counts",
        type=positive_int,
        nargs="+",
        metavar="STEPS",
        help="fixed counts to run (default: all; the maximum always)",
    )
    add("--rounds", type=positive_int, default=1, help="how often all clips are made; the median counts")
    add("--steady-chunks", type=positive_int, help="default 40")
    add("--steady-clips", type=positive_int, help="default 1 on a GPU, else 3")
    for name in ("--height", "--width", "--frames"):
        add(name, type=positive_int, help="pixels" if name != "--frames" else "pixel frames of a clip")
    add("--quantization", choices=QUANTIZATIONS, help="as for generate")
    add("--sessions", type=positive_int, help="also so many streams at a time (default: none)")
    add("--device", help="cpu, cuda (default: cuda where there is one)")
    add("--threads", type=positive_int, help="of a CPU (default: 1 for a small model, else torch's own count)")
    add("--quick", action="store_true", help="1 clip, 8 steady chunks, a warm-up of 2 chunks, no fresh process")
    add("--cold", action=argparse.BooleanOptionalAction, help="time the first frame of a fresh process")
    add("--cold-child", action="store_true", help="be that process")
    add("--seed", type=int, default=0, help="of prompts, noise, steps that are drawn, and random weights")
    add("--limit", type=float, metavar="SECONDS", help="of this process's life; what does not fit is left out")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    add("--plot", type=Path, metavar="PNG", help="draw the chunks and their stages")
    args = parser.parse_args(argv)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    usual = {"clips": 5, "steady_chunks": 40, "steady_clips": 1 if cuda else 3, "cold": True}
    usual |= {"clips": 1, "steady_chunks": 8, "steady_clips": 1, "cold": False} if args.quick else {}
    usual |= {"baseline": list(BASELINES) if cuda and not args.quick else ["eager"]}
    return complete(args, **usual)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parsed(argv)
    if args.cold_child:
        sys.stdout.write(json.dumps(cold_child(args)) + "\n")
        return 0

    def saved(found: dict) -> None:
        if args.save:
            save(rounded(found), args.save)

    result = evaluate(args, argv, saved)
    sys.stdout.write("\n".join(report(result)) + "\n")
    result = rounded(result)
    if args.plot and "fps" in result:
        draw(result, args.plot)
    sys.stdout.write(json.dumps(result, separators=(",", ":")) + "\n")
    return UNFINISHED if result["unfinished"] else 0


if __name__ == "__main__":
    sys.exit(main())
