"""Which head, trained how, with which rule? Heads of several students on held-out clips, paired, at equal evaluations.

    dsa-engine train --recipe paper --head token --out runs/shapes                        # and --head pooled
    dsa-engine train --recipe head --student paper-token --out runs/shapes                # and paper, joint
    python benchmarks/ablation.py --runs runs/shapes --jobs 2 --save ablation.json --plot ablation.png

Every head file that `--recipe head` has left for a student (`<runs>/head*/*.safetensors`) is run with thresholds
calibrated on other clips and with the relative rule, against fixed counts, random counts, counts by index, and the
change of the estimate. The rows, and what the JSON object holds: benchmarks/README.md. The last line is that object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import complete, positive_int
from benchmarks.common.environment import commit, machine, save
from benchmarks.scoring.ablation_report import RULE, THRESHOLD, draw, report
from benchmarks.scoring.policy_rows import Clips, Job, Result, Source, curves, known_jobs, load, run
from dsa_engine import Change, Confidence, Relative
from dsa_engine.evaluation import statistics
from dsa_engine.evaluation.rollouts import Table, Trace
from dsa_engine.evaluation.summary import compare, figures, rounded, versus

SPREAD = (1.25, 3.0)  # mean steps of two more thresholds beside a head's presets
CHANGES = (2.2, 2.8)  # mean steps of the change policy
REDUCES = ("min", "mean")  # of the relative rule
BINS = 10
TEACHER, TEACHER_STEPS = "shapes-teacher", 24  # whose chunks all rows are compared with (`distance`)


def brief_jobs(source: Source) -> dict[str, Job]:
    """The rows of one head with --brief: its middle preset and the relative rule."""
    threshold = load(source).config.presets["balanced"]
    return {f"{THRESHOLD}{threshold}": Job(source, Confidence(threshold)), f"{RULE}min": Job(source, Relative())}


def head_jobs(source: Source, seen: Trace) -> dict[str, Job]:
    """The rows of one head: its presets, two thresholds more, and the relative rule."""
    confidence = seen.confidence.min(axis=3).reshape(-1, seen.confidence.shape[2])
    thresholds = {*load(source).config.presets.values(), *statistics.spread(confidence, SPREAD)}
    jobs = {f"{THRESHOLD}{t}": Job(source, Confidence(t)) for t in sorted(thresholds)}
    return jobs | {f"{RULE}{how}": Job(source, Relative(frame_reduce=how)) for how in REDUCES}


def change_jobs(source: Source, seen: Trace) -> dict[str, Job]:
    stillness = -seen.change.max(axis=3).reshape(-1, seen.change.shape[2])
    stillness = np.pad(stillness, ((0, 0), (1, 0)), constant_values=-np.inf)  # nothing is known after step 1
    return {f"x0_change:{-t}": Job(source, Change(-t)) for t in statistics.spread(stillness, CHANGES)}


def signal(source: Source, seen: Trace, hard: np.ndarray) -> dict:
    """How good a head's signal is: ranks (AUC, Spearman), calibration, and whether it rises from step to step.

    calibration_error: mean over ten equal parts of the frames, by confidence, of |expected / true distance - 1|.
    """
    confidence, distance = seen.confidence[:, :, :-1], seen.distance
    expected = np.array(load(source).expected_error(confidence.ravel().tolist()))
    parts = np.array_split(np.argsort(confidence.ravel()), BINS)
    errors = [abs(expected[part].mean() / distance.ravel()[part].mean() - 1) for part in parts]
    by_step = np.median(seen.confidence.min(axis=3), axis=(0, 1))
    return {
        "auc_hard": statistics.auc(1 - seen.confidence[:, :, 0].min(axis=2), hard),
        "spearman": statistics.spearman(-confidence, distance),
        "spearman_by_step": [
            statistics.spearman(-confidence[:, :, k], distance[:, :, k]) for k in range(distance.shape[2])
        ],
        "calibration_error": float(np.mean(errors)),
        "median_confidence_by_step": by_step.tolist(),
        "rises": bool((np.diff(by_step) > 0).all()),
    }


def head_files(runs: Path, student: str) -> dict[str, Path]:
    folder = runs / ("head" if student == "joint" else f"head-{student}")
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def model_of(runs: Path, student: str) -> Path:
    return runs / ("model" if student == "joint" else f"model-{student}")


def curve_of(rows: dict[str, Result], fixed: dict[int, Table]) -> list[Table]:
    """A head's operating points: its thresholds, and the counts that thresholds of 0 and above 1 give."""
    ends = [fixed[1], fixed[max(fixed)]]
    return [*(r.table for name, r in rows.items() if name.startswith(THRESHOLD)), *ends]


def at_equal_steps(table: Table, curve: Sequence[Table]) -> dict | None:
    return versus(table, {}, {"it": curve})["it"]


def evaluate_student(
    args: argparse.Namespace, student: str, clips: Clips, workers, teacher: Table
) -> tuple[dict, dict[int, Table]]:
    """All rows of one student, its heads' signals, and the paired comparisons at equal mean steps."""
    model, files = str(model_of(args.runs, student)), head_files(args.runs, student)
    sources = {name: Source(model, path) for name, path in files.items()}
    first = next(iter(sources.values()))
    limit = load(first).max_steps
    known = known_jobs(first, clips, limit, args.brief)
    jobs = {name: job for name, job in known.items() if job.policy != "trace"}
    traced = dict(list(sources.items())[:1]) if args.brief else sources
    jobs |= {f"trace {name}": Job(source, "trace") for name, source in traced.items()}
    with tqdm(total=len(jobs), unit="row", desc=student) as bar:
        results = run(jobs, clips, workers, bar)
        traces = {name: results.pop(f"trace {name}") for name in traced}
        some = next(iter(traces.values()))
        results[f"fixed:{limit}"] = some
        more = {} if args.brief else change_jobs(first, some.trace)
        for name, source in sources.items():
            own_jobs = brief_jobs(source) if args.brief else head_jobs(source, traces[name].trace)
            more |= {f"{name} {row}": job for row, job in own_jobs.items()}
        bar.total += len(more)
        results |= run(more, clips, workers, bar)
    fixed = {n: results[f"fixed:{n}"].table for n in range(1, limit + 1)}
    own = {
        name: {row.removeprefix(name + " "): r for row, r in results.items() if row.startswith(name + " ")}
        for name in sources
    }
    baselines = {row: r for row, r in results.items() if " " not in row}
    others, against = curves(baselines, limit), {f"fixed:{n}": fixed[n] for n in (2, limit)}
    heads = {}
    for name, source in sources.items():
        presets = {str(value): preset for preset, value in load(source).config.presets.items()}
        rows = {}
        for row, result in own[name].items():
            rivals = {other: curve_of(rival, fixed) for other, rival in own.items() if other != name}
            own_curve = {"its thresholds": curve_of(own[name], fixed)} if row.startswith(RULE) else {}
            rows[row] = figures(result.table, limit, teacher) | {
                "preset": presets.get(row.removeprefix(THRESHOLD)),
                "versus": versus(result.table, against, others | rivals | own_curve),
                "seconds": result.seconds,
            }
        heads[name] = {
            "kind": load(source).engine.head.kind,
            "signal": None if args.brief else signal(source, traces[name].trace, traces[name].table.hard),
            "rows": rows,
        }
    found = {row: figures(r.table, limit, teacher) | {"seconds": r.seconds} for row, r in baselines.items()}
    return {"model": model, "baselines": found, "heads": heads}, fixed


def evaluate(args: argparse.Namespace) -> dict:
    students = [student for student in args.students if head_files(args.runs, student)]
    if not students:
        raise SystemExit(f"--runs {args.runs}: no head*/<kind>.safetensors of {', '.join(args.students)}")
    clips, start = Clips(args.clips, args.chunks, args.seed), time.perf_counter()
    spawn = multiprocessing.get_context("spawn")  # forked workers would share torch's threads
    pool = ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) if args.jobs > 1 else nullcontext()
    parts, fixed = {}, {}
    with pool as workers:
        with tqdm(total=1, unit="row", desc=TEACHER) as bar:
            job = Job(Source(TEACHER), "teacher", (("steps", TEACHER_STEPS),))
            teacher = run({"teacher": job}, clips, workers, bar)["teacher"].table
        for student in students:
            parts[student], fixed[student] = evaluate_student(args, student, clips, workers, teacher)
    one = students[0]
    between = {
        student: {f"fixed:{n}": compare(fixed[one][n], table) for n, table in fixed[student].items()}
        for student in students[1:]
    }
    found = {
        "benchmark": "ablation",
        "brief": args.brief,
        "clips": clips.clips,
        "chunks": clips.chunks,
        "seed": clips.seed,
    }
    found |= {"students": parts, f"minus {one}": between, "seconds": time.perf_counter() - start}
    return rounded(found | {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "commit": commit()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="the folder of the training runs")
    add(
        "--students",
        nargs="+",
        default=["joint", "paper", "paper-token"],
        help="stage folders; those without heads are left out",
    )
    add("--brief", action="store_true", help="only fixed counts, the preset `balanced` and relative:min; no signals")
    add("--clips", type=positive_int, default=512)
    add("--chunks", type=positive_int, default=4, help="chunks per clip")
    add("--seed", type=int, default=0, help="of the noise; the prompts are always the same")
    add("--jobs", type=positive_int, default=1, help="worker processes, each with one thread")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    add("--plot", type=Path, metavar="PNG", help="draw quality over evaluations of the network")
    args = complete(parser.parse_args())
    torch.set_num_threads(1)  # a small model's GEMMs are over before a second thread has woken up
    result = evaluate(args)
    if args.save:
        save(result, args.save)
    sys.stdout.write("\n".join(report(result)) + "\n")
    if args.plot:
        draw(result, args.plot)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
