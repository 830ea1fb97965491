"""`dsa-engine serve`: a server, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dsa_engine.cli.options import LOADING, Result, add_loading, warm_up
from dsa_engine.pipeline import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that are left out take the values of `WorkerLimits` and `Settings`."""
    add_loading(parser)
    add = parser.add_argument
    add("--host", help="address to listen at (default 127.0.0.1: this machine only)")
    add("--port", type=int, help="0 for any that is free (default 8000)")
    add("--token", help="clients must send it as a bearer token (default: the environment's DSA_TOKEN, or none)")
    add("--origin", action="append", metavar="URL", help="another page that may use the API, e.g. https://example.com")
    add("--data", type=Path, metavar="FOLDER", help="the jobs' database and videos (default dsa-engine-data)")
    add("--max-sessions", type=int, metavar="N", help="live streams at once (default 32, or what fits)")
    add("--max-jobs", type=int, metavar="N", help="jobs at once, 0 for none (default 4, or what fits)")
    add("--queue", dest="max_queue", type=int, metavar="N", help="live streams that may wait for a slot (default 32)")
    add("--idle-timeout", type=float, metavar="S", help="of a client that gives no sign (default 30)")
    add("--lifetime", type=float, metavar="S", help="of a live stream (default 3600)")
    add("--rows", dest="max_batch_rows", type=int, help="sequences of one forward, at most (default 8)")
    add("--steps", metavar="POLICY", help="where a request does not say: budget, dsa, fixed, a preset or as generate's")
    add("--deterministic", action="store_true", help="a video's bits never depend on what else runs; no batching")


def run(args: argparse.Namespace) -> Result:
    from dsa_engine.serving import server
    from dsa_engine.serving.settings import Settings, WorkerLimits

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    def ready(address: str) -> None:
        facts = {"address": address, "model": args.model}
        sys.stdout.write((json.dumps(facts) if args.json else f"serving {args.model} at {address}") + "\n")
        sys.stdout.flush()

    args.token = args.token or os.environ.get("DSA_TOKEN") or None
    settings = Settings(**given("host", "port", "token", "data"), origins=tuple(args.origin or ()))
    limits = WorkerLimits(**given(*(field.name for field in fields(WorkerLimits))))
    parts = {name: getattr(args, name) for name in (*LOADING, "deterministic")}
    with server.bind(settings) as sock:  # an address that cannot be had is an error before the model is loaded
        asked = None if args.max_sessions is args.max_jobs is None else limits.slots
        with Pipeline.from_pretrained(args.model, device=args.device, max_sessions=asked, **parts) as pipe:
            if asked is None:
                limits = limits.within(pipe.make_room(limits.slots))
            torch.set_num_threads(args.threads or pipe.cpu_threads)
            warm_up(pipe)
            server.run(pipe, limits, settings, ready, sock)
    return None, [], 0
