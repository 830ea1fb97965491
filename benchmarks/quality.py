"""Quality over mean denoising steps of a model, on held-out clips of the shapes world, against what it has to beat.

    python benchmarks/quality.py --clips 512 --jobs 2 --save benchmarks/results/quality-shapes-cpu.json --plot curve.png
    python benchmarks/quality.py --clips 64 --chunks 16            # drift: valid by quarter of a 48-frame clip
    python benchmarks/quality.py --compare runs/control            # another model minus this one, paired by clip, at
                                                                   # fixed counts and each at its own presets
    python benchmarks/quality.py --brief --quantization fp8        # the same model in FP8 minus itself without
    python benchmarks/quality.py --brief --commit exit_step        # keys and values of the exit step, no clean pass

The rows, and what the JSON object holds: benchmarks/README.md. The last line of --json is that object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import complete, positive_int
from benchmarks.common.environment import commit, machine, save
from benchmarks.scoring.policy_rows import Clips, Job, Result, Source, chosen_jobs, curves, known_jobs, load, run
from benchmarks.scoring.psnr import psnr
from benchmarks.scoring.quality_report import claims, draw, report
from dsa_engine import Confidence, Fixed, Pipeline, pipeline_inputs
from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.config import COMMIT_MODES, ModelConfig
from dsa_engine.evaluation.rollouts import Table
from dsa_engine.evaluation.statistics import mean_interval
from dsa_engine.evaluation.summary import KINDS, compare, figures, head_figures, per_clip, rounded, versus
from dsa_engine.models.confidence import new_head
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import QUANTIZATIONS

TEACHER = "shapes-teacher"
WAN = "wan2.1-t2v-1.3b"
OTHER = "other "  # before the names of the rows of the model that is compared
PSNR_CLIPS = 64


def head_cost(source: Source, clips: Clips) -> dict[str, float | str]:
    """Size of the head, here and for Wan 1.3B, and its share of a step's time, one clip at a time on the CPU.

    Medians in the plain loop, where the head is a call of its own; else it is within the step's epilogue.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def timed(module: nn.Module) -> list[float]:
        times: list[float] = []
        module.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter()))
        module.register_forward_hook(lambda *_: times.append(times.pop() + time.perf_counter()))
        return times

    pipe = load.__wrapped__(source)  # one of its own, for the hooks stay
    engine, captions, policy = pipe.engine, clips.captions[:8], Fixed(pipe.max_steps)
    with torch.device("meta"):
        config = ModelConfig.preset(WAN)
        wan = size(new_head(config, engine.head.kind)) / size(CausalDiT(config))
    step, head = timed(engine.dit), timed(engine.head)
    height, width = pipeline_inputs.latent_size(engine, pipe.height, pipe.width)
    size_of = {"height": height, "width": width, "frames": clips.chunks * pipe.config.chunk_frames}
    for seed, clip in enumerate(captions):
        embeds = engine.encode([str(clip[0])])
        rollout = engine.rollout(embeds, policy=policy, seeds=[seed], config=pipe.config, **size_of)
        rollout.inputs = None
        for _ in clip:
            made = rollout.denoise()
            rollout.accept(made.latents, made.confidence)
        rollout.close()
    return {
        "kind": engine.head.kind,
        "parameters": size(engine.head),
        "percent_of_model": 100 * size(engine.head) / size(engine.dit),
        f"percent_of_{WAN}": 100 * wan,
        "step_ms": 1e3 * float(np.median(step)),
        "percent_of_step_time": 100 * float(np.median(head) / np.median(step)),
    }


def compared(args: argparse.Namespace) -> Source | None:
    """The model that is compared: --compare, or the same one, run another way."""
    if args.compare:
        return Source(args.compare, None, args.quantization, args.commit)
    if args.quantization or args.commit:
        return Source(args.model, args.head, args.quantization, args.commit)
    return None


def comparison(
    args: argparse.Namespace, pipe: Pipeline, clips: Clips, tables: dict[str, Table], others: dict[str, Result]
) -> dict | None:
    """The model that is compared: what it is, its rows by policy, and its PSNR where it is the same one."""
    other = compared(args)
    if other is None:
        return None
    rows, alike = {}, None
    for name, result in others.items():
        one, low, high = mean_interval(per_clip(tables[name]))
        valid = float(per_clip(result.table).mean())
        rows[name] = compare(tables[name], result.table) | {"valid_of": [one, valid], "inside": low <= valid <= high}
    if other.model == args.model:
        rounding = replace(other, quantization=None, commit=None, dtype=torch.bfloat16)
        variants = {"bfloat16": load(rounding), "as compared": load(other)}
        alike = {"clips": min(PSNR_CLIPS, clips.clips)} | psnr(pipe, variants, clips.captions[:PSNR_CLIPS], clips.seed)
    about = {name: getattr(other, name) for name in ("model", "quantization", "commit", "label")}
    return {**about, "rows": rows, "psnr": alike}


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
    if other := compared(args):
        config = load(other).config
        policies = {f"fixed:{n}": Fixed(n) for n in range(1, min(limit, len(config.steps)) + 1)}
        policies |= {name: Confidence(config.presets[name]) for name in presets if name in config.presets}
        jobs |= {OTHER + name: Job(other, policy) for name, policy in policies.items()}
    spawn = multiprocessing.get_context("spawn")  # forked workers would share torch's threads
    pool = ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) if args.jobs > 1 else nullcontext()
    with pool as workers, tqdm(total=len(jobs), unit="row") as bar:
        results = run(jobs, clips, workers, bar)
        more = chosen_jobs(source, results[f"fixed:{limit}"].trace, [default, *presets.values()], args.brief)
        bar.total += len(more)
        results |= run(more, clips, workers, bar)
    return assemble(args, pipe, clips, results)


def assemble(args: argparse.Namespace, pipe: Pipeline, clips: Clips, results: dict[str, Result]) -> dict:
    """The JSON object, from the results by name."""
    limit, presets, default = pipe.max_steps, pipe.config.presets, pipeline_inputs.default_threshold(pipe.engine)
    others = {name.removeprefix(OTHER): results.pop(name) for name in list(results) if name.startswith(OTHER)}
    tables = {name: r.table for name, r in results.items()}
    rows = {
        name: figures(r.table, limit, None if name == "teacher" else tables.get("teacher")) | {"seconds": r.seconds}
        for name, r in results.items()
    }

    def of(kind: str) -> dict[str, dict]:
        """Rows of a kind, by what stands after the colon."""
        return {name.partition(":")[2]: r for name, r in rows.items() if name.startswith(kind + ":")}

    fixed = {n: results[f"fixed:{n}"] for n in range(1, limit + 1)}
    against, curve = {f"fixed:{n}": fixed[n].table for n in (2, limit)}, curves(results, limit)
    named = {str(value): name for name, value in presets.items()}
    confidence = [
        {"threshold": float(value), "preset": named.get(value), **r}
        | {"versus": versus(tables[f"confidence:{value}"], against, curve)}
        for value, r in of("confidence").items()
    ]
    relative = {
        how: r | {"versus": versus(tables[f"relative:{how}"], against, curve)} for how, r in of("relative").items()
    }
    own = tables[f"confidence:{default}"]
    head = head_figures(fixed[limit].trace, [(r.confidence, r.table) for r in fixed.values()], own)
    by_policy = tables | {name: tables[f"confidence:{value}"] for name, value in presets.items()}
    teacher = {"model": args.teacher or TEACHER, "guidance": args.guidance} if "teacher" in rows else None
    found = {"benchmark": "quality", "model": pipe.name, "head_file": args.head and args.head.name}
    found |= {"clips": clips.clips, "chunks": clips.chunks, "seed": clips.seed, "brief": args.brief}
    found |= {"mix": {"hard": own.hard.mean(), **{kind: (own.kind == kind).mean() for kind in KINDS}}}
    found |= {"thresholds": {"default": default, **presets}}
    found |= {"fixed": {n: rows[f"fixed:{n}"] for n in fixed}, "confidence": confidence}
    found |= {"relative": relative}
    found["baselines"] = {
        "random": [{"p": float(p), **r} for p, r in of("random").items()],
        "by_index": [{"counts": [int(n) for n in c.split(",")], **r} for c, r in of("by_index").items()],
        "x0_change": [{"threshold": float(t), **r} for t, r in of("x0_change").items()],
    }
    found |= {"teacher": teacher and teacher | rows["teacher"], "ground_truth": rows["ground_truth"], **head}
    found |= {"head": head_cost(Source(args.model, args.head), clips), "claims": claims(confidence, head, limit)}
    found |= {"compare": comparison(args, pipe, clips, by_policy, others)}
    return rounded(found | {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "commit": commit()})


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
    add("--chunks", type=positive_int, default=4, help="chunks per clip (4 is the training length)")
    add("--seed", type=int, default=0, help="of the noise; the prompts are always the same")
    add("--jobs", type=positive_int, default=1, help="worker processes, each with one thread")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    add("--plot", type=Path, metavar="PNG", help="draw quality over mean steps")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    args = complete(parser.parse_args())
    torch.set_num_threads(1)  # a small model's GEMMs are over before a second thread has woken up
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
