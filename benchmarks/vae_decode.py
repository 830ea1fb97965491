"""The Wan VAE's decode of a usual chunk, three ways: is it right, and how long does it take on this GPU.

    python benchmarks/vae_decode.py --save benchmarks/results/vae-h200.json        # needs a GPU

    eager           plain torch op by op, channels first (`plain_vae.py`)
    channels_last   the decoder as it is (`models/vae.py`), launched op by op
    graphed         the same as one CUDA graph (`engine/decoder.py`), its convolutions chosen by time

The weights are random. Right is an error of at most twice plain torch's in the same dtype, both against its float32.
--save is written anew after each way, --limit SECONDS of the process's life: a way that is not begun by then is left
out. The exit code is 1 if a way is wrong or fails, else 75 if one was left out; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks only beside this file

from benchmarks import plain_vae
from benchmarks.common.cli import first_line, format_table
from benchmarks.common.environment import commit, machine, save
from benchmarks.common.limit import UNFINISHED, WHY, Limit
from benchmarks.common.timing import clock, measure
from benchmarks.micro import inputs
from benchmarks.micro.backends import refuse_others
from dsa_engine.engine.graphed_decoder import GraphedDecoder
from dsa_engine.evaluation.summary import rounded
from dsa_engine.files import check_output_path
from dsa_engine.models.wan_vae import WanVAE

ROW = "vae_decode"
WAYS = ("eager", "channels_last", "graphed")


def judge(
    latents: tuple[int, ...], device: str, seed: int, seconds: float | None, dim: int = 96, limit: Limit | None = None
) -> Iterator[dict]:
    """A result for each way, as soon as it is there, of the third chunk of a clip; latents: a chunk's shape
    [B, F, 16, h, w]; seconds: of timing, None for none; dim: the VAE's, narrower for a try."""
    torch.manual_seed(seed)
    vae, draw = WanVAE(dim=dim).requires_grad_(False).eval().to(device), inputs.Draw(device, seed)
    chunks = [draw.normal(*latents) for _ in range(3)]
    plain = float("nan")  # the error of plain torch
    with torch.no_grad():
        expected = third("eager", vae, chunks)().clone()
        vae = vae.to(torch.bfloat16)
        for way in WAYS:
            found = {"op": ROW, "row": ROW, "backend": way}
            if limit and limit.over():
                yield found | {"status": "skipped", "why": WHY}
                continue
            try:
                call = third(way, vae, chunks)
                found["error"] = inputs.distance([call().float()], [expected])
                plain = found["error"] if way == "eager" else plain
                found["limit"] = inputs.TWICE * plain + inputs.FLOOR
                found["status"] = "ok" if found["error"] <= found["limit"] else "wrong"  # NaN is wrong
                if found["status"] == "ok" and seconds is not None:
                    found |= asdict(measure([call], clock(device, capture=False), seconds))
            except RuntimeError as error:  # the other ways are still to be timed
                found |= {"status": "failed", "why": first_line(error)}
            yield found


def third(way: str, vae: WanVAE, chunks: list[Tensor]) -> Callable[[], Tensor]:
    """A call that decodes the last chunk after the others, the same each time."""
    decode, state = decoding(way, vae, chunks[0]), None
    for chunk in chunks[:-1]:
        _, state = decode(chunk, state)
    return lambda: decode(chunks[-1], state)[0]


def decoding(way: str, vae: WanVAE, chunk: Tensor) -> Callable:
    """decode(latents, state) of a way; from `channels_last` on the weights are laid out for it."""
    if way == "eager":
        return partial(plain_vae.decode, vae)
    if way == "channels_last":
        return vae.lay_out().decode
    decoder = GraphedDecoder(vae, chunk.shape)
    if chunk.is_cuda:
        decoder.capture()
    return decoder.decode


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--height", type=int, default=480, metavar="PIXELS")
    add("--width", type=int, default=832, metavar="PIXELS")
    add("--dim", type=int, default=96, metavar="CHANNELS", help="of the widest feature map; Wan's is 96")
    add("--seconds", type=float, default=3.0, help="of timing a way")
    add("--limit", type=float, metavar="SECONDS", help="of this process's life, after which no way is begun")
    add("--seed", type=int, default=0, help="of weights and latents")
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    if args.save:
        check_output_path(args.save, ".json")  # before the work, not after it
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(argv)
    limit, device = Limit(args.limit), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.height * args.width > 64 * 64:
        raise SystemExit(f"{args.height}x{args.width} on a CPU: at most 64x64 is decoded there, in minutes at that")
    if device == "cuda":
        refuse_others(only=("norm_silu", "bias_residual"))  # the ops of the VAE
    result = {"benchmark": ROW, "height": args.height, "width": args.width, "dim": args.dim, "seed": args.seed}
    result |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "unfinished": True}
    result |= {"machine": machine(), "results": []}
    shape = (1, 3, 16, args.height // 8, args.width // 8)
    for found in judge(shape, device, args.seed, args.seconds, args.dim, limit):
        result["results"].append(rounded(found))
        result["unfinished"] = any(r["status"] == "skipped" for r in result["results"]) or found["backend"] != WAYS[-1]
        if args.save:
            save(result, args.save)
    head = ["VAE decode of a chunk", "ms", "error", ""]
    body = [
        [
            r["backend"],
            f"{r['us'] / 1e3:.2f}" if "us" in r else "-",
            f"{r.get('error', float('nan')):.1e}",
            " ".join(filter(None, (r["status"], r.get("why")))),
        ]
        for r in result["results"]
    ]
    sys.stdout.write("\n".join(format_table([head, *body])) + "\n" + json.dumps(result, separators=(",", ":")) + "\n")
    if any(r["status"] in ("wrong", "failed") for r in result["results"]):
        return 1
    return UNFINISHED if result["unfinished"] else 0


if __name__ == "__main__":
    sys.exit(main())
