"""`dsa-engine train`: one stage of a recipe, or all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from dsa_engine.cli.options import Result, add_family, table
from dsa_engine.training import launch
from dsa_engine.training.wan.joint import OBJECTIVES, JointRun

ROLLOUT = ("frames", "height", "width", "window", "sink", "shift")
OF_MODEL = ("prompts", *ROLLOUT)  # flags that go with --model only
OF_JOINT = ("teacher", "critic", "null_prompt", "attention", "family", "save_every", "checkpointing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", required=True, choices=launch.RECIPES, help="the stage; all: every stage from random weights")
    add("--config", help="shipped recipe or TOML file (default shapes; wan with --teacher)")
    add("--out", default="runs", metavar="FOLDER", help="checkpoints, logs and images go to FOLDER/<stage>")
    add("--steps", type=int, help="instead of the recipe's")
    add("--batch", type=int, help="clips a step over all processes, instead of the recipe's")
    add("--seed", type=int, help="instead of the recipe's")
    add("--head", help="form of the head that is trained, pooled or token (default pooled)")
    add("--student", default="joint", metavar="NAME", help="recipe head: stage folder of the student (default joint)")
    add("--eager", action="store_true", help="without torch.compile: starts a minute earlier, runs slower")
    add("--device", help="cpu, cuda (default: cuda where there is one)")
    add = parser.add_argument_group("a given checkpoint, recipes head, joint and paper").add_argument
    add("--model", metavar="FILE", help="head: what to train a head for; else what the student begins as")
    add("--prompts", metavar="FILE", help="safetensors with prompt_embeds; head: or text, a prompt a line")
    add("--frames", type=int, help="pixel frames of a rollout (default: the model's own)")
    add("--height", type=int, help="pixels of a rollout (default: the model's own)")
    add("--width", type=int)
    add("--window", type=int, help="latent frames of the KV cache, the chunk included")
    add("--sink", type=int, help="latent frames that stay in the cache for ever")
    add("--shift", type=float, help="of the noise schedule")
    add = parser.add_argument_group("recipes joint and paper on real checkpoints").add_argument
    add("--teacher", metavar="FILE", help="the real score: a checkpoint or folder, frozen")
    add("--critic", metavar="FILE", help="what the fake score begins as (default: the teacher)")
    add("--attention", help="of teacher and critic: bidirectional (default) or causal")
    add("--null-prompt", metavar="FILE", help="safetensors with prompt_embeds of the empty text (default: zeros)")
    add_family(parser)
    add("--save-every", type=int, help="steps between checkpoints (default 50)")
    text = "of gradients (default: where a GPU's memory asks for it)"
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=None, help=text)


def run(args: argparse.Namespace) -> Result:
    """Under torchrun each process takes its share of a step's clips; rank 0 prints."""
    common = {"batch": args.batch, "device": args.device}
    if args.recipe in OBJECTIVES and given(args, ("model", *OF_JOINT)):
        options = {"steps": args.steps, "seed": args.seed}
        facts = launch.train_joint_of(joint_run(args), args.config or "wan", **options, **common)
    elif args.model is None or args.recipe != "head":
        if misplaced := given(args, ("model", *OF_MODEL, *OF_JOINT)):
            only = "only for --recipe head with --model, a head for a given checkpoint, or --recipe joint or paper"
            raise ValueError(f"{', '.join(misplaced)}: {only}")
        options = {"steps": args.steps, "seed": args.seed, "compiled": not args.eager}
        options |= {"head": args.head or "pooled", "student": args.student}
        facts = launch.train(args.recipe, args.config or "shapes", args.out, **options, **common)
    else:
        if misplaced := given(args, OF_JOINT):
            raise ValueError(f"{', '.join(misplaced)}: only for --recipe joint or paper")
        if args.prompts is None:
            raise ValueError("--prompts: what to roll out is needed, a file of text or of prompt_embeds")
        options = {name: getattr(args, name) for name in OF_MODEL}
        options |= {"iterations": args.steps, "seed": args.seed or 0, "kind": args.head}
        facts = launch.train_head_of(args.model, args.out, **options, **common)
    return (facts, table(facts), 0) if os.environ.get("RANK", "0") == "0" else (None, [], 0)


def given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of the flags that were given."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def joint_run(args: argparse.Namespace) -> JointRun:
    """The flags of recipe joint on real checkpoints."""
    needed = {
        "model": "what the student begins as, a checkpoint",
        "teacher": "the real score, a checkpoint; nearest is the base model that the student comes from",
        "prompts": "a .safetensors file with prompt_embeds [P, L, text_dim]",
    }
    for name, what in needed.items():
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: not given, and --recipe {args.recipe} on checkpoints needs it: {what}")
    options = {"null": args.null_prompt, "score": args.attention, "head": args.head, "save_every": args.save_every}
    options |= {"objective": args.recipe}
    options = {name: value for name, value in options.items() if value is not None}
    same = ("model", "teacher", "prompts", "critic", "family", "checkpointing", *ROLLOUT)
    return JointRun(**{name: getattr(args, name) for name in same}, out=Path(args.out), **options)
