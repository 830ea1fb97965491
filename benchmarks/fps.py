"""Frames a second of a whole model, with everything that is in them: what the engine makes, and what plain PyTorch does
with the same weights in the same run (`baseline.py`).

    python benchmarks/fps.py                                                 # the small model, on a CPU in two minutes
    python benchmarks/fps.py --quick --plot timeline.png
    python benchmarks/fps.py --model wan2.1-t2v-1.3b --random-weights --save benchmarks/results/fps-h200.json
    python benchmarks/fps.py --model wan2.1-t2v-1.3b --random-weights --quantization fp8 --vae taehv --sessions 4
    python benchmarks/fps.py --model self_forcing_dmd.pt --vae Wan2.1_VAE.pth --steps fixed:4

fps holds four figures, each counting more of the work: dit, the denoising steps; dit_commit, the clean pass over each
chunk too; decode, to uint8 on the device, the one to quote; delivered, copied to the host, by the host's clock. The
text encoder is apart. A chunk's commit rides with the first step of the chunk after, where no clock can part them: dit
is taken from a second pass over the same clip with the same steps a chunk, that keeps the keys and values of the last
step (commit="exit_step") and so has no clean pass, and waits for no pixels. The last chunk of a clip is never
committed, here nor in a baseline.

Two regimes: clips of the model's own length, whose keys grow with every chunk, and `steady`, chunks of an endless
stream after its window is full. A clip has one prompt, so that few of its chunks are hard. Each clip is made by every
contestant in turn: the policy, baselines, fixed counts; `ratio` compares run with run. --rounds repeats all clips; fps
is the median over rounds, chunk_ms over all chunks but each clip's first. On a GPU the CUDA graphs of both regimes are
captured before anything is timed.

Random weights cannot choose their steps: these come in the shares of a histogram (--steps
histogram:1=0.2,2=0.3,3=0.3,4=0.2 is the default, 2.5 on average), as exactly as all chunks of a regime allow, in an
order drawn from --seed. Such counts are known ahead, so no decision is read from the device in between: `decision_us`,
of one decision after a forward that is complete, until the host knows who goes on, is measured by itself.

rate: FLOP of the model's products and attention, all prompt keys counted (`work.py`), over the time of dit_commit,
against that of a large product in this process and dtype. ops: where a steady chunk's time goes, by torch's profiler,
whose own cost is in it; kernels are told apart by name. missed: chunks that took longer than they play.
first_frame_ms: from the prompt's embeddings, the text being encoded, to the first chunk's frames on the host. cold: the
same in a fresh process, with nothing warmed up. same: the engine's latents against the baseline's from the same noise;
fidelity: against plain PyTorch in float32.
--quantization is the engine's; a baseline has the weights as they are. concurrent: --sessions streams at a time
(`streams.py`).

Nothing is timed where dispatch would run another backend than DSA_BACKEND asks for, or plain torch on a GPU for want of
a package; `backends` says what ran. The file of --save is written anew after every run of a contestant, `unfinished`
and without what is still to come. --limit SECONDS of the process's life: clips until 55 % of it, the steady state until
80 %, then the rest; what no longer fits is left out, and the exit code is 75.

The last line of stdout is one JSON object.
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

from benchmarks.common.cli import first_line, format_table, positive_int
from benchmarks.common.environment import commit, machine, save, versions
from benchmarks.common.limit import UNFINISHED, WHY, Limit
from benchmarks.e2e import protocol
from benchmarks.e2e.breakdown import Work, by_op, decision_us, decode_ms, memory, product
from benchmarks.e2e.concurrency import concurrent
from benchmarks.e2e.eager_baseline import Baseline, difference, fidelity
from benchmarks.e2e.protocol import HISTOGRAM, VAES, Bench, Contestant, Regime, Rounds, clip_chunks, interleaved
from benchmarks.e2e.timeline import columns, draw, figures, play, ratio
from benchmarks.micro.backends import refuse_others
from dsa_engine import Fixed, Pipeline, pipeline_inputs
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import check_output_path
from dsa_engine.models.fp8 import QUANTIZATIONS, quantise_linears, quantization

BASELINES = ("eager", "compile")
CLIPS, STEADY = 0.55, 0.8  # of --limit, at which no more clips and no more of the steady state are begun
FEW = 3  # chunks of the float32 reference, whose forwards take ten times as long on a GPU
SAME = 0.01  # of the largest latent: how far float32 may take two orders of the same sums apart over a few chunks


def load(args: argparse.Namespace, plain: bool = False) -> Pipeline:
    """plain: without --quantization."""
    named = None if plain else args.quantization
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    if args.random_weights:
        fp8 = quantization(named, device)
        pipe = protocol.random_pipeline(args.model, device, args.vae)
        pipe.quantization, pipe.engine.fp8_cache = named, fp8.cache
        if fp8.linear:
            quantise_linears(pipe.engine.dit)
    else:
        pipe = Pipeline.from_pretrained(args.model, head=args.head, vae=args.vae, device=device, quantization=named)
    pipe.engine.max_sessions = args.sessions or 1
    pipe.height, pipe.width = args.height or pipe.height, args.width or pipe.width
    pipe.frames = pipeline_inputs.whole_chunks(pipe.engine, args.frames or pipe.frames)
    if device == "cpu":
        torch.set_num_threads(args.threads or pipe.cpu_threads)
    return pipe


def bench_of(args: argparse.Namespace, pipe: Pipeline) -> tuple[Bench, str, float | None]:
    """With what the policy is called, and its threshold."""
    histogram = asked_histogram(args)
    embeds = protocol.embeddings(pipe, args.clips, args.seed)
    if histogram:
        drawn = protocol.histogram_policy(histogram, pipe.max_steps, args.seed)
        return Bench(pipe, embeds, drawn, args.seed), protocol.label(histogram), None
    policy = pipeline_inputs.resolve_policy(pipe.engine, args.policy)
    threshold = getattr(policy, "threshold", None)
    label = args.policy or (f"fixed:{policy.n}" if isinstance(policy, Fixed) else f"confidence:{threshold:g}")
    return Bench(pipe, embeds, lambda regime, clip: policy, args.seed), label, threshold


def asked_histogram(args: argparse.Namespace) -> tuple[float, ...] | None:
    """Shares of chunks with 1, 2, ... steps; None where a policy decides."""
    if args.policy is None:
        return HISTOGRAM if args.random_weights else None
    return protocol.parse_histogram(args.policy) if args.policy.startswith("histogram:") else None


def warmed(
    contestants: dict[str, Contestant], regime: Regime, limit: Limit | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each one's first clip. A compiled baseline that fails leaves the contest, and whoever is not warm by
    the limit: by name, why."""
    seconds, failed = {}, {}
    for name, made in list(contestants.items()):
        if limit is not None and limit.over():
            failed[name] = WHY
            del contestants[name]
            continue
        start = time.perf_counter()
        try:
            made(regime, 0)
        except RuntimeError as error:
            if name != "compile":
                raise
            failed[name] = first_line(error)
            del contestants[name]
        seconds[name] = time.perf_counter() - start
    return seconds, failed


def compared(bench: Bench, baseline: Baseline, chunks: int) -> dict:
    """The engine's latents against a baseline's. Raises RuntimeError where they are not the same but for float32's
    rounding; bfloat16 rounds so often that its distance is only reported."""
    pipe = bench.pipe
    found = difference(pipe, baseline, bench.embeds[0], bench.size, chunks)
    if pipe.engine.dit.dtype == torch.float32 and pipe.quantization is None and not found["relative"] < SAME:
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
    bench, _, _ = bench_of(args, pipe)
    regime = bench.clip(clip_chunks(pipe), 1)
    first = play(lambda: bench.stream(regime, 0, bench.policy(regime, 0)), 1).first_frame
    return {"load_s": seconds, "first_frame_ms": first}


class Standings:
    """The runs of both regimes as figures, of as many as there are. plain: the baselines' names; ceiling: TF/s."""

    def __init__(self, pipe: Pipeline, plain: Sequence[str], counts: Sequence[str], ceiling: float):
        self.plain, self.counts, self.work, self.ceiling = plain, counts, Work(pipe), ceiling
        self.limit = str(pipe.max_steps)
        self.runs: dict[str, dict[str, Rounds]] = {"clip": {}, "steady": {}}

    def there(self, regime: str, names: Sequence[str]) -> list[str]:
        """Those that have a run."""
        return [name for name in names if self.runs[regime].get(name)]

    def of(self, regime: str, name: str) -> dict:
        rounds = self.runs[regime][name]
        return figures(rounds, regime == "clip") | {"rate": self.work.rate(rounds, self.ceiling)}

    def baselines(self, regime: str) -> dict[str, dict]:
        mine = self.runs[regime]
        ours = {"policy": "policy", "fixed": self.limit}

        def ratios(name: str) -> dict:
            return {whose: ratio(mine[of], mine[name]) for whose, of in ours.items() if self.there(regime, [of])}

        return {name: self.of(regime, name) | {"ratio": ratios(name)} for name in self.there(regime, self.plain)}

    def regime(self, regime: str) -> dict:
        """All of its figures; empty before the policy has a run."""
        if not self.there(regime, ["policy"]):
            return {}
        fixed = {n: self.of(regime, n) for n in self.there(regime, self.counts)}
        return self.of(regime, "policy") | {"fixed": fixed, "baseline": self.baselines(regime)}

    def timeline(self) -> dict:
        regimes = [r for r in self.runs if self.there(r, ["policy"])]
        return {r: {n: columns(self.runs[r][n]) for n in self.there(r, ("policy", *self.plain))} for r in regimes}


def evaluate(
    args: argparse.Namespace, argv: Sequence[str], saved: Callable[[dict], object] = lambda found: None
) -> dict:
    """All figures as one object; saved: told what there is of it whenever there is more."""
    limit, start = Limit(args.limit), time.perf_counter()
    pipe = load(args)
    seconds = {"load": time.perf_counter() - start}
    result = about(args, pipe) | {"unfinished": True, "backends": refuse_others(device=pipe.engine.dit.device.type)}
    bench, label, threshold = bench_of(args, pipe)
    clip = bench.clip(clip_chunks(pipe), args.clips, args.rounds)
    steady = bench.steady(args.steady_chunks, args.steady_clips)
    warm = bench.clip(2, 1) if args.quick else clip

    def add(**more) -> None:
        result.update(more)
        saved(result)

    add(
        policy=label,
        histogram=asked_histogram(args),
        threshold=threshold,
        regime="clip",
        clips={"frames": pipe.frames, "chunks": clip.chunks, "clips": clip.clips, "rounds": clip.rounds},
        tokens_a_frame=pipe.engine.dit.config.tokens_per_frame(*bench.size),
        machine=machine(),
        warmup_s=seconds,
    )
    seconds |= {"capture": bench.capture(clip) + bench.capture(steady)}
    first = {"policy": bench.engine(bench.policy)}
    seconds |= warmed(first, warm)[0]
    add(memory=memory(pipe))  # while there is no baseline
    dit = load(args, plain=True).engine.dit if args.quantization else pipe.engine.dit
    baselines = {name: Baseline(pipe, compiled=name == "compile", dit=dit) for name in args.baseline}
    rest = {name: bench.plain(baseline) for name, baseline in baselines.items()}
    counts = [str(n) for n in range(1, pipe.max_steps + 1) if n in (*(args.counts or [n]), pipe.max_steps)]
    rest |= {n: bench.engine(lambda regime, clip, n=int(n): Fixed(n)) for n in reversed(counts)}
    more, skipped = warmed(rest, warm, limit.share(CLIPS))
    seconds |= more
    limits = product(pipe)
    add(product=limits)

    standings = Standings(pipe, list(baselines), counts, limits["tflops"])
    few = {name: made for name, made in (first | rest).items() if name not in counts[:-1]}

    def seen(regime: str, runs: dict[str, Rounds]) -> None:
        standings.runs[regime] = runs
        if regime == "clip":
            found = standings.regime("clip")
            baseline = found.pop("baseline", {}) | {name: {"skipped": why} for name, why in skipped.items()}
            add(**found, baseline=baseline)
        elif standings.there("steady", ["policy"]):
            add(steady={"kv_frames": steady.window, "clips": steady.clips} | standings.regime("steady"))

    runs, whole = interleaved(first | rest, clip, limit.share(CLIPS), lambda runs: seen("clip", runs))
    few_runs, both = interleaved(few, steady, limit.share(STEADY), lambda runs: seen("steady", runs))
    whole = whole and both and not any(why == WHY for why in skipped.values())
    chunks = compared_chunks(bench, args.quick)
    for name in standings.there("clip", list(baselines)):
        if not limit.over():
            result["baseline"][name]["same"] = compared(bench, baselines[name], chunks)

    def by_kind() -> dict:
        vae = {"vae": decode_ms(few_runs["policy"])} if few_runs["policy"] else {}
        return by_op(bench, steady) | vae

    many = bench.steady(args.steady_chunks, args.sessions) if args.sessions else None
    at_last = {  # what matters more comes first
        "decision_us": lambda: decision_us(bench, steady),
        "fidelity": lambda: fidelity(pipe, bench.embeds[0], bench.size, min(chunks, FEW), dit),
        "ops": by_kind,
        "concurrent": lambda: concurrent(bench, many) if many else None,
        "cold": lambda: cold(argv) if args.cold else None,
    }
    for name, made in at_last.items():
        if limit.over():
            whole = False
        else:
            add(**{name: made()})
    add(timeline=standings.timeline(), machine=machine())
    add(unfinished=not whole)
    return result


def about(args: argparse.Namespace, pipe: Pipeline) -> dict:
    dit = pipe.engine.dit
    return {
        "benchmark": "fps",
        "model": pipe.name,
        "weights": "random" if args.random_weights else "trained",
        "prompts": "random" if pipe.engine.text is None else "of the synthetic world",
        "device": torch.cuda.get_device_name() if dit.device.type == "cuda" else "cpu",
        "dtype": str(dit.dtype).removeprefix("torch."),
        "quantization": pipe.quantization,
        "vae": type(pipe.engine.decoder).__name__,
        "size": [pipe.height, pipe.width],
        "seed": args.seed,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions(),
    }


HEADER = ("", "steps", "dit", "dit+commit", "decode", "delivered", "p50 ms", "p95", "p99", "max", "TF/s", "of product")


def line(name: str, row: dict) -> list[str]:
    numbers = [row["mean_steps"], *row["fps"].values(), *row["chunk_ms"].values()]
    rate = row["rate"]
    return [name, *(f"{x:.2f}" for x in numbers), f"{rate['tflops']:.3g}", f"{rate['of_product']:.0%}"]


def report(result: dict) -> list[str]:
    """The tables that go to stdout, of what there is."""
    lines, steady = [], result.get("steady", {})
    for title, part in (("clip", result), (f"steady, {steady.get('kv_frames')} frames of keys", steady)):
        if "fps" not in part:
            lines += [f"{title}: not measured", ""]
            continue
        rows = {result["policy"]: part} | {f"fixed:{n}": row for n, row in part["fixed"].items()}
        plain = {name: row for name, row in part["baseline"].items() if "skipped" not in row}
        body = [line(name, row) for name, row in (rows | {f"baseline {n}": row for n, row in plain.items()}).items()]
        lines += [*format_table([[f"{title}: fps", *HEADER[1:]], *body]), ""]
        for name, row in plain.items():
            for whose, r in row["ratio"].items():
                busy = f", {r['processor']:.2f} by processor time" if r["processor"] else ""
                what = result["policy"] if whose == "policy" else f"fixed:{list(part['fixed'])[-1]}"
                lines.append(f"{what}: {r['median']:.2f} times {name} ({r['low']:.2f} to {r['high']:.2f}{busy})")
        lines.append("")
    plain = result.get("baseline", {})
    lines += [f"no baseline {n}: {row['skipped']}" for n, row in plain.items() if "skipped" in row]
    if "fps" in result:
        asked, fresh = result.get("decision_us"), json.dumps(rounded(result.get("cold")))
        lines += [
            f"first frame {result['first_frame_ms']:.1f} ms; a fresh process: {fresh}",
            f"steps {result['steps_histogram']}; a decision takes {'nothing' if asked is None else f'{asked:.0f} us'}",
            f"chunks that took longer than they play, of {result['deadlines']}: "
            + ", ".join(f"{n} at {rate} fps" for rate, n in result["missed"].items()),
            f"stages over the wall clock: {result['clock']['stages_over_wall']:.4f}",
        ]
    lines += [f"{name}: {json.dumps(rounded(result[name]))}" for name in ("concurrent",) if result.get(name)]
    lines += [f"latents against {n}: {json.dumps(rounded(b['same']))}" for n, b in plain.items() if "same" in b]
    fidelity = result.get("fidelity", "not measured")
    lines += [f"latents against float32: {json.dumps(rounded(fidelity))}"]
    last = ("ops", "product", "memory", "warmup_s")
    lines += [f"{name}: {json.dumps(rounded(result[name]))}" for name in last if name in result]
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
        help="fixed counts to run (default: all; the most always)",
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
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for path, suffix in ((args.save, ".json"), (args.plot, ".png")):
        if path is not None:
            check_output_path(path, suffix)  # before the work, not after it
    return args


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
