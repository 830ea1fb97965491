"""`dsa-engine serve`: a server, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import sys

from dsa_engine.cli.options import Result, warm_up
from dsa_engine.serving.settings import ServerOptions, add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ServerOptions)


def run(args: argparse.Namespace) -> Result:
    try:
        from dsa_engine.serving import server
    except ModuleNotFoundError as error:
        raise ImportError(f"serve needs the extra serving: pip install 'dsa-engine[serving]' ({error})") from error

    options = ServerOptions.parse(args)
    settings, model = options.settings, options.model.model

    def ready(address: str) -> None:
        line = json.dumps({"address": address, "model": model}) if args.json else f"serving {model} at {address}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with server.bind(settings) as sock:  # an address that cannot be had is an error before the model is loaded
        pipe, limits = options.load()
        with pipe:
            warm_up(pipe)
            server.run(pipe, limits, settings, ready, sock)
    return None, [], 0
