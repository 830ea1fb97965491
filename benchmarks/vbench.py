"""VBench (arXiv 2311.17982) of a model: the videos of its prompt suite for each step policy, and their scores.

    python benchmarks/vbench.py --model MODEL --out out/vbench --policy fixed:4 --policy confidence:0.5
        --extended all_dimension_extended.txt --vbench-python vbench-env/bin/python

    OUT/fixed-4/videos/PROMPT-0.mp4         named as VBench looks for them; a video that is there is kept
    OUT/fixed-4/manifest.jsonl              a line per video: its text, seed, steps per chunk, seconds
    OUT/fixed-4/scores/DIMENSION_eval_results.json, DIMENSION.log

VBench runs in a process of its own on a GPU, a dimension at a time. How videos are sampled and scores are combined:
benchmarks/README.md. The last line of --json is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import format_table, positive_int
from benchmarks.common.environment import commit, machine
from benchmarks.scoring.vbench_scores import DIMENSIONS, FLICKERING, installed, score
from dsa_engine import Pipeline, pipeline_inputs
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import atomic_write
from dsa_engine.media.mp4 import Mp4Writer

# What papers say of themselves, on an H100; of DSA by two summaries of its full text: 23 evaluations per 7 blocks.
PAPERS = {
    "DSA (arXiv 2606.04432)": dict(mean_steps=2.29, fps=22.63, total=83.73, quality=None, semantic=None),
    "Self-Forcing (arXiv 2506.08009)": dict(mean_steps=4.0, fps=17.0, total=84.31, quality=85.07, semantic=81.28),
}
COLUMNS = ("mean_steps", "fps", "total", "quality", "semantic")

LONGEST = 255 - len(f".-99.mp4.{2**22}.part")  # bytes of a prompt whose video's temporary name a file system takes

INSTALL = """not scored: {python} has no vbench. To score these videos:
    python3 -m venv vbench-env
    vbench-env/bin/pip install torch torchvision "vbench>=0.1.5"
    vbench-env/bin/pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git
    {command} --vbench-python vbench-env/bin/python"""


@dataclass(frozen=True)
class Job:
    """What was asked for, checked. suite: prompts of the whole suite; entries: those chosen, with their dimensions;
    clips: what each video is generated from, as its manifest line begins; missing: by policy the clips that are not
    there yet; unscored: why there will be no scores, else None."""

    args: argparse.Namespace
    pipe: Pipeline
    suite: int
    entries: list[dict]
    clips: list[dict]
    missing: dict[str, list[dict]]
    unscored: str | None

    @property
    def dimensions(self) -> list[str]:
        """Of the entries, in the order of DIMENSIONS."""
        return [d for d in DIMENSIONS if any(d in entry["dimension"] for entry in self.entries)]


def folder(out: Path, policy: str) -> Path:
    return out / re.sub(r"[^\w.,-]", "-", policy)


def read_lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_json(path: Path) -> list | dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error


def read_suite(path: Path) -> list[dict]:
    """Entries {"prompt_en", "dimension": [...], and what else VBench needs} of a VBench_full_info.json, or of a text
    with a prompt per line. A prompt may come in several entries."""
    if path.suffix != ".json":
        return [{"prompt_en": line, "dimension": []} for line in read_lines(path)]
    suite = read_json(path)
    for i, entry in enumerate(suite):
        whole = isinstance(entry, dict) and {"prompt_en", "dimension"} <= entry.keys()
        if not whole or not set(entry["dimension"]) <= DIMENSIONS.keys():
            needed = f"must have a prompt_en and a dimension, a list of some of {', '.join(DIMENSIONS)}"
            raise ValueError(f"{path}: entry {i} is {str(entry)[:200]}; {needed}, as VBench_full_info.json has")
    return suite


def read_extended(path: Path, suite: Sequence[dict]) -> dict[str, str]:
    """The longer text of each prompt: a JSON object, or a text with a line per entry of the suite. Of a prompt with two
    entries the last text holds, as where the second video overwrites the first."""
    if path.suffix == ".json":
        return read_json(path)
    texts = read_lines(path)
    if len(texts) != len(suite):
        raise ValueError(f"{path}: {len(texts)} lines for a suite of {len(suite)} entries; must be as many")
    return {entry["prompt_en"]: text for entry, text in zip(suite, texts)}


def choose(suite: Sequence[dict], dimensions: Sequence[str] | None, limit: int | None) -> list[dict]:
    """The entries of these dimensions (None: all) and of the first `limit` prompts among them."""
    if dimensions is not None:
        suite = [e | {"dimension": [d for d in e["dimension"] if d in dimensions]} for e in suite]
        suite = [e for e in suite if e["dimension"]]
    kept = list(dict.fromkeys(e["prompt_en"] for e in suite))[:limit]
    return [e for e in suite if e["prompt_en"] in kept]


def clip_seed(seed: int, prompt: str, index: int) -> int:
    """A seed in [0, 2^64) for sample `index` of a prompt, whatever else is generated and in which order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {prompt}".encode()).digest()[:8], "big")


def all_clips(args: argparse.Namespace, pipe: Pipeline, suite: Sequence[dict], entries: Sequence[dict]) -> list[dict]:
    """Every sample of every prompt. Raises ValueError for a prompt that no file name can hold or without a text."""
    texts = None if args.extended is None else read_extended(args.extended, suite)
    samples: dict[str, int] = {}
    for entry in entries:
        prompt = entry["prompt_en"]
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > LONGEST:
            raise ValueError(f"prompt {prompt!r}: names a file, so it must have no / and at most {LONGEST} bytes")
        if texts is not None and not isinstance(texts.get(prompt), str):
            raise ValueError(f"--extended {args.extended}: has no text for {prompt!r}; every chosen prompt needs one")
        count = args.static_samples if FLICKERING in entry["dimension"] else args.samples
        samples[prompt] = max(count, samples.get(prompt, 0))
    common = {"model": pipe.name, "frames": args.frames or pipe.frames, "scale": args.scale}
    return [
        {"file": f"{prompt}-{i}.mp4", "text": texts[prompt] if texts else prompt}
        | {"seed": clip_seed(args.seed, prompt, i), **common}
        for prompt, count in samples.items()
        for i in range(count)
    ]


def read_manifest(path: Path) -> dict[str, dict]:
    """Its records by file name. A last line that was cut off is taken out, so that its video is generated again."""
    if not path.exists():
        return {}
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return {record["file"]: record for record in map(json.loads, whole)}


def missing_clips(directory: Path, clips: Sequence[dict]) -> list[dict]:
    """The clips to be generated. Raises ValueError where one is there that was generated from something else."""
    records, missing = read_manifest(directory / "manifest.jsonl"), []
    for clip in clips:
        path = directory / "videos" / clip["file"]
        if clip["file"] not in records or not path.exists():
            missing.append(clip)
            continue
        for key, value in clip.items():
            if (made := records[clip["file"]][key]) != value:
                raise ValueError(
                    f"{path}: was made with {key} {made!r}, not {value!r}; give another --out, or delete it"
                )
    return missing


def prepare(args: argparse.Namespace) -> Job:
    """Everything that can be wrong is found here, before the first video."""
    for dimension in args.dimensions or ():
        if dimension not in DIMENSIONS:
            raise ValueError(f"--dimensions {dimension}: must be some of {', '.join(DIMENSIONS)}")
    package = installed(args.vbench_python)
    if args.prompts is None and package is None:
        why = f"no prompts: {args.vbench_python} has no vbench package to take them from"
        raise ValueError(f"{why}; give --prompts FILE, VBench's VBench_full_info.json or a text with a prompt per line")
    suite = read_suite(path := args.prompts or package / "VBench_full_info.json")
    entries = choose(suite, args.dimensions, args.limit)
    if not entries:
        of = f" of --dimensions {' '.join(args.dimensions)}; a text file says none at all" if args.dimensions else ""
        raise ValueError(f"{path}: holds no prompt{of}")
    pipe = Pipeline.from_pretrained(args.model)
    if pipe.engine.text is None or pipe.engine.decoder is None:
        raise ValueError(f"--model {args.model}: must have a text encoder and a decoder, to turn prompts into pixels")
    for policy in args.policy:
        pipeline_inputs.resolve_policy(pipe.engine, policy)
    pipeline_inputs.latent_frames(pipe.engine, args.frames or pipe.frames)
    install = INSTALL.format(python=args.vbench_python, command=shlex.join(["python", *sys.argv]))
    says_none = not any(entry["dimension"] for entry in entries)
    reasons = {
        "not scored: --no-evaluate": args.no_evaluate,
        f"not scored: {path} says no dimensions; VBench_full_info.json does": says_none,
        install: package is None,
    }
    clips = all_clips(args, pipe, suite, entries)
    missing = {policy: missing_clips(folder(args.out, policy), clips) for policy in args.policy}
    unscored = next((why for why, holds in reasons.items() if holds), None)
    return Job(args, pipe, len({e["prompt_en"] for e in suite}), entries, clips, missing, unscored)


def generate(job: Job) -> None:
    """Make what is missing, one video at a time."""
    total = sum(map(len, job.missing.values()))
    if total:
        job.pipe.warmup()  # else the first video would take longer than the others
    with tqdm(total=total, unit="video") as bar:
        for policy, clips in job.missing.items():
            videos = folder(job.args.out, policy) / "videos"
            videos.mkdir(parents=True, exist_ok=True)
            if clips:
                shutil.rmtree(videos.parent / "scores", ignore_errors=True)  # they are of fewer videos
            for rest in videos.glob(".*.part"):  # of a run that was killed; VBench takes any file's suffix for all
                rest.unlink()
            for clip in clips:
                record = clip | make_video(job.pipe, clip, policy, videos / clip["file"])
                with (videos.parent / "manifest.jsonl").open("a", encoding="utf-8") as manifest:
                    manifest.write(json.dumps(record) + "\n")  # after the video, whole: the line says that it is there
                bar.update()


def make_video(pipe: Pipeline, clip: dict, policy: str, path: Path) -> dict:
    """Steps per chunk, and the model's seconds, without those of writing the file."""
    steps, start = [], time.perf_counter()
    with pipe.session(clip["text"], num_frames=clip["frames"], seed=clip["seed"], step_policy=policy) as session:
        seconds = time.perf_counter() - start
        with Mp4Writer(path, pipe.fps, clip["scale"]) as video:
            while not session.exhausted:
                chunk = session.next_chunk()
                seconds += chunk.timings["total"] / 1e3
                steps.append(chunk.steps)
                video.write(chunk.frames)
    return {"steps": steps, "seconds": seconds}


def figures(job: Job, policy: str) -> dict:
    """What the manifest says of a policy's videos, and their scores."""
    args, directory = job.args, folder(job.args.out, policy)
    manifest = read_manifest(directory / "manifest.jsonl")
    records = [manifest[clip["file"]] for clip in job.clips]
    steps = [n for record in records for n in record["steps"]]
    return {
        "videos": len(records),
        "mean_steps": sum(steps) / len(steps),
        "fps": sum(r["frames"] for r in records) / sum(r["seconds"] for r in records),
        "scores": None if job.unscored else score(args.vbench_python, directory, job.entries, job.dimensions),
    }


def assemble(job: Job) -> dict:
    """The JSON object."""
    args, device = job.args, job.pipe.engine.dit.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    found = {"benchmark": "vbench", "model": job.pipe.name, "prompts": len({e["prompt_en"] for e in job.entries})}
    found |= {"suite": job.suite, "dimensions": job.dimensions, "samples": args.samples}
    found |= {"static_samples": args.static_samples, "frames": args.frames or job.pipe.frames, "seed": args.seed}
    found |= {"extended": args.extended is not None}
    found |= {"policies": {policy: figures(job, policy) for policy in job.missing}, "papers": PAPERS}
    found |= {"date": time.strftime("%Y-%m-%d"), "machine": machine() | {"gpu": gpu}, "commit": commit()}
    return rounded(found)


def report(result: dict, unscored: str | None) -> list[str]:
    """The table that goes to stdout, and what one should know of it."""
    rows = {name: r | (r["scores"] or {}) for name, r in result["policies"].items()} | result["papers"]
    body = [[name, *("" if r.get(c) is None else f"{r[c]:.2f}" for c in COLUMNS)] for name, r in rows.items()]
    text = format_table([["", "steps", *COLUMNS[1:]], *body])
    if result["prompts"] < result["suite"]:
        text += ["", f"{result['prompts']} of the {result['suite']} prompts: no figures to set beside a paper's"]
    return text + (["", unscored] if unscored else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="as Pipeline.from_pretrained takes it")
    add("--out", type=Path, required=True, metavar="FOLDER", help="gets a folder for each policy")
    add("--policy", action="append", required=True, help="fixed:4, confidence:0.5, a preset, ...; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="VBench_full_info.json, or text (default: the vbench package's)")
    add("--extended", type=Path, metavar="FILE", help="the longer texts that the model is given")
    add("--samples", type=positive_int, default=5, help="videos per prompt; VBench scores the first 5")
    add("--static-samples", type=positive_int, default=25, help=f"videos per prompt of {FLICKERING}")
    add("--dimensions", nargs="+", metavar="DIMENSION", help="only prompts and scores of these")
    add("--limit", type=positive_int, metavar="N", help="only the first N prompts")
    add("--seed", type=int, default=0)
    add("--frames", type=positive_int, help="pixel frames per video (default: the model's own)")
    add("--scale", type=positive_int, default=1, help="each pixel becomes SCALE x SCALE pixels")
    add("--no-evaluate", action="store_true", help="make the videos, score nothing")
    add("--vbench-python", default=sys.executable, metavar="PYTHON", help="one that has vbench (default: this one)")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    args = parser.parse_args()
    try:
        job = prepare(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    torch.set_num_threads(job.pipe.cpu_threads)
    generate(job)
    result = assemble(job)
    sys.stdout.write("\n".join(report(result, job.unscored)) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    scored = {policy: r["scores"] for policy, r in result["policies"].items() if r["scores"]}
    failed = [f"{policy}, {d}: {why}" for policy, found in scored.items() for d, why in found["failed"].items()]
    if failed:
        sys.exit("\n".join(["VBench failed:", *failed]))


if __name__ == "__main__":
    main()
