"""VBench (arXiv 2311.17982) of a model: the videos of its prompt suite for each step policy, and their scores.

The videos are named and laid out as VBench looks for them, the index counting the samples of a prompt from 0:

    OUT/fixed-4/videos/PROMPT-0.mp4         5 of a prompt; 25 where temporal_flickering is asked of it, because VBench
                                            keeps only the first 5 still ones of those
    OUT/fixed-4/manifest.jsonl              a line a video: its text, seed, steps a chunk, seconds
    OUT/fixed-4/scores/DIMENSION_eval_results.json, DIMENSION.log

A run that was cut off goes on where it stopped: a video that is in its folder and in the manifest is kept; one that was
made from another text, seed, model, length or scale is an error. Seeds follow from --seed, the prompt and the index, so
they are the same for every policy and in any order. Prompts and dimensions are those of the installed vbench package,
of a VBench_full_info.json, or of a text with a prompt a line, whose videos cannot be scored, as it says no dimensions.
--extended gives the model a longer text than the file is named by, as Self-Forcing does with its
prompts/vbench/all_dimension_extended.txt: a text with a line for each entry of the suite, or a JSON object.

VBench runs in a process of its own (--vbench-python: it pins old libraries) on a GPU, a dimension at a time; one that
was scored after the last change of its videos is not scored again. Of the scores s of the dimensions, in percent:

    quality, semantic = 100 sum w (s - low) / (high - low) / sum w        total = (4 quality + semantic) / 5

(VBench's scripts/cal_final_score.py and constant.py). That script counts a dimension that was not scored as 0; here
what needs it is null. steps: mean denoising steps a chunk. fps: frames made in a second, from the text to pixels in
memory, one video at a time. The scores of Self-Forcing's paper are those of its longer texts. The last line of --json
is one JSON object.

    python benchmarks/vbench.py --model MODEL --out out/vbench --policy fixed:4 --policy confidence:0.5
        --extended all_dimension_extended.txt --vbench-python vbench-env/bin/python
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
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
from dsa_engine import (
    Pipeline,
    pipeline_inputs,  # noqa: E402
)
from dsa_engine.evaluation.summary import rounded  # noqa: E402
from dsa_engine.files import atomic_write  # noqa: E402
from dsa_engine.media.mp4 import Mp4Writer  # noqa: E402

# dimension: (low, high, weight), the ends of its scale and its share, as of VBench 0.1.5, scripts/constant.py
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = QUALITY | SEMANTIC
FLICKERING = "temporal_flickering"

# What papers say of themselves, on an H100. Of DSA only the abstract was at hand, which has no score.
PAPERS = {
    "DSA (arXiv 2606.04432)": dict(mean_steps=None, fps=22.63, total=None, quality=None, semantic=None),
    "Self-Forcing (arXiv 2506.08009)": dict(mean_steps=4.0, fps=17.0, total=84.31, quality=85.07, semantic=81.28),
}
COLUMNS = ("mean_steps", "fps", "total", "quality", "semantic")

LONGEST = 255  # bytes of a file name on the usual file systems
AROUND = len(f".-99.mp4.{2**22}.part")  # what a video's name has beside the prompt while it is being written

# Run by --vbench-python. Without "" on the path: `vbench` must not be this file or a folder one happens to stand in.
PATH = "import sys; sys.path = [p for p in sys.path if p]\n"
FIND = PATH + "from importlib.util import find_spec; found = find_spec('vbench'); print(found and found.origin or '')"
FILTER = PATH + (  # the filter takes it for granted that the weights of dynamic_degree have been fetched
    "from vbench.utils import init_submodules; init_submodules(['dynamic_degree'])\n"
    "from vbench.cli.vbench import main; main()"
)
SCORE = PATH + (
    "import torch; from vbench import VBench; videos, out, suite, dimension = sys.argv[1:]\n"
    "VBench(torch.device('cuda'), suite, out).evaluate(videos, dimension, dimension_list=[dimension])"
)
INSTALL = """not scored: {python} has no vbench. To score these videos:
    python3 -m venv vbench-env
    vbench-env/bin/pip install torch torchvision
    vbench-env/bin/pip install "vbench>=0.1.5"
    vbench-env/bin/pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git
    {command} --vbench-python vbench-env/bin/python"""


@dataclass(frozen=True)
class Clip:
    """A video to be made: sample `index` of a prompt, which names the file; the model is given `text`."""

    prompt: str
    index: int
    text: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.prompt}-{self.index}.mp4"


@dataclass(frozen=True)
class Job:
    """What was asked for, checked. suite: prompts of the whole suite; entries: those chosen, with their dimensions;
    missing: for each policy the clips that are not there yet; unscored: why there will be no scores, else None."""

    args: argparse.Namespace
    pipe: Pipeline
    suite: int
    entries: list[dict]
    clips: list[Clip]
    frames: int
    missing: dict[str, list[Clip]]
    unscored: str | None

    @property
    def dimensions(self) -> list[str]:
        """Of the entries, in the order of DIMENSIONS."""
        asked = {d for entry in self.entries for d in entry["dimension"]}
        return [d for d in DIMENSIONS if d in asked]


def folder(out: Path, policy: str) -> Path:
    return out / re.sub(r"[^\w.,-]", "-", policy)


def installed(python: str) -> Path | None:
    """The folder of the vbench package that an interpreter would import, found without importing it."""
    if shutil.which(python) is None:
        raise ValueError(f"--vbench-python {python}: no such program; give a Python that has vbench")
    found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found).parent if found else None


def lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_json(path: Path, kind: type) -> list | dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}; must be a {kind.__name__}")
    return value


def read_suite(path: Path) -> list[dict]:
    """Entries {"prompt_en", "dimension": [...], and what else VBench needs} of a VBench_full_info.json, or of a text
    with a prompt a line. A prompt may come in several entries."""
    if path.suffix != ".json":
        return [{"prompt_en": line, "dimension": []} for line in lines(path)]
    suite = read_json(path, list)
    for i, entry in enumerate(suite):
        whole = isinstance(entry, dict) and {"prompt_en", "dimension"} <= entry.keys()
        if not whole or not set(entry["dimension"]) <= DIMENSIONS.keys():
            raise ValueError(
                f"{path}: entry {i} is {str(entry)[:200]}; must have a prompt_en and a dimension, "
                f"a list of some of {', '.join(DIMENSIONS)}, as VBench_full_info.json has"
            )
    return suite


def read_extended(path: Path, suite: Sequence[dict]) -> dict[str, str]:
    """The longer text of each prompt: a JSON object, or a text with a line for each entry of the suite. Of a prompt
    with two entries the last text holds, as where the second video overwrites the first."""
    if path.suffix == ".json":
        return read_json(path, dict)
    texts = lines(path)
    if len(texts) != len(suite):
        raise ValueError(f"{path}: {len(texts)} lines for a suite of {len(suite)} entries; must be as many")
    return {entry["prompt_en"]: text for entry, text in zip(suite, texts)}


def choose(suite: Sequence[dict], dimensions: Sequence[str] | None, limit: int | None) -> list[dict]:
    """The entries of these dimensions (None: all) and of the first `limit` prompts among them."""
    if dimensions is not None:
        suite = [e | {"dimension": [d for d in e["dimension"] if d in dimensions]} for e in suite]
        suite = [e for e in suite if e["dimension"]]
    kept = set(list(dict.fromkeys(e["prompt_en"] for e in suite))[:limit])
    return [e for e in suite if e["prompt_en"] in kept]


def clip_seed(seed: int, prompt: str, index: int) -> int:
    """A seed in [0, 2^64) for sample `index` of a prompt, whatever else is made and in which order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {prompt}".encode()).digest()[:8], "big")


def clips_of(entries: Sequence[dict], texts: dict[str, str] | None, args: argparse.Namespace) -> list[Clip]:
    """Every sample of every prompt. Raises ValueError for a prompt that no file name can hold or without a text."""
    samples: dict[str, int] = {}
    for entry in entries:
        prompt = entry["prompt_en"]
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > LONGEST - AROUND:
            raise ValueError(
                f"prompt {prompt!r}: VBench looks for a file of this name, so it must have no / "
                f"and at most {LONGEST - AROUND} bytes"
            )
        if texts is not None and not isinstance(texts.get(prompt), str):
            raise ValueError(f"--extended {args.extended}: has no text for {prompt!r}; every chosen prompt needs one")
        wanted = args.static_samples if FLICKERING in entry["dimension"] else args.samples
        samples[prompt] = max(wanted, samples.get(prompt, 0))
    return [
        Clip(prompt, i, texts[prompt] if texts else prompt, clip_seed(args.seed, prompt, i))
        for prompt, n in samples.items()
        for i in range(n)
    ]


def read_manifest(path: Path) -> dict[str, dict]:
    """Its records by file name. A last line that was cut off is taken out, so that its video is made again."""
    if not path.exists():
        return {}
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return {record["file"]: record for record in map(json.loads, whole)}


def source(clip: Clip, pipe: Pipeline, frames: int, scale: int) -> dict:
    """What a video is made from: the part of its record that has to be the same for it to be kept."""
    return {"text": clip.text, "seed": clip.seed, "model": pipe.name, "frames": frames, "scale": scale}


def not_there(place: Path, clips: Sequence[Clip], pipe: Pipeline, frames: int, scale: int) -> list[Clip]:
    """The clips to be made. Raises ValueError where one is there that was made from something else."""
    records, videos = read_manifest(place / "manifest.jsonl"), place / "videos"
    there = set(os.listdir(videos)) & set(records) if videos.is_dir() else set()
    for clip in clips:
        wanted = source(clip, pipe, frames, scale)
        differs = [k for k, v in wanted.items() if clip.file in there and records[clip.file][k] != v]
        if differs:
            k = differs[0]
            raise ValueError(
                f"{videos / clip.file}: was made with {k} {records[clip.file][k]!r}, now asked for is {wanted[k]!r}; "
                "give another --out, or delete that folder"
            )
    return [clip for clip in clips if clip.file not in there]


def prepare(args: argparse.Namespace) -> Job:
    """Everything that can be wrong is found here, before the first video."""
    for dimension in args.dimensions or ():
        if dimension not in DIMENSIONS:
            raise ValueError(f"--dimensions {dimension}: must be some of {', '.join(DIMENSIONS)}")
    package = installed(args.vbench_python)
    if args.prompts is None and package is None:
        raise ValueError(
            f"no prompts: {args.vbench_python} has no vbench package to take them from; give --prompts FILE, the "
            "VBench_full_info.json of github.com/Vchitect/VBench or a text with a prompt a line"
        )
    path = args.prompts or package / "VBench_full_info.json"
    suite = read_suite(path)
    entries = choose(suite, args.dimensions, args.limit)
    if not entries:
        of = f" of --dimensions {' '.join(args.dimensions)}; a text file says none at all" if args.dimensions else ""
        raise ValueError(f"{path}: holds no prompt{of}")
    texts = None if args.extended is None else read_extended(args.extended, suite)
    clips = clips_of(entries, texts, args)

    pipe = Pipeline.from_pretrained(args.model)
    if pipe.engine.text is None or pipe.engine.decoder is None:
        raise ValueError(f"--model {args.model}: must have a text encoder and a decoder, to turn prompts into pixels")
    for policy in args.policy:
        pipeline_inputs.resolve_policy(pipe.engine, policy)
    frames = args.frames or pipe.frames
    pipeline_inputs.latent_frames(pipe.engine, frames)
    missing = {p: not_there(folder(args.out, p), clips, pipe, frames, args.scale) for p in dict.fromkeys(args.policy)}
    unscored = None
    if args.no_evaluate:
        unscored = "not scored: --no-evaluate"
    elif not any(entry["dimension"] for entry in entries):
        unscored = f"not scored: {path} says no dimensions; VBench_full_info.json does"
    elif package is None:
        unscored = INSTALL.format(python=args.vbench_python, command=shlex.join(["python", *sys.argv]))
    return Job(args, pipe, len({e["prompt_en"] for e in suite}), entries, clips, frames, missing, unscored)


def generate(job: Job) -> None:
    """Make what is missing, one video at a time."""
    total = sum(map(len, job.missing.values()))
    if total:
        job.pipe.warmup()  # else the first video would take longer than the others
    with tqdm(total=total, unit="video") as bar:
        for policy, clips in job.missing.items():
            bar.set_postfix_str(policy)
            place = folder(job.args.out, policy)
            (place / "videos").mkdir(parents=True, exist_ok=True)
            for rest in (place / "videos").glob(".*.part"):  # of a run that was killed; VBench takes the suffix of any
                rest.unlink()  # one file of the folder for that of all
            with (place / "manifest.jsonl").open("a", encoding="utf-8") as manifest:
                for clip in clips:
                    made = make(job, clip, policy, place / "videos" / clip.file)
                    # after the video, at once and whole: a line stands for a video that is there
                    manifest.write(json.dumps(made) + "\n")
                    manifest.flush()
                    bar.update()


def make(job: Job, clip: Clip, policy: str, path: Path) -> dict:
    """Write one video; its record. seconds are those of the model, without writing the file."""
    pipe, steps, start = job.pipe, [], time.perf_counter()
    with pipe.session(clip.text, num_frames=job.frames, seed=clip.seed, step_policy=policy) as session:
        seconds = time.perf_counter() - start
        with Mp4Writer(path, pipe.fps, job.args.scale) as video:
            while not session.exhausted:
                chunk = session.next_chunk()
                seconds += chunk.timings["total"] / 1e3
                steps.append(chunk.steps)
                video.write(chunk.frames)
    return {"file": clip.file, **source(clip, pipe, job.frames, job.args.scale), "steps": steps, "seconds": seconds}


def combine(found: dict[str, float]) -> dict[str, float | None]:
    """total, quality and semantic in percent from the scores of the dimensions in [0, 1]; None where one is missing."""

    def mean(scales: dict[str, tuple[float, float, float]]) -> float | None:
        if not scales.keys() <= found.keys():
            return None
        parts = [w * (found[d] - low) / (high - low) for d, (low, high, w) in scales.items()]
        return 100 * sum(parts) / sum(w for _, _, w in scales.values())

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    return {"total": total, "quality": quality, "semantic": semantic}


class Failed(Exception):
    """VBench could not score a dimension."""


def call(python: str, code: str, args: Sequence[str | Path], log: Path) -> None:
    with log.open("a") as out:
        run = subprocess.run([python, "-c", code, *map(str, args)], stdout=out, stderr=subprocess.STDOUT)
    if run.returncode:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise Failed(f"{last or 'no output'} (exit status {run.returncode}, {log})")


def score_dimension(python: str, dimension: str, videos: Path, out: Path, suite: Path, inputs: Sequence[Path]) -> float:
    """One dimension's score in [0, 1], as VBench finds it or has found it since its inputs last changed."""
    result, log = out / f"{dimension}_eval_results.json", out / f"{dimension}.log"
    newest = max(path.stat().st_mtime_ns for path in inputs)
    if not result.exists() or result.stat().st_mtime_ns < newest:
        log.unlink(missing_ok=True)
        if dimension == FLICKERING:  # camera and object motion would count as flicker
            still = out / "still"
            shutil.rmtree(still, ignore_errors=True)
            call(python, FILTER, ["static_filter", "--videos_path", videos, "--result_path", still], log)
            videos = still / "filtered_videos"
            if not any(videos.glob("*.mp4")):
                raise Failed(f"VBench's static filter left no video; more --static-samples may have some ({log})")
        call(python, SCORE, [videos, out, suite, dimension], log)
    value = json.loads(result.read_text())[dimension][0]
    if not math.isfinite(value):
        raise Failed(f"the score is {value} ({result})")
    return float(value)


def score(job: Job, policy: str) -> dict:
    """{"total", "quality", "semantic", "dimensions": scores, "failed": what VBench said} of a policy's videos."""
    place = folder(job.args.out, policy).resolve()
    out, videos = place / "scores", place / "videos"
    out.mkdir(exist_ok=True)
    suite, entries = out / "prompts.json", json.dumps(job.entries, indent=1)
    if not suite.exists() or suite.read_text() != entries:  # only then: what was scored before it is out of date
        with atomic_write(suite) as temporary:
            temporary.write_text(entries)
    inputs = [suite, *(videos / clip.file for clip in job.clips)]
    found, failed = {}, {}
    for dimension in tqdm(job.dimensions, unit="dimension", desc=policy):
        try:
            found[dimension] = score_dimension(job.args.vbench_python, dimension, videos, out, suite, inputs)
        except Failed as error:  # the others are still worth having
            failed[dimension] = str(error)
    return {**combine(found), "dimensions": found, "failed": failed}


def row(job: Job, policy: str) -> dict:
    """What the manifest says of a policy's videos, and their scores."""
    records = read_manifest(folder(job.args.out, policy) / "manifest.jsonl")
    made = [records[clip.file] for clip in job.clips]
    steps = [n for record in made for n in record["steps"]]
    return {
        "videos": len(made),
        "mean_steps": sum(steps) / len(steps),
        "fps": sum(r["frames"] for r in made) / sum(r["seconds"] for r in made),
        "scores": None if job.unscored else score(job, policy),
    }


def measure(job: Job) -> dict:
    """The object that the benchmark is for."""
    args, device = job.args, job.pipe.engine.dit.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return rounded(
        {
            "benchmark": "vbench",
            "model": job.pipe.name,
            "prompts": len({e["prompt_en"] for e in job.entries}),
            "suite": job.suite,
            "dimensions": job.dimensions,
            "samples": args.samples,
            "static_samples": args.static_samples,
            "frames": job.frames,
            "seed": args.seed,
            "extended": args.extended is not None,
            "policies": {policy: row(job, policy) for policy in job.missing},
            "papers": PAPERS,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | {"gpu": gpu},
            "commit": commit(),
        }
    )


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
    add("--samples", type=positive_int, default=5, help="videos a prompt; VBench scores the first 5")
    add("--static-samples", type=positive_int, default=25, help=f"videos a prompt of {FLICKERING}")
    add("--dimensions", nargs="+", metavar="DIMENSION", help="only prompts and scores of these")
    add("--limit", type=positive_int, metavar="N", help="only the first N prompts")
    add("--seed", type=int, default=0)
    add("--frames", type=positive_int, help="pixel frames a video (default: the model's own)")
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
    result = measure(job)
    sys.stdout.write("\n".join(report(result, job.unscored)) + "\n")
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    scored = {policy: r["scores"] for policy, r in result["policies"].items() if r["scores"]}
    failed = [f"{policy}, {d}: {why}" for policy, found in scored.items() for d, why in found["failed"].items()]
    if failed:
        sys.exit("\n".join(["VBench failed:", *failed]))


if __name__ == "__main__":
    main()
