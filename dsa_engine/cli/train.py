"""`dsa-engine train`: one stage of a recipe, or all."""

from __future__ import annotations

import argparse
import os

from dsa_engine.cli.options import Result, table
from dsa_engine.models.confidence import HEADS
from dsa_engine.training import launch

OF_MODEL = ("prompts", "frames", "window", "sink", "shift")  # flags that go with --model only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", required=True, choices=launch.RECIPES, help="the stage; all: every stage from random weights")
    add("--config", default="shapes", help="shipped recipe or TOML file (default shapes)")
    add("--out", default="runs", metavar="FOLDER", help="checkpoints, logs and images go to FOLDER/<stage>")
    add("--steps", type=int, help="instead of the recipe's")
    add("--batch", type=int, help="clips a step over all processes, instead of the recipe's")
    add("--seed", type=int, help="instead of the recipe's")
    add("--head", choices=tuple(HEADS), help="recipes joint, paper: form of the head that is trained (default pooled)")
    add("--student", default="joint", metavar="NAME", help="recipe head: stage folder of the student (default joint)")
    add("--eager", action="store_true", help="without torch.compile: starts a minute earlier, runs slower")
    add("--model", metavar="FILE", help="recipe head: a checkpoint or folder to train a head for, on its own rollouts")
    add("--prompts", metavar="FILE", help="with --model: text, a prompt a line, or safetensors with prompt_embeds")
    add("--frames", type=int, help="with --model: pixel frames of a rollout (default: the model's own)")
    add("--window", type=int, help="with --model: latent frames of the KV cache, the chunk included")
    add("--sink", type=int, help="with --model: latent frames that stay in the cache for ever")
    add("--shift", type=float, help="with --model: of the noise schedule")
    add("--device", help="cpu, cuda (default: cuda where there is one)")


def run(args: argparse.Namespace) -> Result:
    """Under torchrun each process takes its share of a step's clips; rank 0 prints."""
    common = {"batch": args.batch, "device": args.device}
    if args.model is None or args.recipe != "head":
        misplaced = [f"--{name}" for name in ("model", *OF_MODEL) if getattr(args, name) is not None]
        if misplaced:
            only = "only for --recipe head with --model, a head for a given checkpoint"
            raise ValueError(f"{', '.join(misplaced)}: {only}")
        options = {"steps": args.steps, "seed": args.seed, "compiled": not args.eager}
        options |= {"head": args.head or "pooled", "student": args.student}
        facts = launch.train(args.recipe, args.config, args.out, **options, **common)
    else:
        if args.prompts is None:
            raise ValueError("--prompts: what to roll out is needed, a file of text or of prompt_embeds")
        options = {name: getattr(args, name) for name in OF_MODEL}
        options |= {"iterations": args.steps, "seed": args.seed or 0}
        facts = launch.train_head_of(args.model, args.out, **options, **common)
    return (facts, table(facts), 0) if os.environ.get("RANK", "0") == "0" else (None, [], 0)
