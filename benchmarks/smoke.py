"""Does the whole model run here at all, and do its backends agree: the first minute on a GPU.

    for part in torch triton cuda loop; do
      python benchmarks/smoke.py $part --work /tmp/smoke --save smoke.json
    done

torch, triton, cuda: two chunks of random weights (Wan2.1 1.3B at 480 x 832), of two steps each and the first one's
commit, one slot, a window of both chunks, with that value of DSA_BACKEND, in a process of its own: a kernel that takes
its process down costs only itself. Weights, noise and prompt are the same in all. `torch` comes first: it makes the
same in float32 too and leaves these latents in --work. Right is a distance ||x - truth|| / ||truth|| of at most twice
that of plain torch in bfloat16, as in kernels.py: which bits bfloat16 rounds is chance, by how much is not.

loop: the small model, captured. Each chunk is made by the loop on the device (a WHILE node that asks the stop flag)
and, from the same state, by single replays that the host asks after: the same bits and steps, whether the flag stops
the first step, none or some.

Each part adds itself to the JSON of --save, over its earlier result. Its status is ok, wrong, failed or absent (with
why). The exit code is 1 for wrong and failed, and where plain torch or Triton is absent; 77 where csrc or the loop is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks.common.cli import first_line
from benchmarks.common.environment import commit, machine, save
from benchmarks.e2e import protocol
from benchmarks.micro import inputs
from benchmarks.micro.backends import refuse_others
from dsa_engine import Confidence, Fixed, Pipeline, pipeline_inputs
from dsa_engine.config import PRESETS
from dsa_engine.engine import device_loop
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import check_output_path

CHUNKS, STEPS = 2, 2
ABSENT = 77  # exit code
PARTS = ("torch", "triton", "cuda", "loop")


class Absent(Exception):
    """This part cannot run here; the message says why."""


def pipeline(model: str, device: str, size: Sequence[int], seed: int) -> Pipeline:
    torch.manual_seed(seed)
    pipe = protocol.random_pipeline(model, device, None)
    pipe.height, pipe.width = size
    return pipe


def latents(pipe: Pipeline, seed: int) -> Tensor:
    """Of two chunks [1, F, C, h, w] in float32, from noise and a prompt of bfloat16 numbers in any dtype."""
    engine, device = pipe.engine, pipe.engine.dit.device
    shape = CHUNKS * pipe.config.chunk_frames, engine.dit.config.in_dim
    size = pipeline_inputs.latent_size(engine, pipe.height, pipe.width)
    noise = torch.randn(STEPS, 1, *shape, *size, generator=torch.Generator(device).manual_seed(seed), device=device)
    first, again, embeds = (
        x.bfloat16().to(engine.dit.dtype) for x in (*noise.unbind(), protocol.embeddings(pipe, 1, seed)[0])
    )
    return pipe.generate_latents(first, embeds, again, Fixed(STEPS)).float()


def chunk(args: argparse.Namespace, device: str) -> dict:
    """The two chunks by a backend, beside the truth. Raises Absent where dispatch would run another one."""
    os.environ["DSA_BACKEND"] = args.part  # of this process, whose ops are not chosen yet
    try:
        refuse_others(args.part, device)
    except SystemExit as reason:
        raise Absent(str(reason)) from reason
    pipe = pipeline(args.model, device, (args.height, args.width), args.seed)
    truth, start = args.work / "truth.pt", time.perf_counter()
    found = latents(pipe, args.seed)
    seconds = time.perf_counter() - start
    if args.part == "torch":
        pipe.engine.close()  # the cache is of the other dtype
        for module in (pipe.engine.dit, pipe.engine.head):
            module.float()
        expected = latents(pipe, args.seed)
        error = inputs.relative_error([found], [expected])
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": expected.cpu(), "error": error, "of": asked(args)}, truth)
    else:
        if not truth.is_file():
            raise FileNotFoundError(f"{truth}: run the part torch first, which writes it")
        known = torch.load(truth)
        if known["of"] != asked(args):
            raise ValueError(f"{truth}: of {known['of']}, must be of {asked(args)}: run the part torch again")
        expected, error = known["latents"].to(device), known["error"]
    limit = inputs.TWICE * error + inputs.FLOOR
    distance = inputs.relative_error([found], [expected])
    status = "ok" if distance <= limit and error < 1 else "wrong"  # NaN is wrong
    return {"status": status, "error": distance, "limit": limit, "first_seconds": seconds}


def asked(args: argparse.Namespace) -> list:
    return [args.model, args.height, args.width, args.seed]


def loop(args: argparse.Namespace, device: str) -> dict:
    """The loop on the device against single replays. Raises Absent where there is none."""
    why = device_loop.unavailable() if device == "cuda" else "needs a CUDA device"
    if why is not None:
        raise Absent(why)
    pipe = pipeline("shapes", device, (64, 64), args.seed)
    size, config = pipeline_inputs.latent_size(pipe.engine, 64, 64), pipe.config
    pipe.engine.capture(height=size[0], width=size[1], frames=None, config=config)
    embeds, launches, steps = protocol.embeddings(pipe, 1, args.seed)[0], [], []
    replay = device_loop.DeviceLoop.replay
    with patch.object(device_loop.DeviceLoop, "replay", lambda self: launches.append(replay(self))):
        for threshold in (1.0, 0.5, 0.0):  # of a confidence between 0 and 1: all steps, some, one
            with pipe.session(prompt_embeds=embeds, seed=args.seed, step_policy=Confidence(threshold)) as session:
                for _ in range(CHUNKS):
                    looped = denoised(session.rollout, by_host=False)
                    single = denoised(session.rollout, by_host=True)
                    if looped.steps != single.steps or not looped.latents.equal(single.latents):
                        apart = inputs.relative_error([looped.latents], [single.latents])
                        return {"status": "wrong", "steps": [looped.steps, single.steps], "error": apart}
                    steps += looped.steps
                    session.rollout.accept(single.latents)
    if len(launches) != len(steps):
        raise Absent(f"{len(launches)} of {len(steps)} chunks were made by a loop: the log says why it was dropped")
    return {"status": "ok", "steps": steps}


def denoised(rollout, by_host: bool):
    """A chunk, which counts only when it is accepted: made again it comes out the same."""
    plan, graphs = rollout.prepare_chunk(), rollout.inputs.graphs
    for node, live in graphs.run(plan, rollout.slots, rollout.poll_stop_flags if by_host else None):
        rollout.on_forward_done(node, live)
    return rollout.result()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--model", choices=PRESETS, default="wan2.1-t2v-1.3b")
    add("--height", type=int, metavar="PIXELS", help="default 480, of the small model 64")
    add("--width", type=int, metavar="PIXELS", help="default 832, of the small model 64")
    add("--seed", type=int, default=0, help="of weights, noise and prompt")
    add("--work", type=Path, required=True, metavar="FOLDER", help="where the true latents are kept")
    add("--save", type=Path, metavar="JSON", help="add the result to this file")
    args = parser.parse_args(argv)
    side = (64, 64) if args.model == "shapes" else (480, 832)
    args.height, args.width = args.height or side[0], args.width or side[1]
    if args.save:
        check_output_path(args.save, ".json")  # before the work, not after it
    return args


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = loop(args, device) if args.part == "loop" else chunk(args, device)
    except Absent as reason:
        found = {"status": "absent", "why": str(reason)}
    except Exception as error:  # whatever a backend does, it is to be in the file
        found = {"status": "failed", "why": first_line(error)}
        sys.excepthook(*sys.exc_info())
    front = {"benchmark": "smoke", "model": args.model, "size": [args.height, args.width], "commit": commit()}
    result = front | {"machine": machine(), "parts": {}}
    if args.save:
        before = json.loads(args.save.read_text()) if args.save.is_file() else {}
        if front.items() <= before.items():
            result["parts"] = before["parts"]
        result["parts"][args.part] = rounded(found)
        save(result, args.save)
    sys.stdout.write(f"{args.part}: {json.dumps(rounded(found))}\n")
    if found["status"] == "absent" and args.part in ("cuda", "loop"):
        return ABSENT
    return int(found["status"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
