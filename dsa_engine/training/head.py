"""Fits a confidence head to a frozen student: self-refinement, no labels, minutes on a CPU.

What is reliable? An estimate that further steps would not change. With x_k the estimate of a frame after k of S steps
and d_k = mean((x_k - x_S)^2), the head learns

    confidence = sigmoid(log(TOLERANCE / d_k) / SOFTNESS)

so 0.5 means: about TOLERANCE away from where the remaining steps would take it. Any distilled generator will do: it is
only rolled out, never changed.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dsa_engine.checkpoints.model_folder import save_head
from dsa_engine.evaluation.statistics import spearman
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import atomic_write
from dsa_engine.models.confidence import ConfidenceHead, PooledHead, new_head
from dsa_engine.pipeline import Pipeline
from dsa_engine.training import calibrate
from dsa_engine.training.head_dataset import HeadDataset, Prompts, check_prompts, collect, num_chunks

TOLERANCE = 0.1  # of latents whose variance is 1
SOFTNESS = 1.0
BATCH = 1024  # frames


def target(distance: Tensor) -> Tensor:
    """The confidence that a distance deserves, in (0, 1)."""
    return (torch.log(TOLERANCE / distance.clamp_min(1e-8)) / SOFTNESS).sigmoid()


def refine_loss(logit: Tensor, distance: Tensor) -> Tensor:
    """Mean binary cross-entropy of the confidences sigmoid(logit) against `target(distance)`; shapes alike."""
    return F.binary_cross_entropy_with_logits(logit.float(), target(distance))


@dataclass(frozen=True)
class Fit:
    """How well a head fits its rollouts.

    loss, held_out_loss: `refine_loss` over all frames that it was fitted to, and over those that it was not;
    spearman: rank correlation of confidence and -distance on the held-out ones, over all steps; spearman_by_step: after
    step 1, ..., S - 1 alone. None where either is constant.
    """

    loss: float
    held_out_loss: float
    spearman: float | None
    spearman_by_step: list[float | None]


def fit_head(pipe: Pipeline, rollouts: HeadDataset, held_out: HeadDataset, iterations: int = 600, seed: int = 0) -> Fit:
    """Train the pipeline's head in place, or a new one where it has none, on rollouts of that pipeline.

    AdamW with a falling rate on random batches of 1024 frames, in float32 on the pipeline's device; the head then takes
    the pipeline's dtype, and is measured as such. Raises FloatingPointError where the loss is not finite.
    """
    head = pipe.engine.head or untrained_head(pipe, seed)
    device, shape = pipe.engine.dit.device, rollouts.distance.shape
    trained = copy.deepcopy(head).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(iterations), desc="head", mininterval=1):
        # [C, N, S - 1, F]: frames after the last step, where nothing is left to refine, are never drawn
        index = torch.unravel_index(torch.randint(shape.numel(), (BATCH,), generator=generator), shape)
        features, distance = rollouts.features[index].to(device), rollouts.distance[index].to(device)
        loss = refine_loss(trained.logits(features), distance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        raise FloatingPointError(f"the head's loss is {loss.item()} after {iterations} iterations: must be finite")
    head.load_state_dict(trained.state_dict())
    pipe.engine.head = head
    return measure(head, rollouts, held_out)


def untrained_head(pipe: Pipeline, seed: int, kind: str = PooledHead.kind) -> ConfidenceHead:
    """A head of a kind (`confidence.HEADS`) for a pipeline, in its dtype and on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = new_head(pipe.engine.dit.config, kind)
    return head.to(pipe.engine.dit.device, pipe.engine.dit.dtype).requires_grad_(False).eval()


def measure(head: ConfidenceHead, rollouts: HeadDataset, held_out: HeadDataset) -> Fit:
    """A head on the rollouts that it was fitted to and on others."""

    def rank_correlation(logit: Tensor, distance: Tensor) -> float | None:
        value = spearman(logit.numpy(), -distance.numpy())
        return None if np.isnan(value) else value

    own, other = (calibrate.logits(head, dataset)[:, :, :-1] for dataset in (rollouts, held_out))
    return Fit(
        loss=refine_loss(own, rollouts.distance).item(),
        held_out_loss=refine_loss(other, held_out.distance).item(),
        spearman=rank_correlation(other, held_out.distance),
        spearman_by_step=[rank_correlation(other[:, :, k], held_out.distance[:, :, k]) for k in range(other.shape[2])],
    )


def train_head(
    pipe: Pipeline,
    prompts: Prompts,
    out: str | Path,
    *,
    chunks: int | None = None,
    size: tuple[int, int] | None = None,
    clips: int | None = None,
    held_out: float = 0.25,
    batch: int = 1,
    seed: int = 0,
    iterations: int = 600,
) -> dict[str, Any]:
    """Give a pipeline a confidence head: roll out, fit, calibrate, and write it all to the folder `out`.

    For Wan's 1.3B a clip of 21 latent frames holds 6 GB of cache on the device during its rollout, and 1.5 MB of
    features in memory afterwards. The pipeline has the head, its thresholds and its calibration afterwards.

    Args:
        pipe: the pipeline; without a head it gets a new one.
        prompts: as for `collect`.
        out: folder for `head.safetensors` (for `Pipeline.from_pretrained(model, head=...)`), `head.json` (the report),
            `head.png`, and the rollouts in `out/rollouts`: run again, those that are there are read.
        chunks: as for `collect`.
        size: as for `collect`.
        clips: rollouts (default: one per prompt; more go round the prompts again, with other noise).
        held_out: share of the prompts that the head is not fitted to, but measured and calibrated on.
        batch: clips that are rolled out together.
        seed: of noise, split and fit.
        iterations: of the fit.

    Returns:
        The report.
    """
    out, chunks = Path(out), check_prompts(prompts, chunks, num_chunks(pipe))
    order, held = split(len(prompts), clips, held_out, seed)
    start, folder = time.perf_counter(), out / "rollouts"
    dataset = collect(pipe, prompts, chunks=chunks, size=size, order=order, batch=batch, seed=seed, folder=folder)
    rolled = time.perf_counter()
    fitted, other = dataset[~held], dataset[held]
    fit = fit_head(pipe, fitted, other, iterations, seed)
    table, by_step = set_thresholds(pipe, other), calibrate.confidence_by_step(pipe.engine.head, other)
    facts = {
        "model": pipe.name,
        **asdict(fit),
        "presets": {
            name: {"threshold": threshold, "mean_steps": calibrate.mean_steps(by_step, threshold)}
            for name, threshold in pipe.config.presets.items()
        },
        "calibration": table,
        "prompts": len(prompts),
        "clips": {"fitted": len(fitted), "held_out": len(other)},
        "chunks": chunks,
        "iterations": iterations,
        "seed": seed,
        "seconds": {"rollouts": rolled - start, "fit": time.perf_counter() - rolled},
        "machine": machine(pipe.engine.dit.device),
    }
    report = rounded(facts, digits=6)
    save_head(out / "head.safetensors", pipe.engine.head, pipe.engine.dit.config, pipe.config, pipe.calibration)
    with atomic_write(out / "head.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n")
    draw_head(out / "head.png", table, by_step, pipe.config.presets)
    return report


def split(prompts: int, clips: int | None, share: float, seed: int) -> tuple[list[int], Tensor]:
    """Which prompt each clip shows, and which clips are held out (bool [clips]): all those of some prompts."""
    held = round(share * prompts)
    if not 0 < held < prompts:
        hint = f"nearest is {min(max(held, 1), prompts - 1) / prompts:g}" if prompts > 1 else "give at least 2 prompts"
        raise ValueError(
            f"held_out={share} of {prompts} prompts is {held}: must be at least 1 and leave at least 1; {hint}"
        )
    clips = prompts if clips is None else clips
    if clips < prompts:
        raise ValueError(f"clips={clips}: must be at least one per prompt; nearest is {prompts}")
    mixed = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed)).tolist()  # neighbours may be alike
    index = torch.arange(clips) % prompts
    return [mixed[i] for i in index], index < held


def set_thresholds(pipe: Pipeline, held_out: HeadDataset) -> list[dict[str, float]]:
    """Calibrate the pipeline's head on rollouts that it was not fitted to; returns `calibrate.calibration`'s table.

    The pipeline then has the presets fast, balanced and quality, the middle one as its default, and a calibration.
    """
    logit = calibrate.logits(pipe.engine.head, held_out)[:, :, :-1]
    table = calibrate.calibration(logit.sigmoid().numpy(), held_out.distance.numpy())
    presets = calibrate.thresholds(calibrate.confidence_by_step(pipe.engine.head, held_out))
    pipe.engine.config = replace(pipe.config, presets=presets, threshold=presets["balanced"])
    pipe.calibration = tuple((row["confidence"], row["expected"]) for row in table)
    return table


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for a report."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def draw_head(
    path: Path, table: Sequence[Mapping[str, float]], by_step: np.ndarray, presets: Mapping[str, float]
) -> None:
    """A PNG of a head: true distance over confidence, and the steps that each preset takes.

    table: as `calibrate.calibration` gives it; by_step [chunks, S]: as `calibrate.confidence_by_step`.
    """
    from matplotlib.figure import Figure

    figure = Figure((9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    confidence = torch.linspace(0.01, 0.99, 99)
    distance = TOLERANCE * torch.exp(-SOFTNESS * confidence.logit())  # the inverse of `target`
    left.plot(confidence, distance, color="#9aa5b1", linestyle=":", label="the head's target")
    points = {name: [row[name] for row in table] for name in ("confidence", "distance", "expected")}
    left.plot(points["confidence"], points["expected"], color="#08519c", label="calibration")
    left.plot(points["confidence"], points["distance"], "o", color="#d9480f", markersize=5, label="held-out frames")
    left.set(xlim=(0, 1), yscale="log", xlabel="confidence", ylabel="mean squared distance to the last step")
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    steps, width = np.arange(1, by_step.shape[1] + 1), 0.8 / len(presets)
    for i, (name, threshold) in enumerate(presets.items()):
        taken = calibrate.steps_taken(by_step, threshold)
        share = [(taken == step).mean() for step in steps]
        label = f"{name}: {threshold:g}, {taken.mean():.2f} steps per chunk"
        right.bar(steps + (i - (len(presets) - 1) / 2) * width, share, width, label=label)
    room = 1.35 * right.get_ylim()[1]  # for the legend above the bars
    right.set(xlabel="denoising steps", ylabel="share of the chunks", xticks=steps, ylim=(0, room))
    right.legend(frameon=False, fontsize=8)
    with atomic_write(path) as part:
        figure.savefig(part, format="png")
