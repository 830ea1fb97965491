"""Quality over average steps of a model, on held-out clips of the synthetic world, against what it has to beat.

Every row is one step policy on the same prompts and noise: fixed counts, the confidence policy at many thresholds (the
presets and a spread that covers 1.1 to 3.5 mean steps), and three baselines that need no head:

    random      exits after each step with probability p, whatever the chunk shows
    by_index    counts by the chunk's place in the clip, such as 4, 2, 1, 1
    x0_change   `Change`: exits once the estimate hardly changes any more, which costs a step to find out

and, where there is one, the many-step teacher that the model was distilled from (24 Euler steps), and
ground truth through the codec, the most that any row can reach.

valid is the share of frames whose template fit, shape and colour mass are right (`metrics.score`), with its 95 %
bootstrap interval over clips; all_valid, of wholly valid clips; motion, of chunks that move as told; mse, the mean
template error; texture, the colour's variance inside the shape; steady, the share of frames of carried-on chunks whose
object is less than 5 px from where it was. Hard chunks: the first, one after a cut, a jumping object. passes counts
forwards a chunk: the steps and the commit, which the last chunk of a clip does not need. distance: energy distance
2 E|A - B| - E|A - A'| - E|B - B'| in px to the teacher's chunks, of their mean place and of their displacements.

`versus` holds differences of valid, paired by clip, to fixed counts and to each baseline's curve at equal mean steps
(linear between its two neighbouring operating points, clip by clip). Thresholds of the spread are chosen on the same
clips, but only to lie at given mean steps; the presets were calibrated on others. A value that does not exist (no
teacher, no such chunk, beyond a curve's end) is null. The last line of --json is one JSON object.

    python benchmarks/quality.py --clips 512 --jobs 2 --save benchmarks/results/quality-shapes-cpu.json --plot curve.png
    python benchmarks/quality.py --clips 64 --chunks 16            # drift: valid by quarter of a 48-frame clip
    python benchmarks/quality.py --compare runs/control            # another model minus this one, paired by clip, at
                                                                   # fixed counts and each at its own presets
    python benchmarks/quality.py --brief --quantization fp8        # the same model in FP8 minus itself without
    python benchmarks/quality.py --brief --commit exit_step        # keys and values of the exit step, no clean pass

Of a model that is compared, `inside` says whether its valid lies in the 95 % interval of this one's; of the same model
run another way `psnr` says how like its clips are, and for a yardstick those in bfloat16 (`likeness.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import format_table, positive_int
from benchmarks.common.environment import commit, machine, save
from benchmarks.likeness import likeness
from dsa_engine import Change, Confidence, Fixed, PerChunk, Pipeline, Policy, pipeline_inputs
from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.config import COMMIT_MODES, ModelConfig
from dsa_engine.evaluation.rollouts import (
    BATCH_CLIPS,
    Table,
    Trace,
    ground_truth,
    held_out,
    roll_out,
    roll_out_teacher,
    tabulate,
    trace,
)
from dsa_engine.evaluation.statistics import mean_interval, spread
from dsa_engine.evaluation.summary import KINDS, compare, figures, head_figures, per_clip, rounded, versus
from dsa_engine.files import atomic_write, check_output_path
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import QUANTIZATIONS
from dsa_engine.pipeline import changed

TEACHER = "shapes-teacher"
SPREAD = np.linspace(1.1, 3.5, 10)  # mean steps at which the confidence policy is tried beside its presets
SPREAD_CHANGE = (2.1, 2.4, 2.8, 3.2, 3.6)
EXITS = (0.8, 0.6, 0.45, 0.3, 0.15)  # of `random`, after each step
BY_INDEX = ([2, 1], [4, 1], [4, 2, 1], [4, 2], [4, 3])  # the last count holds
WAN = "wan2.1-t2v-1.3b"
OTHER = "other "  # before the names of the rows of the model that is compared
ALIKE = 64  # clips whose PSNR is taken


@dataclass(frozen=True)
class Clips:
    """Which clips every row is rolled out on: prompts are always the same, seed is that of the noise."""

    clips: int
    chunks: int
    seed: int

    @property
    def captions(self):
        return held_out(self.clips, self.chunks)


@dataclass(frozen=True)
class Source:
    """A model, by name or folder, the file of another head for it, and how it is run."""

    model: str
    head: Path | None = None
    quantization: str | None = None
    commit: str | None = None
    dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.model, self.quantization, self.commit and f"commit {self.commit}")))


@dataclass(frozen=True)
class Job:
    """One row to roll out. policy: a Policy, one per clip, or "trace", "teacher", "truth"; options of the teacher."""

    source: Source
    policy: Policy | Sequence[Policy] | str
    options: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of a job: scores, confidence [B, N, F] at the exits, seconds of the rollout without the scoring."""

    table: Table
    sure: np.ndarray
    seconds: float
    trace: Trace | None = None


@lru_cache(maxsize=4)
def load(source: Source) -> Pipeline:
    pipe = Pipeline.from_pretrained(
        source.model, head=source.head, dtype=source.dtype, quantization=source.quantization
    )
    pipe.engine.config = changed(pipe.config, commit=source.commit)
    return pipe


def measure(job: Job, clips: Clips) -> Result:
    """Roll out and score; also what a worker process runs."""
    pipe, captions, seen = load(job.source), clips.captions, None
    start = time.perf_counter()
    if job.policy == "trace":
        rolled, seen = trace(pipe, captions, clips.seed)
    elif job.policy == "teacher":
        rolled = roll_out_teacher(pipe, captions, shift=pipe.config.shift, seed=clips.seed, **dict(job.options))
    elif job.policy == "truth":
        rolled = ground_truth(pipe, captions, clips.seed)
    else:
        rolled = roll_out(pipe, captions, job.policy, clips.seed, batch=BATCH_CLIPS)
    seconds = time.perf_counter() - start
    return Result(tabulate(captions, rolled), rolled.confidence, seconds, seen)


def run(jobs: dict[str, Job], clips: Clips, workers: ProcessPoolExecutor | None, bar: tqdm) -> dict[str, Result]:
    """The result of every job, by its name; in this process where there are no workers."""
    results = {}
    if workers is None:
        for name, job in jobs.items():
            bar.set_postfix_str(name)
            results[name] = measure(job, clips)
            bar.update()
        return results
    names = {workers.submit(measure, job, clips): name for name, job in jobs.items()}
    for future in as_completed(names):
        results[names[future]] = future.result()
        bar.set_postfix_str(names[future])
        bar.update()
    return {name: results[name] for name in jobs}


def random_exits(p: float, clips: Clips, limit: int) -> list[PerChunk]:
    """Counts of steps, drawn before anything is seen: P(k) = p (1 - p)^(k - 1) for k < limit, the rest at limit."""
    drawn = np.random.default_rng([clips.seed, round(1e6 * p)]).geometric(p, size=(clips.clips, clips.chunks))
    return [PerChunk(counts) for counts in np.minimum(drawn, limit).tolist()]


def known_jobs(source: Source, clips: Clips, limit: int, brief: bool = False) -> dict[str, Job]:
    """The rows whose policy does not depend on what the model shows; the last fixed one is traced."""
    jobs = {f"fixed:{limit}": Job(source, "trace")}
    jobs |= {f"fixed:{n}": Job(source, Fixed(n)) for n in range(limit - 1, 0, -1)}
    if brief:
        return jobs
    jobs |= {f"random:{p}": Job(source, random_exits(p, clips, limit)) for p in EXITS}
    by_index = sorted({tuple(min(count, limit) for count in counts) for counts in BY_INDEX})
    jobs |= {f"by_index:{','.join(map(str, c))}": Job(source, PerChunk(list(c))) for c in by_index}
    return jobs


def chosen_jobs(source: Source, seen: Trace, named: Sequence[float], brief: bool = False) -> dict[str, Job]:
    """Confidence at the named thresholds and a spread, x0_change at a spread: placed by what the trace shows."""
    if brief:
        return {f"confidence:{t}": Job(source, Confidence(t)) for t in sorted(set(named))}
    limit = seen.confidence.shape[2]
    sure = seen.confidence.min(axis=3).reshape(-1, limit)
    jobs = {f"confidence:{t}": Job(source, Confidence(t)) for t in sorted({*named, *spread(sure, SPREAD)})}
    if limit > 2:
        calm = -seen.change.max(axis=3).reshape(-1, limit - 1)
        calm = np.concatenate((np.full((len(calm), 1), -np.inf), calm), axis=1)  # nothing is known after step 1
        jobs |= {f"x0_change:{-t}": Job(source, Change(-t)) for t in spread(calm, SPREAD_CHANGE)}
    return jobs


def curves(results: dict[str, Result], limit: int) -> dict[str, list[Table]]:
    """The operating points of each kind of policy, joined to the fixed counts that all baselines can be set to.

    x0_change cannot stop after step 1 but by max_steps=1: below 2 mean steps its curve is a mixture of 1 and 2 fixed.
    """
    ends = {"fixed": (), "random": (1, limit), "by_index": (1, limit), "x0_change": (1, 2, limit)}
    names = {k: [n for n in results if n.startswith(k + ":")] + [f"fixed:{n}" for n in e] for k, e in ends.items()}
    ran = [kind for kind in names if any(name.startswith(kind + ":") for name in results)]
    return {kind: [results[name].table for name in names[kind]] for kind in ran}


def head_cost(source: Source, clips: Clips) -> dict[str, float]:
    """Size of the head, here and for Wan 1.3B, and its share of a step's time for one clip at a time on the CPU."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def timed(module: nn.Module) -> list[float]:
        times: list[float] = []
        module.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter()))
        module.register_forward_hook(lambda *_: times.append(times.pop() + time.perf_counter()))
        return times

    with torch.device("meta"):
        config = ModelConfig.preset(WAN)
        wan = size(ConfidenceHead(config)) / size(CausalDiT(config))
    pipe = load.__wrapped__(source)  # one of its own, for the hooks stay
    step, head = timed(pipe.engine.dit), timed(pipe.engine.head)
    roll_out(pipe, clips.captions[:8], Fixed(pipe.max_steps), batch=1)
    return {
        "parameters": size(pipe.engine.head),
        "percent_of_model": 100 * size(pipe.engine.head) / size(pipe.engine.dit),
        f"percent_of_{WAN}": 100 * wan,
        "step_ms": 1e3 * float(np.median(step)),
        "percent_of_step_time": 100 * float(np.median(head) / np.median(step)),
    }


MOST_STEPS, BETTER, WORSE = 1.9, 0.03, -0.01  # of the claim, in mean steps and in valid frames


def claims(confidence: Sequence[dict], head: dict, limit: int) -> dict[str, dict]:
    """What step allocation is claimed to do, of the confidence row of the most mean steps up to 1.9: each claim with
    the figure, the rule, and whether it holds. Empty where no row has so few."""
    rows = [r for r in confidence if r["mean_steps"] <= MOST_STEPS]
    if not rows:
        return {}
    row = max(rows, key=lambda r: r["mean_steps"])
    found = {f"mean steps (threshold {row['threshold']:g})": (row["mean_steps"], f"at most {MOST_STEPS}", True)}
    for name, gain in row["versus"].items():
        if gain is None:
            continue  # beyond the end of that curve
        value = (gain["difference"], *gain["ci"])
        if name == f"fixed:{limit}":
            found[f"valid less that of {name}"] = (value, f"at least {WORSE}", value[0] >= WORSE)
        elif name == "fixed:2":
            found[f"valid less that of {name}"] = (
                value,
                f"at least {BETTER}, interval above 0",
                value[0] >= BETTER and value[1] > 0,
            )
        else:
            found[f"valid less that of {name} at equal steps"] = (value, "interval above 0", value[1] > 0)
    found["steps of hard chunks over those of easy ones"] = (row["ratio"], "at least 2", row["ratio"] >= 2)
    found["AUC of the head for hard chunks"] = (head["auc_hard"], "at least .93", head["auc_hard"] >= 0.93)
    found["Spearman with the true distance"] = (head["spearman"], "at least .8", head["spearman"] >= 0.8)
    return {text: dict(zip(("value", "rule", "holds"), verdict)) for text, verdict in found.items()}


COLUMNS = ("mean_steps", "steps_easy", "steps_hard", "ratio", "passes", "valid", "ci", "valid_easy", "valid_hard")
COLUMNS += ("all_valid", "motion", "mse", "texture", "steady", "seconds")


def report(result: dict) -> list[str]:
    """The tables that go to stdout."""
    columns = (*COLUMNS, "quarters") if result["chunks"] > 4 else COLUMNS
    rows = dict(labelled(result))
    lines = format_table(
        [["policy", *columns], *([name, *(cell(c, r[c]) for c in columns)] for name, r in rows.items())]
    )

    def gain(value: dict | None) -> str:
        return "-" if value is None else f"{value['difference']:+.3f} {cell('ci', value['ci'])}"

    lines += ["", "valid, confidence minus others, paired by clip; minus curves at equal mean steps"]
    body = [[name, *map(gain, r["versus"].values())] for name, r in rows.items() if "versus" in r]
    lines += format_table([["policy", *result["confidence"][0]["versus"]], *body])
    if result["compare"]:
        lines += ["", f"{result['compare']['label']} minus {result['model']}, paired by clip"]
        body = [
            [name, " / ".join(f"{n:.2f}" for n in reversed(r["mean_steps"])), gain(r["valid"]), gain(r["valid_hard"])]
            + [" / ".join(f"{v:.3f}" for v in reversed(r["valid_of"])), "yes" if r["inside"] else "NO"]
            for name, r in result["compare"]["rows"].items()
        ]
        lines += format_table([["policy", "mean steps", "valid", "valid_hard", "valid of both", "inside"], *body])
        lines += [f"psnr, {way}: {row}" for way, row in (result["compare"]["psnr"] or {}).items()]
    lines += ["", *(f"{name}: {result[name]}" for name in FIGURES)]
    lines += [""]
    lines += [
        f"{'yes' if c['holds'] else 'NO ':3} {t}: {c['value']} ({c['rule']})" for t, c in result["claims"].items()
    ]
    if result["teacher"] is None and not result["brief"]:
        lines += ["", f"no teacher: {TEACHER!r} does not ship with the package; give --teacher FOLDER"]
    return lines


def cell(column: str, value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{v:.3f}' for v in value)}]"
    digits = {"mse": 5, "texture": 4, "seconds": 1}.get(column, 3)
    return "-" if value is None else f"{value:.{digits}f}"


FIGURES = ("auc_hard", "spearman", "spearman_by_step", "correlation", "correlation_by_step", "steps_event")
FIGURES += ("steps_quiet", "steps_by_kind", "head", "mix")


def labelled(result: dict) -> Iterator[tuple[str, dict]]:
    """(name, row) of every row of a result."""
    yield from ((f"fixed:{n}", r) for n, r in result["fixed"].items())
    for r in result["confidence"]:
        yield f"confidence:{r['threshold']:g}" + (f" {r['preset']}" if r["preset"] else ""), r
    random, by_index, x0_change = result["baselines"].values()
    yield from ((f"random:{r['p']:g}", r) for r in random)
    yield from ((f"by_index:{','.join(map(str, r['counts']))}", r) for r in by_index)
    yield from ((f"x0_change:{r['threshold']:g}", r) for r in x0_change)
    yield from ((name, result[name]) for name in ("teacher", "ground_truth") if result[name])


PANELS = {"valid": "valid frames", "motion": "chunks that move as told"}
STYLE = {"random": ("#9a6fb0", "^"), "by_index": ("#c98b2b", "s"), "x0_change": ("#3b8f5a", "D")}


def draw(result: dict, path: Path) -> None:
    """valid and motion over mean steps: fixed counts, confidence with its interval, baselines, teacher, truth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure((11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    chosen = sorted(result["confidence"], key=lambda r: r["mean_steps"])
    steps = [r["mean_steps"] for r in chosen]
    for axes, (key, text) in zip(figure.subplots(1, 2), PANELS.items()):
        fixed = list(result["fixed"].values())
        axes.plot([r["mean_steps"] for r in fixed], [r[key] for r in fixed], "o--", color="#555555", label="fixed")
        for kind, (color, marker) in STYLE.items():
            points = sorted(result["baselines"][kind], key=lambda r: r["mean_steps"])
            style = dict(color=color, marker=marker, ms=4.5, lw=1, alpha=0.85)
            axes.plot([r["mean_steps"] for r in points], [r[key] for r in points], label=kind, **style)
        axes.plot(steps, [r[key] for r in chosen], "o-", color="#1f5fbf", ms=4, lw=2, label="confidence", zorder=5)
        if key == "valid":
            low, high = zip(*(r["ci"] for r in chosen))
            axes.fill_between(steps, low, high, color="#1f5fbf", alpha=0.15, lw=0, label="its 95 % interval")
        for r in (r for r in chosen if r["preset"]):
            place, halo = (r["mean_steps"], r[key]), [withStroke(linewidth=2.5, foreground="white")]
            axes.plot(*place, "o", ms=9, mfc="none", mec="#1f5fbf", mew=1.5, zorder=6)
            style = dict(color="#1f5fbf", size=8, zorder=7, path_effects=halo)
            axes.annotate(r["preset"], place, (5, -13), textcoords="offset points", **style)
        for name, style in (("teacher", "-."), ("ground_truth", ":")):
            if result[name]:
                label = f"teacher, {result[name]['mean_steps']:g} steps" if name == "teacher" else "ground truth"
                axes.axhline(result[name][key], color="#a03030", ls=style, lw=1.2, label=label)
        axes.set(xlabel="mean denoising steps a chunk", ylabel=text)
        axes.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=8, fontsize=8)
    figure.suptitle(
        f"{result['model']}: {result['clips']} clips of {result['chunks']} chunks, "
        f"{100 * result['mix']['hard']:.0f} % of them hard",
        size=11,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def compared(args: argparse.Namespace) -> Source | None:
    """The model that is compared: --compare, or the same one, run as is told."""
    if args.compare:
        return Source(args.compare, None, args.quantization, args.commit)
    if args.quantization or args.commit:
        return Source(args.model, args.head, args.quantization, args.commit)
    return None


def comparison(
    args: argparse.Namespace, pipe: Pipeline, clips: Clips, mine: dict[str, Table], others: dict[str, Result]
) -> dict | None:
    """The model that is compared: what it is, its rows by policy, and its PSNR where it is the same one."""
    rival = compared(args)
    if rival is None:
        return None
    rows, psnr = {}, None
    for name, other in others.items():
        one, low, high = mean_interval(per_clip(mine[name]))
        value = float(per_clip(other.table).mean())
        rows[name] = compare(mine[name], other.table) | {"valid_of": [one, value], "inside": low <= value <= high}
    if rival.model == args.model:
        rounding = replace(rival, quantization=None, commit=None, dtype=torch.bfloat16)
        ways = {"bfloat16": load(rounding), "as compared": load(rival)}
        psnr = {"clips": min(ALIKE, clips.clips)} | likeness(pipe, ways, clips.captions[:ALIKE], clips.seed)
    about = {name: getattr(rival, name) for name in ("model", "quantization", "commit", "label")}
    return {**about, "rows": rows, "psnr": psnr}


def evaluate(args: argparse.Namespace) -> dict:
    """All rows and figures as one object."""
    source = Source(args.model, args.head)
    pipe, clips = load(source), Clips(args.clips, args.chunks, args.seed)
    limit, presets = pipe.max_steps, dict(pipe.config.presets)
    if pipe.engine.head is None or limit < 2:
        raise ValueError(f"--model {args.model}: needs a confidence head and at least 2 steps to choose from")
    default = pipeline_inputs.default_threshold(pipe.engine)
    teacher = None if args.brief else args.teacher or (TEACHER if TEACHER in shipped_models() else None)
    jobs: dict[str, Job] = {}
    if teacher:  # it takes longest, so it starts first
        options = (("steps", args.teacher_steps), ("guidance", args.guidance))
        jobs["teacher"] = Job(Source(teacher), "teacher", options)
    jobs |= known_jobs(source, clips, limit, args.brief) | {"ground_truth": Job(source, "truth")}
    rival = compared(args)
    if rival:
        other = load(rival)
        policies = {f"fixed:{n}": Fixed(n) for n in range(1, min(limit, other.max_steps) + 1)}
        policies |= {n: Confidence(other.config.presets[n]) for n in presets if n in other.config.presets}
        jobs |= {OTHER + name: Job(rival, policy) for name, policy in policies.items()}
    spawn = multiprocessing.get_context("spawn")  # forked workers would share torch's threads
    pool = ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) if args.jobs > 1 else nullcontext()
    with pool as workers, tqdm(total=len(jobs), unit="row") as bar:
        results = run(jobs, clips, workers, bar)
        more = chosen_jobs(source, results[f"fixed:{limit}"].trace, [default, *presets.values()], args.brief)
        bar.total += len(more)
        results |= run(more, clips, workers, bar)
    return assembled(args, pipe, clips, results)


def assembled(args: argparse.Namespace, pipe: Pipeline, clips: Clips, results: dict[str, Result]) -> dict:
    """The object that the benchmark is for, from the results by name."""
    limit, presets, default = pipe.max_steps, pipe.config.presets, pipeline_inputs.default_threshold(pipe.engine)
    others = {name.removeprefix(OTHER): results.pop(name) for name in list(results) if name.startswith(OTHER)}
    teacher = results["teacher"].table if "teacher" in results else None
    rows = {
        name: figures(r.table, limit, None if name == "teacher" else teacher) | {"seconds": r.seconds}
        for name, r in results.items()
    }

    def of(kind: str) -> dict[str, dict]:
        """Rows of a kind, by what stands after the colon."""
        return {name.partition(":")[2]: r for name, r in rows.items() if name.startswith(kind + ":")}

    fixed = {n: results[f"fixed:{n}"] for n in range(1, limit + 1)}
    against = {f"fixed:{n}": fixed[n].table for n in (2, limit)}
    points, named = curves(results, limit), {str(value): name for name, value in presets.items()}
    confidence = {
        value: {"threshold": float(value), "preset": named.get(value), **r}
        | {"versus": versus(results[f"confidence:{value}"].table, against, points)}
        for value, r in of("confidence").items()
    }
    own = results[f"confidence:{default}"].table
    head = head_figures(fixed[limit].trace, [(r.sure, r.table) for r in fixed.values()], own)
    mine = {name: r.table for name, r in results.items()}
    mine |= {name: mine[f"confidence:{value}"] for name, value in presets.items()}
    return rounded(
        {
            "benchmark": "quality",
            "model": pipe.name,
            "head_file": args.head and args.head.name,
            "clips": clips.clips,
            "chunks": clips.chunks,
            "seed": clips.seed,
            "brief": args.brief,
            "mix": {"hard": own.hard.mean(), **{kind: (own.kind == kind).mean() for kind in KINDS}},
            "thresholds": {"default": default, **presets},
            "fixed": {n: rows[f"fixed:{n}"] for n in fixed},
            "confidence": list(confidence.values()),
            "baselines": {
                "random": [{"p": float(p), **r} for p, r in of("random").items()],
                "by_index": [{"counts": [int(n) for n in c.split(",")], **r} for c, r in of("by_index").items()],
                "x0_change": [{"threshold": float(t), **r} for t, r in of("x0_change").items()],
            },
            "teacher": teacher and {"model": args.teacher or TEACHER, "guidance": args.guidance, **rows["teacher"]},
            "ground_truth": rows["ground_truth"],
            **head,
            "head": head_cost(Source(args.model, args.head), clips),
            "claims": claims(list(confidence.values()), head, limit),
            "compare": comparison(args, pipe, clips, mine, others),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "commit": commit(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="shipped name or folder; it needs a confidence head")
    add("--head", type=Path, metavar="FILE", help="another confidence head than the model's own")
    add("--teacher", help=f"shipped name or folder of the many-step teacher (default {TEACHER} where it is shipped)")
    add("--teacher-steps", type=int, default=24, help="Euler steps of the teacher")
    add("--guidance", type=float, default=1.0, help="of the teacher, against the null prompt")
    add("--compare", metavar="MODEL", help="another model, whose rows are compared with the model's, paired by clip")
    add("--quantization", choices=QUANTIZATIONS, help="of the model that is compared, else the same one")
    add("--commit", choices=COMMIT_MODES, help="of the model that is compared, else the same one")
    add(
        "--brief",
        action="store_true",
        help="only fixed counts, presets and the model compared: no baselines, no teacher",
    )
    add("--clips", type=positive_int, default=512)
    add("--chunks", type=positive_int, default=4, help="chunks a clip (4 is the training length)")
    add("--seed", type=int, default=0, help="of the noise; the prompts are always the same")
    add("--jobs", type=positive_int, default=1, help="worker processes, each with one thread")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    add("--plot", type=Path, metavar="PNG", help="draw quality over mean steps")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    args = parser.parse_args()
    for path, suffix in ((args.save, ".json"), (args.plot, ".png")):
        if path is not None:
            check_output_path(path, suffix)  # before the work, not after it
    torch.set_num_threads(1)  # a small model's products are over before a second thread has woken up
    result = evaluate(args)
    if args.save:
        save(result, args.save)
    sys.stdout.write("\n".join(report(result)) + "\n")
    if args.plot:
        draw(result, args.plot)
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
