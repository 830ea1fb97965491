"""Scores by the vbench package, in a process of its own: it pins old libraries and needs a GPU."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dsa_engine.files import atomic_write

# dimension: (low, high, weight), the ends of its scale and its share, as of VBench 0.1.5, scripts/constant.py
PLAIN = (0.0, 1.0, 1.0)
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    **dict.fromkeys(("aesthetic_quality", "imaging_quality"), PLAIN),
}
SEMANTIC = {
    **dict.fromkeys(("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"), PLAIN),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    **dict.fromkeys(("temporal_style", "overall_consistency"), (0.0, 0.364, 1.0)),
}
DIMENSIONS = QUALITY | SEMANTIC
FLICKERING = "temporal_flickering"

SUITE = "prompts.json"  # in the folder of the scores: what they are of

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


def installed(python: str) -> Path | None:
    """The folder of the vbench package that an interpreter would import, found without importing it."""
    if shutil.which(python) is None:
        raise ValueError(f"--vbench-python {python}: no such program; give a Python that has vbench")
    found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found).parent if found else None


def combine(scores: dict[str, float]) -> dict[str, float | None]:
    """total, quality and semantic in percent from the scores of the dimensions in [0, 1]; None where one is missing."""

    def mean(scales: dict[str, tuple[float, float, float]]) -> float | None:
        if not scales.keys() <= scores.keys():
            return None
        parts = [w * (scores[d] - low) / (high - low) for d, (low, high, w) in scales.items()]
        return 100 * sum(parts) / sum(w for _, _, w in scales.values())

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    return {"total": total, "quality": quality, "semantic": semantic}


class ScoringFailed(Exception):
    """VBench could not score a dimension."""


def call(python: str, code: str, args: Sequence[str | Path], log: Path) -> None:
    with log.open("a") as out:
        run = subprocess.run([python, "-c", code, *map(str, args)], stdout=out, stderr=subprocess.STDOUT)
    if run.returncode:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise ScoringFailed(f"{last or 'no output'} (exit status {run.returncode}, {log})")


def score_dimension(python: str, dimension: str, videos: Path, out: Path) -> float:
    """One dimension's score in [0, 1]; VBench is asked only where it was not scored before."""
    result, log, still = out / f"{dimension}_eval_results.json", out / f"{dimension}.log", out / "still"
    if not result.exists():
        log.unlink(missing_ok=True)
        if dimension == FLICKERING:  # camera and object motion would count as flicker
            shutil.rmtree(still, ignore_errors=True)
            call(python, FILTER, ["static_filter", "--videos_path", videos, "--result_path", still], log)
            videos = still / "filtered_videos"
            if not any(videos.glob("*.mp4")):
                raise ScoringFailed(f"VBench's static filter left no video; try more --static-samples ({log})")
        call(python, SCORE, [videos, out, out / SUITE, dimension], log)
    if not math.isfinite(value := json.loads(result.read_text())[dimension][0]):
        raise ScoringFailed(f"the score is {value} ({result})")
    return float(value)


def score(python: str, folder: Path, entries: Sequence[dict], dimensions: Sequence[str]) -> dict:
    """{"total", "quality", "semantic", "dimensions": scores, "failed": what VBench said} of the videos
    in a policy's folder. entries: of the prompt suite."""
    videos, out = (folder.resolve() / name for name in ("videos", "scores"))
    text = json.dumps(entries, indent=1)
    if not (out / SUITE).exists() or (out / SUITE).read_text() != text:  # older scores are of other prompts
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with atomic_write(out / SUITE) as temporary:
            temporary.write_text(text)
    scores, failed = {}, {}
    for dimension in tqdm(dimensions, unit="dimension", desc=folder.name):
        try:
            scores[dimension] = score_dimension(python, dimension, videos, out)
        except ScoringFailed as error:  # the others are still worth having
            failed[dimension] = str(error)
    return {**combine(scores), "dimensions": scores, "failed": failed}
