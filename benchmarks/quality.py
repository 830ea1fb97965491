"""Quality over average steps of the shipped model, on held-out clips of the synthetic world.

For every fixed count and every named threshold: the share of valid frames (template fit, shape and colour mass right;
1.00 on ground truth), of wholly valid clips and of chunks that move as told, beside the mean steps of easy and hard
chunks. Hard: the first chunk, one after a cut, a jumping object. `passes` counts forwards a chunk, commit included.
The last line is one JSON object.

    python benchmarks/quality.py --clips 96 --save benchmarks/results/quality-shapes-cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dsa_engine import Confidence, Fixed, Pipeline
from dsa_engine.training.evaluate import held_out, quality, roll

COLUMNS = (
    "steps",
    "steps_easy",
    "steps_hard",
    "passes",
    "valid",
    "valid_easy",
    "valid_hard",
    "clip",
    "motion",
    "seconds",
)


def commit() -> str:
    """The repository's commit, with a + when it has uncommitted changes."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--chunks", type=int, default=4, help="chunks a clip (4 is the training length)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the prompts are always the same")
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    torch.set_num_threads(pipe.cpu_threads)
    captions = held_out(args.clips, args.chunks)
    policies = {f"fixed:{n}": Fixed(n) for n in range(1, pipe.max_steps + 1)}
    policies |= {name: Confidence(threshold) for name, threshold in pipe.config.presets.items()}
    rows = {}
    for name, policy in tqdm(policies.items(), desc="policies"):
        start = time.perf_counter()
        rolled = roll(pipe, captions, policy, seed=args.seed)
        seconds = time.perf_counter() - start
        rows[name] = {k: round(float(v), 4) for k, v in quality(captions, rolled).items()}
        rows[name] |= {"passes": rows[name]["steps"] + 1, "seconds": round(seconds, 2)}
        rows[name]["histogram"] = np.bincount(rolled.steps.ravel(), minlength=pipe.max_steps + 1)[1:].tolist()
    lines = [" ".join(f"{c:>10}" for c in ("policy", *COLUMNS))]
    lines += [" ".join([f"{name:>10}", *(f"{row[c]:>10.3f}" for c in COLUMNS)]) for name, row in rows.items()]
    result = {
        "benchmark": "quality",
        "date": time.strftime("%Y-%m-%d"),
        "model": pipe.name,
        "clips": args.clips,
        "chunks": args.chunks,
        "policies": rows,
        "thresholds": pipe.config.presets,
        "machine": machine(),
        "commit": commit(),
    }
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join(lines) + "\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
