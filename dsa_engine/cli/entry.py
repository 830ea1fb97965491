"""Parses the command line, runs one command, prints its result.

Results go to stdout; progress, log lines and errors to stderr. Exit codes: 0 done, 1 `doctor` found that the engine
cannot run, 2 an error (one line, no traceback), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from dsa_engine.cli import convert, doctor, generate, info, serve, train

COMMANDS = {
    generate: "make a clip from a prompt",
    serve: "answer over HTTP: jobs, live video over a WebSocket, and a page to watch it",
    info: "sizes, schedule, cache and prompts of a model",
    convert: "a checkpoint to this project's folder, or back to diffusers' layout",
    train: "train a model, a stage at a time; run again, it goes on where it was",
    doctor: "check this installation; exit code 1 where the engine cannot run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name (default: those of the process).

    Returns:
        The exit code.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        result, lines, code = args.run(args)
        if result is not None:
            sys.stdout.write((json.dumps(result, ensure_ascii=False) if args.json else "\n".join(lines)) + "\n")
        return code
    except KeyboardInterrupt:
        sys.stderr.write("dsa-engine: interrupted\n")
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"dsa-engine: error: {' '.join(str(error).split()) or type(error).__name__}\n")
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsa-engine", description="Autoregressive video diffusion with dynamic steps."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module, text in COMMANDS.items():
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=text, description=text)
        command.set_defaults(run=module.run)
        command.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
        module.add_arguments(command)
    return parser
