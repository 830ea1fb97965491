"""The command `dsa-engine`: generate | serve | info | convert | train | doctor.

Results go to stdout; progress, log lines and errors to stderr. Exit codes: 0 done, 1 `doctor` found that the engine
cannot run, 2 an error (one line, no traceback), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsa_engine import pipeline_inputs
from dsa_engine.checkpoints import convert as converting
from dsa_engine.checkpoints import key_maps, load
from dsa_engine.checkpoints.inspect import inspect
from dsa_engine.config import COMMIT_MODES, PRESETS, ROPE_MODES, ModelConfig, RolloutConfig
from dsa_engine.doctor import doctor, table
from dsa_engine.engine.engine import Engine
from dsa_engine.engine.session import Chunk
from dsa_engine.media import mp4
from dsa_engine.models import memory_estimate
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3, QUANTIZATIONS
from dsa_engine.ops import dispatch
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import POLICY_FORMS
from dsa_engine.sampling.schedule import Schedule
from dsa_engine.shapes.text_encoder import SlotTextEncoder
from dsa_engine.shapes.world import EXAMPLE, GRAMMAR
from dsa_engine.training import launch

SHOWN_SIDE = 256  # px; smaller videos are scaled up until their shorter side has as many
DTYPES = ("float32", "bfloat16", "float16")
FAMILY = "whose chunks, window and schedule a checkpoint gets: " + ", ".join(key_maps.FAMILIES)
QUANTISED = "what is in FP8: products and cache, or one of them (compute capability 8.9)"
WAN = tuple(name for name in PRESETS if name.startswith("wan"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = parser().parse_args(argv)
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dsa-engine", description="Autoregressive video diffusion with dynamic steps.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
        return sub

    clip = command(generate, "make a clip from a prompt")
    add, length = clip.add_argument, clip.add_mutually_exclusive_group()
    add("prompt", help=f"for the model shapes: {GRAMMAR}")
    add("-o", "--output", metavar="MP4", help="video file (out.mp4 where neither --report nor --json is given)")
    add("--report", metavar="PNG", help="picture of the clip over its steps and confidence")
    add("--seed", type=int, default=0)
    length.add_argument("--frames", type=int, help="length in frames, whole chunks (default: the model's own)")
    length.add_argument("--seconds", type=float, help="length in seconds, rounded to whole chunks")
    add(
        "--steps",
        metavar="POLICY",
        help=f"{POLICY_FORMS}, or a preset of the model such as balanced (default: the model's own)",
    )
    add(
        "--at",
        nargs=2,
        action="append",
        default=[],
        metavar=("TIME", "PROMPT"),
        help="another prompt from the chunk that starts nearest to TIME (2s, 1.5s, 24f); repeatable",
    )
    add("--image", metavar="FILE", help="a picture to begin with, scaled and cut to the clip's size")
    add("--video", metavar="FILE", help="a video to go on from; with --strength, to make anew")
    add("--strength", type=float, help="with --video, in (0, 1]: how much of it is made anew")
    add("--scale", type=int, help=f"enlarge the file's pixels, whole number (default: to {SHOWN_SIDE} px or more)")
    add("--height", type=int)
    add("--width", type=int)
    add("--window", type=int, help="latent frames of the KV cache, the chunk included; -1 holds the whole clip")
    add("--sink", type=int, help="latent frames that stay in the cache for ever")
    add("--rope", choices=ROPE_MODES, help="where a sink is seen: where it was made, or always next to the window")
    add("--commit", choices=COMMIT_MODES, help="what a chunk leaves in the cache")
    add("--no-graphs", action="store_true", help="capture no CUDA graphs: the first frame comes earlier, others later")
    add("--no-recache", action="store_true", help="after --at, keep the cache made under the old prompt")
    loading(add)
    serving(command(serve, "answer over HTTP: jobs, live video over a WebSocket, and a page to watch it").add_argument)
    add = command(info, "sizes, schedule, cache and prompts of a model").add_argument
    add("model", nargs="?", default="shapes", help="as for generate, or a preset without weights: " + ", ".join(WAN))
    add("--family", choices=tuple(key_maps.FAMILIES), help=FAMILY)
    add("--quantization", choices=QUANTIZATIONS, help=QUANTISED)
    add = command(convert, "a checkpoint to this project's folder, or back to diffusers' layout").add_argument
    add("source", help="checkpoint file or folder, in any layout that generate reads")
    add("target", help="folder to write, which must not be there or be empty")
    add("--to", choices=converting.FORMATS, default=converting.FORMATS[0])
    add("--family", choices=tuple(key_maps.FAMILIES), help=FAMILY)
    add("--lora", metavar="FILE", help="an adapter to merge")
    add("--dtype", choices=DTYPES, help="of the written weights (default: as they are)")
    add = command(train, "train a model, a stage at a time; run again, it goes on where it was").add_argument
    add("--recipe", required=True, choices=launch.RECIPES, help="the stage; all: every stage from random weights")
    add("--config", default="shapes", help="shipped recipe or TOML file (default shapes)")
    add("--out", default="runs", metavar="FOLDER", help="checkpoints, logs and pictures go to FOLDER/<stage>")
    add("--steps", type=int, help="instead of the recipe's")
    add("--batch", type=int, help="clips a step over all processes, instead of the recipe's")
    add("--seed", type=int, help="instead of the recipe's")
    add("--eager", action="store_true", help="without torch.compile: starts a minute earlier, runs slower")
    add("--model", metavar="FILE", help="recipe head: a checkpoint or folder to train a head for, on its own rollouts")
    add("--prompts", metavar="FILE", help="with --model: text, a prompt a line, or safetensors with prompt_embeds")
    add("--frames", type=int, help="with --model: pixel frames of a rollout (default: the model's own)")
    add("--window", type=int, help="with --model: latent frames of the KV cache, the chunk included")
    add("--sink", type=int, help="with --model: latent frames that stay in the cache for ever")
    add("--shift", type=float, help="with --model: of the noise schedule")
    add("--device", help="cpu, cuda (default: cuda where there is one)")
    command(doctor, "check this installation; exit code 1 where the engine cannot run")
    return top


def loading(add: Callable) -> None:
    """Flags of a model that is loaded to make video."""
    add("--model", default="shapes", help="shipped name, folder or checkpoint (default shapes)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--threads", type=threads, help="CPU threads (default: 1 for a small model, else torch's own count)")
    add("--family", choices=tuple(key_maps.FAMILIES), help=FAMILY)
    add("--lora", metavar="FILE", help="an adapter to merge into a checkpoint")
    add("--vae", metavar="PATH", help="video VAE of a checkpoint, or wan | taehv (default: what lies in its folder)")
    add("--text", metavar="PATH", help="text encoder of a checkpoint, or prompts encoded before")
    add("--offload", metavar="PARTS", help="auto, or of text,vae: they live on the CPU and visit the device")
    add("--quantization", choices=QUANTIZATIONS, help=QUANTISED)


def serving(add: Callable) -> None:
    """Flags of a server; those left out take the values of `Limits` and `Settings`."""
    loading(add)
    add("--host", help="address to listen at (default 127.0.0.1: this machine only)")
    add("--port", type=int, help="0 for any that is free (default 8000)")
    add("--token", help="clients must send it as a bearer token (default: the environment's DSA_TOKEN, or none)")
    add("--origin", action="append", metavar="URL", help="another page that may use the API, e.g. https://example.com")
    add("--data", type=Path, metavar="FOLDER", help="the jobs' database and videos (default dsa-engine-data)")
    add(
        "--max-sessions", dest="sessions", type=int, metavar="N", help="live streams at once (default 32, or what fits)"
    )
    add("--max-jobs", dest="jobs", type=int, metavar="N", help="jobs at once, 0 for none (default 4, or what fits)")
    add("--queue", dest="waiting", type=int, metavar="N", help="live streams that may wait for a place (default 32)")
    add("--idle-timeout", dest="idle", type=float, metavar="S", help="of a client that gives no sign (default 30)")
    add("--lifetime", type=float, metavar="S", help="of a live stream (default 3600)")
    add("--rows", type=int, help="sequences of one forward, at most (default 8)")
    add("--steps", metavar="POLICY", help="where a request does not say: budget, dsa, fixed, a preset or as generate's")
    add("--deterministic", action="store_true", help="a video's bits never depend on what else is made; no batching")


def threads(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1024:
        raise argparse.ArgumentTypeError(f"{count}: must be from 1 to 1024; nearest is {min(max(count, 1), 1024)}")
    return count


@dataclass(frozen=True)
class Plan:
    """starts: the first frame of each chunk, then the clip's end; prompts: by the chunk they start at."""

    starts: list[int]
    prompts: dict[int, str]


def generate(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """One clip. Whatever can be wrong is found before a chunk is made or a file is touched."""
    if args.output is None and args.report is None and not args.json:
        args.output = "out.mp4"
    for path, suffix in ((args.output, ".mp4"), (args.report, ".png")):
        if path is not None:
            mp4.check_target(path, suffix)
    parts = {name: getattr(args, name) for name in ("family", "lora", "vae", "text", "offload", "quantization")}
    with Pipeline.from_pretrained(args.model, device=args.device, max_sessions=1, **parts) as pipe:
        options = {name: getattr(args, name) for name in SESSION_OPTIONS}
        options |= {"step_policy": args.steps, **given_pixels(args)}
        plan = plan_clip(pipe, args, options)
        options |= {"num_frames": plan.starts[-1]}
        for prompt in plan.prompts.values():  # opening a session checks all of its arguments
            pipe.session(prompt, **options).close()
        side = min(args.height or pipe.height, args.width or pipe.width)  # a height of 0 has been refused above
        args.scale = -(-SHOWN_SIDE // side) if args.scale is None else args.scale
        writer = None if args.output is None else mp4.Mp4Writer(args.output, pipe.fps, args.scale)
        for chunk in list(plan.prompts)[1:]:
            start = plan.starts[chunk]
            tqdm.write(f"from {start / pipe.fps:g} s (frame {start}, chunk {chunk}): {plan.prompts[chunk]}", sys.stderr)
        torch.set_num_threads(args.threads or pipe.cpu_threads)
        warmup = warm_up(pipe, not args.no_graphs)
        facts, chunks = make_clip(pipe, plan, options, writer, not args.no_recache, keep=args.report is not None)
    policy = args.steps or default_policy(pipe)
    facts |= {name: getattr(args, name) for name in ("scale", "output", "report", "model", "seed")}
    backend = dispatch.choice("attention", pipe.engine.dit.device.type).backend
    facts |= {"policy": policy, "warmup_ms": round(1e3 * warmup, 1)}
    facts |= {"device": str(pipe.engine.dit.device), "backend": backend}
    facts |= {"threads": torch.get_num_threads(), "quantization": pipe.quantization}
    title = (
        f"{facts['frames']} frames in {len(chunks)} chunks, {facts['mean_steps']:.2f} steps a chunk ({policy}), "
        f"{facts['fps']:.1f} frames per second"
    )
    if args.report is not None:
        threshold = shown_threshold(pipe, args.steps)
        mp4.write_report(args.report, chunks, threshold=threshold, max_steps=pipe.max_steps, title=title)
    lines = [
        title,
        f"{facts['seconds']:g} s of {facts['size']} at {pipe.fps:g} fps from {args.model}, seed {args.seed}",
        f"first frame after {facts['first_frame_ms']:.0f} ms, with a warm-up of {facts['warmup_ms']:.0f} ms before it",
        f"on {facts['device']} with the {facts['backend']} ops"
        + (f", {pipe.quantization}" if pipe.quantization else ""),
        *(f"wrote {path}" for path in (args.output, args.report) if path is not None),
    ]
    return facts, lines, 0


def serve(args: argparse.Namespace) -> tuple[None, list[str], int]:
    """A server, until SIGTERM or Ctrl-C."""
    from dsa_engine.serving import server
    from dsa_engine.serving.limits import Limits
    from dsa_engine.serving.settings import Settings

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    def ready(address: str) -> None:
        facts = {"address": address, "model": args.model}
        sys.stdout.write((json.dumps(facts) if args.json else f"serving {args.model} at {address}") + "\n")
        sys.stdout.flush()

    args.token = args.token or os.environ.get("DSA_TOKEN") or None
    settings = Settings(**given("host", "port", "token", "data"), origins=tuple(args.origin or ()))
    limits = Limits(**given("sessions", "jobs", "waiting", "idle", "lifetime", "rows", "steps"))
    parts = {
        name: getattr(args, name)
        for name in ("family", "lora", "vae", "text", "offload", "deterministic", "quantization")
    }
    with server.bind(settings) as sock:  # an address that cannot be had is an error before the model is loaded
        places = limits.sessions + limits.jobs
        asked = None if args.sessions is args.jobs is None else places
        with Pipeline.from_pretrained(args.model, device=args.device, max_sessions=asked, **parts) as pipe:
            if asked is None:
                limits = limits.within(pipe.make_room(places))
            torch.set_num_threads(args.threads or pipe.cpu_threads)
            warm_up(pipe)
            server.run(pipe, limits, settings, ready, sock)
    return None, [], 0


def warm_up(pipe: Pipeline, graphs: bool = True) -> float:
    """Seconds of `Pipeline.warmup`, with a bar while CUDA graphs are captured."""
    quiet = pipe.engine.dit.device.type != "cuda" or not graphs
    with tqdm(desc="capturing", unit="graph", file=sys.stderr, disable=quiet) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        return pipe.warmup(progress, graphs)


SESSION_OPTIONS = ("seed", "height", "width", "window", "sink", "rope", "commit", "strength")


def given_pixels(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The frames of --image or --video."""
    if args.image is not None and args.video is not None:
        raise ValueError("--image and --video: give one or the other")
    if args.image is not None:
        frames, _ = mp4.read_mp4(args.image)
        if len(frames) != 1:
            raise ValueError(f"--image {args.image}: holds {len(frames)} frames; for a video use --video")
        return {"image": frames[0]}
    return {} if args.video is None else {"video": mp4.read_mp4(args.video)[0]}


def plan_clip(pipe: Pipeline, args: argparse.Namespace, given: dict[str, Any]) -> Plan:
    decoder, size = pipe.engine.decoder, pipe.config.chunk_frames
    if decoder is None:
        raise ValueError(f"{args.model}: has no decoder, so it makes no video; give a folder or a shipped model")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds {args.seconds}: must be above 0")
    began = 1 if "image" in given else len(given.get("video", ()))
    remade = args.strength is not None
    frames = began if remade else pipe.frames + (began if "video" in given else 0)
    asked = args.frames is not None
    frames = args.frames if asked else frames if args.seconds is None else round(args.seconds * pipe.fps)
    first, later = decoder.frames_of(size, True), decoder.frames_of(size, False)
    if began and not remade:  # the chunks come after what was given
        latent = decoder.latent_frames_of(began)
        starts = list(range(began, pipeline_inputs.whole_chunks(pipe.engine, frames, latent) + 1, later))
    else:
        starts = [0, *range(first, pipeline_inputs.whole_chunks(pipe.engine, frames) + 1, later)]
    if (asked or remade) and starts[-1] != frames:
        what = "--frames" if asked else f"--video {args.video} with --strength: frames"
        raise ValueError(f"{what} {frames}: must come out as whole chunks; nearest is {starts[-1]}")
    return Plan(starts, {0: args.prompt, **switches(args.at, starts, pipe.fps)})


def switches(at: Sequence[tuple[str, str]], starts: Sequence[int], fps: float) -> dict[int, str]:
    """The prompts of --at by the chunk whose start is nearest to the time, the earlier one of two."""
    found: dict[int, str] = {}
    end, before = len(starts) - 1, -1.0
    for when, prompt in at:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|f)", when)
        if match is None:
            raise ValueError(f"--at {when}: must be a time in seconds or frames, e.g. 2s, 1.5s or 24f")
        frame = float(match[1]) * (fps if match[2] == "s" else 1)
        chunk = min(range(end + 1), key=lambda i: abs(starts[i] - frame))
        if not 0 < chunk < end:
            where = "the clip's start" if chunk == 0 else f"the clip's end at {starts[end]}f ({starts[end] / fps:g}s)"
            legal = f"; the nearest possible is {starts[min(max(chunk, 1), end - 1)]}f" if end > 1 else ""
            raise ValueError(f"--at {when}: is at or nearest to {where}, where nothing can switch{legal}")
        if frame <= before:
            raise ValueError(f"--at {when}: comes after {before:g}f; times must rise, each given once")
        if chunk in found:
            raise ValueError(f"--at {when}: takes effect at {starts[chunk]}f, as the one before; leave a chunk between")
        found[chunk], before = prompt, frame
    return found


def make_clip(
    pipe: Pipeline, plan: Plan, options: dict[str, Any], writer: mp4.Mp4Writer | None, recache: bool, keep: bool
) -> tuple[dict[str, Any], list[Chunk]]:
    """The clip's figures, and its chunks, with the frames that a report shows if these are to be kept.

    The clock of `fps` runs from the request to the last decoded frame and stands still while the file is written.
    """
    chunks: list[Chunk] = []
    first_frame = 0.0
    with ExitStack() as stack:
        if writer is not None:
            stack.enter_context(writer)
        start = time.perf_counter()
        session = stack.enter_context(pipe.session(plan.prompts[0], **options))
        busy = time.perf_counter() - start
        if writer is not None and (opening := session.opening()) is not None:
            writer.write(opening)
        bar = stack.enter_context(tqdm(range(len(plan.starts) - 1), unit="chunk", file=sys.stderr))
        for index in bar:
            start = time.perf_counter()
            if index > 0 and index in plan.prompts:
                session.update(plan.prompts[index], recache)
            chunk = session.next_chunk()
            busy += time.perf_counter() - start
            first_frame = first_frame or busy
            if writer is not None:
                writer.write(chunk.frames)
            shown = [0, len(chunk.frames) // 2, -1] if keep else []  # all frames of a long clip would fill the memory
            chunks.append(replace(chunk, frames=chunk.frames[shown], latents=None))
            sure = "" if chunk.confidence is None else f", confidence={min(chunk.confidence):.2f}"
            bar.set_postfix_str(f"steps={chunk.steps}{sure}")
    steps, frames = [c.steps for c in chunks], plan.starts[-1]
    return {
        "fps": round((frames - plan.starts[0]) / busy, 3),
        "clip_fps": pipe.fps,
        "first_frame_ms": round(1e3 * first_frame, 1),
        "steps_per_chunk": steps,
        "mean_steps": round(sum(steps) / len(steps), 4),
        "confidence": None if pipe.engine.head is None else [round(min(c.confidence), 4) for c in chunks],
        "frames": frames,
        "size": "{1}x{0}".format(*chunks[0].frames.shape[1:3]),
        "seconds": round(frames / pipe.fps, 4),
        "prompts": [{"chunk": i, "seconds": plan.starts[i] / pipe.fps, "prompt": p} for i, p in plan.prompts.items()],
    }, chunks


def default_policy(pipe: Pipeline) -> str:
    """What no --steps means for a model, in the form of --steps."""
    return (
        f"fixed:{pipe.max_steps}"
        if pipe.engine.head is None
        else f"confidence:{pipeline_inputs.default_threshold(pipe.engine)}"
    )


def shown_threshold(pipe: Pipeline, steps: str | None) -> float | None:
    """The threshold that a report draws: of a confidence policy or a preset, none where it moves or there is none."""
    kind, _, value = (steps or default_policy(pipe)).partition(":")
    return float(value) if kind == "confidence" else pipe.config.presets.get(kind)


def info(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """What a model is: loaded as `generate` loads it or, for a preset of Wan's sizes, counted without weights."""
    path = Path(args.model)
    bare = args.model in WAN and not path.exists()
    if not bare and args.model not in load.shipped() and path.exists():
        found = inspect(path, args.family)
        if found.kind != key_maps.ENGINE:  # told by the headers alone: nothing is loaded
            facts = found.to_dict()
            if found.config is not None:
                facts["memory"] = memory_estimate.report(
                    found.config, found.rollout, memory_estimate.Workload(**in_fp8(args))
                )
            return facts, info_lines(facts), 0
    before = memory_estimate.resident()
    pipe = without_weights(args.model) if bare else Pipeline.from_pretrained(args.model, quantization=args.quantization)
    engine, config, model = pipe.engine, pipe.config, pipe.engine.dit.config
    parts = {"generator": engine.dit, "confidence": engine.head, "codec": engine.decoder, "text": engine.text}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    stride = 8 if engine.decoder is None else engine.decoder.spatial_stride  # without one: the sizes of Wan's VAE
    frames = (pipe.frames - 1) // 4 + 1 if engine.decoder is None else engine.decoder.latent_frames_of(pipe.frames)
    workload = memory_estimate.Workload(
        pipe.height // stride, pipe.width // stride, frames, dtype=engine.dit.dtype, **in_fp8(args)
    )
    facts = {
        "name": pipe.name,
        "weights": None if bare else args.model,
        "parameters": counts,
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
    facts["memory"] = memory_estimate.report(
        model, config, workload, **({} if bare else memory_estimate.sizes_of(parts))
    )
    if not bare:
        measured, now = memory_estimate.measure(parts, engine.dit.device), memory_estimate.resident()
        measured["loading"] = None if before is None or now is None else now - before
        facts["memory"]["measured"] = measured
    return facts, info_lines(facts), 0


def in_fp8(args: argparse.Namespace) -> dict[str, torch.dtype]:
    """What of a `memory.Workload` --quantization asks for."""
    chosen = QUANTIZATIONS.get(args.quantization)
    return {} if chosen is None else {name: E4M3 for name, wanted in chosen._asdict().items() if wanted}


def info_lines(facts: dict[str, Any]) -> list[str]:
    """Facts for people, with bytes of memory as GB."""
    return table(facts | {name: memory_estimate.shown(value) for name, value in facts.items() if name == "memory"})


def convert(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], int]:
    """What was found in the source; the target is there when this returns."""
    dtype = args.dtype and getattr(torch, args.dtype)
    found = converting.convert(args.source, args.target, args.to, dtype=dtype, family=args.family, lora=args.lora)
    facts = {**found.to_dict(), "wrote": args.target, "to": args.to}
    return facts, table(facts), 0


def train(args: argparse.Namespace) -> tuple[dict[str, Any] | None, list[str], int]:
    """One stage of a recipe, or all. Under torchrun each process takes its share of a step's clips; one speaks."""
    own = ("prompts", "frames", "window", "sink", "shift")
    if args.model is None or args.recipe != "head":
        strange = [f"--{name}" for name in ("model", *own) if getattr(args, name) is not None]
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: only for --recipe head with --model, a head for a given checkpoint"
            )
        facts = launch.train(
            args.recipe,
            args.config,
            args.out,
            steps=args.steps,
            batch=args.batch,
            seed=args.seed,
            device=args.device,
            compiled=not args.eager,
        )
    else:
        if args.prompts is None:
            raise ValueError("--prompts: what to roll out is needed, a file of text or of prompt_embeds")
        facts = launch.train_head_of(
            args.model,
            args.out,
            iterations=args.steps,
            batch=args.batch,
            seed=args.seed or 0,
            device=args.device,
            **{name: getattr(args, name) for name in own},
        )
    return (facts, table(facts), 0) if os.environ.get("RANK", "0") == "0" else (None, [], 0)


def without_weights(preset: str) -> Pipeline:
    """Wan's sizes on the meta device, with the video size and length that Wan is trained for."""
    with torch.device("meta"):
        dit, head = CausalDiT(ModelConfig.preset(preset)), ConfidenceHead(ModelConfig.preset(preset))
    engine = Engine(dit.bfloat16(), head, None, None, RolloutConfig())
    return Pipeline(engine, name=preset, height=480, width=832, frames=81, fps=16.0)
