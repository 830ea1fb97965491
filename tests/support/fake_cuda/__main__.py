"""Runs a program on the pretend device; see the package. With --events FILE its events are written there as JSON."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys

parser = argparse.ArgumentParser(prog="python -m tests.support.fake_cuda")
parser.add_argument("--no-data", type=int, metavar="N", help="tensors of more elements hold no data")
parser.add_argument("--compile", type=int, metavar="ARCH", help="launches compile Triton kernels for it, e.g. 90")
parser.add_argument("--events", metavar="FILE", help="where the events go at the end, as JSON")
parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="and its arguments")
parser.add_argument("script", nargs=argparse.REMAINDER, help="and its arguments")


def main() -> None:
    options = parser.parse_args()
    if not options.compile:
        os.environ.setdefault("DSA_BACKEND", "torch")
    os.environ["TRITON_INTERPRET"] = "0" if options.compile else "1"

    import torch

    from . import install, launch
    from .device import device

    torch.set_num_threads(1)
    device.no_data = options.no_data
    if options.compile:
        device.capability = divmod(options.compile, 10)
    install.install()
    if options.compile:
        launch.compile_for(options.compile)
    else:
        launch.interpret()
    install.install_loop()
    program, *arguments = options.module or options.script
    sys.argv = [program, *arguments]
    try:
        if options.module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
            runpy.run_path(program, run_name="__main__")
    finally:
        if options.events:
            events = [{**event._asdict(), "count": count} for event, count in device.events.items()]
            with open(options.events, "w") as file:
                json.dump(events, file, indent=1)


if __name__ == "__main__":
    main()
