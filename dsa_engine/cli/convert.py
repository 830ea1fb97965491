"""`dsa-engine convert`: a checkpoint to this project's folder, or back to diffusers' layout."""

from __future__ import annotations

import argparse

import torch

from dsa_engine.checkpoints.convert import FORMATS, convert
from dsa_engine.cli.options import Result, add_family, table

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="checkpoint file or folder, in any layout that generate reads")
    add("target", help="folder to write, which must not be there or be empty")
    add("--to", choices=FORMATS, default=FORMATS[0])
    add_family(parser)
    add("--lora", metavar="PATH", help="an adapter to merge: a file, or PEFT's folder of one")
    add("--lora-strength", type=float, metavar="X", help="how much of it (default: 1, as it was trained)")
    add("--dtype", choices=DTYPES, help="of the written weights (default: as they are)")


def run(args: argparse.Namespace) -> Result:
    """What was found in the source; the target is there when this returns."""
    dtype = args.dtype and getattr(torch, args.dtype)
    options = {"dtype": dtype, "family": args.family, "lora": args.lora, "lora_strength": args.lora_strength}
    found = convert(args.source, args.target, args.to, **options)
    facts = {**found.to_dict(), "wrote": args.target, "to": args.to}
    return facts, table(facts), 0
