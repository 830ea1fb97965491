"""`dsa-engine info`: sizes, schedule, cache, memory and prompts of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dsa_engine.checkpoints import key_maps
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.cli.options import Result, add_family, add_quantization, table
from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.models import memory_estimate, training_memory
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3, QUANTIZATIONS
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.schedule import Schedule
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.shapes.world import EXAMPLE, GRAMMAR

WAN = tuple(name for name in PRESETS if name.startswith("wan"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "as for generate, or a preset without weights: " + ", ".join(WAN)
    parser.add_argument("model", nargs="?", default="shapes", help=text)
    add_family(parser)
    add_quantization(parser)
    parser.add_argument("--head", metavar="FILE", help="another confidence head: a file, or one that the model has")


def run(args: argparse.Namespace) -> Result:
    """A model as `generate` loads it, a preset of Wan's sizes without weights, or another checkpoint by its headers."""
    path = Path(args.model)
    preset = args.model in WAN and not path.exists()
    if not preset and args.model not in shipped_models() and path.exists():
        found = inspect(path, args.family)
        if found.kind != key_maps.ENGINE:
            facts = found.to_dict()
            if found.config is not None:
                workload = memory_estimate.Workload(**fp8_dtypes(args.quantization))
                facts["memory"] = memory_estimate.report(found.config, found.rollout, workload)
            return facts, lines(facts), 0
    before = memory_estimate.process_memory()
    pipe = (
        without_weights(args.model)
        if preset
        else Pipeline.from_pretrained(args.model, head=args.head, quantization=args.quantization)
    )
    engine, config, model = pipe.engine, pipe.config, pipe.engine.dit.config
    parts: dict[str, Any] = {
        "generator": engine.dit,
        "confidence": engine.head,
        "codec": engine.decoder,
        "text": engine.text,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    stride = 8 if engine.decoder is None else engine.decoder.spatial_stride  # without one: the sizes of Wan's VAE
    frames = (pipe.frames - 1) // 4 + 1 if engine.decoder is None else engine.decoder.latent_frames_of(pipe.frames)
    height, width = pipe.height // stride, pipe.width // stride
    dtypes: dict[str, Any] = {"dtype": engine.dit.dtype, **fp8_dtypes(args.quantization)}
    workload = memory_estimate.Workload(height, width, frames, **dtypes)
    facts = {
        "name": pipe.name,
        "weights": None if preset else args.model,
        "parameters": counts,
        "head": engine.head.settings() if engine.head else None,
        "confidence_percent": round(100 * counts["confidence"] / counts["generator"], 3) if engine.head else None,
        "model": model.to_dict(),
        **config.to_dict(),
        "sigmas": [round(sigma, 4) for sigma in Schedule(config.steps, config.shift).sigmas],
        "cache_bytes": memory_estimate.cache_bytes(model, config, workload),
        "dtype": str(engine.dit.dtype).removeprefix("torch."),
        "quantization": args.quantization,
        "size": f"{pipe.width}x{pipe.height}",
        "frames": pipe.frames,
        "fps": pipe.fps,
    }
    if isinstance(engine.text, SlotTextEncoder):
        facts |= {"prompts": GRAMMAR, "example": str(EXAMPLE)}
    parts["vae"] = parts.pop("codec")
    sizes = {} if preset else memory_estimate.footprints(parts)
    facts["memory"] = memory_estimate.report(model, config, workload, **sizes)
    if preset:
        facts["training_memory"] = training_memory.report(model)
    if not preset:
        measured, now = memory_estimate.measure(parts, engine.dit.device), memory_estimate.process_memory()
        measured["loading"] = None if before is None or now is None else now - before
        facts["memory"]["measured"] = measured
    return facts, lines(facts), 0


def fp8_dtypes(quantization: str | None) -> dict[str, Any]:
    """The fields of a `memory_estimate.Workload` that --quantization sets."""
    chosen = QUANTIZATIONS.get(quantization)
    return {} if chosen is None else {name: E4M3 for name, quantized in chosen._asdict().items() if quantized}


def lines(facts: dict[str, Any]) -> list[str]:
    """Facts for people, with bytes of memory as GB."""
    return table(
        facts | {name: memory_estimate.format_bytes(value) for name, value in facts.items() if name.endswith("memory")}
    )


def without_weights(preset: str) -> Pipeline:
    """Wan's sizes on the meta device, with the video size and length that Wan is trained for."""
    with torch.device("meta"):
        dit, head = CausalDiT(ModelConfig.preset(preset)), PooledHead(ModelConfig.preset(preset))
    engine = Engine(dit.bfloat16(), head, None, None, RolloutConfig())
    return Pipeline(engine, name=preset, height=480, width=832, frames=81, fps=16.0)
