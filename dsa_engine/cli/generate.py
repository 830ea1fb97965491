"""`dsa-engine generate`: a clip from a prompt, as a video file, a report or figures."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsa_engine import pipeline_inputs
from dsa_engine.cli.options import Result, warm_up
from dsa_engine.config import COMMIT_MODES, ROPE_MODES
from dsa_engine.engine.session import Chunk
from dsa_engine.files import check_output_path
from dsa_engine.media import mp4, report
from dsa_engine.media.image import read_image
from dsa_engine.media.video import read_video
from dsa_engine.ops import dispatch
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import POLICY_FORMS
from dsa_engine.serving.settings import ModelOptions, add_flags, from_args
from dsa_engine.shapes.world import GRAMMAR

MIN_SIDE = 256  # px; smaller videos are scaled up until their shorter side has as many
SESSION_OPTIONS = ("seed", "height", "width", "window", "sink", "rope", "commit", "strength")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, length = parser.add_argument, parser.add_mutually_exclusive_group()
    add("prompt", help=f"for the model shapes: {GRAMMAR}")
    add("-o", "--output", metavar="MP4", help="video file (out.mp4 where neither --report nor --json is given)")
    add("--report", metavar="PNG", help="image of the clip over its steps and confidence")
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
    add("--image", metavar="FILE", help="an image to begin with, scaled and cut to the clip's size")
    add("--video", metavar="FILE", help="a video to go on from; with --strength, to make anew")
    add("--strength", type=float, help="with --video, in (0, 1]: how much of it is generated anew")
    add("--scale", type=int, help=f"enlarge the file's pixels, whole number (default: to {MIN_SIDE} px or more)")
    add("--height", type=int)
    add("--width", type=int)
    add("--window", type=int, help="latent frames of the KV cache, the chunk included; -1 holds the whole clip")
    add("--sink", type=int, help="latent frames that stay in the cache for ever")
    add(
        "--rope", choices=ROPE_MODES, help="positions of the sink: where it was generated, or always next to the window"
    )
    add("--commit", choices=COMMIT_MODES, help="what a chunk leaves in the cache")
    add("--no-graphs", action="store_true", help="capture no CUDA graphs: the first frame comes earlier, others later")
    add("--no-recache", action="store_true", help="after --at, keep the cache of the old prompt")
    add_flags(parser, ModelOptions)
    parser.set_defaults(model=ModelOptions.model)


@dataclass(frozen=True)
class Plan:
    """starts: the first frame of each chunk, then the clip's end; prompts: by the chunk they start at."""

    starts: list[int]
    prompts: dict[int, str]


def run(args: argparse.Namespace) -> Result:
    """One clip. All arguments are checked before a chunk is generated or a file is touched."""
    if args.output is None and args.report is None and not args.json:
        args.output = "out.mp4"
    for path, suffix in ((args.output, ".mp4"), (args.report, ".png")):
        if path is not None:
            check_output_path(path, suffix)
    with from_args(ModelOptions, args).load(max_sessions=1) as pipe:
        options = {name: getattr(args, name) for name in SESSION_OPTIONS}
        given = read_given(pipe, args)
        plan = plan_clip(pipe, args, given)
        options |= {"step_policy": args.steps, "num_frames": plan.starts[-1]}
        if given is not None:  # encoded once, whatever the number of sessions that are opened
            kind = "image" if args.video is None else "video"
            options[kind] = pipe.encode_video(given, args.height, args.width)
        for prompt in plan.prompts.values():  # opening a session checks all of its arguments
            pipe.session(prompt, **options).close()
        side = min(args.height or pipe.height, args.width or pipe.width)  # a height of 0 has been refused above
        scale = -(-MIN_SIDE // side) if args.scale is None else args.scale
        writer = None if args.output is None else mp4.Mp4Writer(args.output, pipe.fps, scale)
        for chunk in list(plan.prompts)[1:]:
            start = plan.starts[chunk]
            tqdm.write(f"from {start / pipe.fps:g} s (frame {start}, chunk {chunk}): {plan.prompts[chunk]}", sys.stderr)
        torch.set_num_threads(args.threads or pipe.cpu_threads)
        warmup = warm_up(pipe, not args.no_graphs)
        facts, chunks = make_clip(pipe, plan, options, writer, not args.no_recache, keep=args.report is not None)
    policy, device = args.steps or default_policy(pipe), pipe.engine.dit.device
    facts |= {
        "scale": scale,
        **{name: getattr(args, name) for name in ("output", "report", "model", "seed")},
        "policy": policy,
        "warmup_ms": round(1e3 * warmup, 1),
        "device": str(device),
        "backend": dispatch.choice("attention", device.type).backend,
        "threads": torch.get_num_threads(),
        "quantization": pipe.quantization,
    }
    title = (
        f"{facts['frames']} frames in {len(chunks)} chunks, {facts['mean_steps']:.2f} steps a chunk ({policy}), "
        f"{facts['fps']:.1f} frames per second"
    )
    if args.report is not None:
        threshold = reported_threshold(pipe, policy)
        report.write_report(args.report, chunks, threshold=threshold, max_steps=pipe.max_steps, title=title)
    lines = [
        title,
        f"{facts['seconds']:g} s of {facts['size']} at {pipe.fps:g} fps from {args.model}, seed {args.seed}",
        f"first frame after {facts['first_frame_ms']:.0f} ms, with a warm-up of {facts['warmup_ms']:.0f} ms before it",
        f"on {device} with the {facts['backend']} ops" + (f", {pipe.quantization}" if pipe.quantization else ""),
        *(f"wrote {path}" for path in (args.output, args.report) if path is not None),
    ]
    return facts, lines, 0


def read_given(pipe: Pipeline, args: argparse.Namespace) -> np.ndarray | None:
    """The frames of --image or --video at the clip's size and rate, as many as it can use, uint8 [T, H, W, 3]."""
    if args.image is not None and args.video is not None:
        raise ValueError("--image and --video: give one or the other")
    if args.strength is not None and args.video is None:
        raise ValueError(f"--strength {args.strength}: says how much of a video stays; give --video too")
    if args.image is None and args.video is None:
        return None
    decoder = decoder_of(pipe, args)
    height, width = (side * decoder.spatial_stride for side in pipe._size(args.height, args.width))
    if args.image is not None:
        return read_image(args.image, height, width)[None]
    wanted = asked_frames(pipe, args)
    frames = read_video(args.video, height, width, pipe.fps, wanted)
    what, count = f"--video {args.video}", len(frames)
    if args.strength is not None:
        if args.frames is not None and args.frames > count:
            near = pipeline_inputs.whole_chunks_within(pipe.engine, count)
            raise ValueError(f"--frames {args.frames}: {what} has {count} at {pipe.fps:g} fps; nearest is {near}")
        keep, unit = pipeline_inputs.whole_chunks_within(pipe.engine, count), "whole chunks"
    else:
        if wanted is not None and count >= wanted:
            raise ValueError(
                f"{what}: has {wanted} frames or more at {pipe.fps:g} fps, and the clip begins with all of them; ask "
                "for more frames than that, or with --strength for the video made anew"
            )
        one, two = (decoder.frames_of(n, True) for n in (1, 2))
        keep, unit = one + (count - one) // (two - one) * (two - one), "whole latent frames"
    if keep != count:
        tqdm.write(f"{what}: the first {keep} of its {count} frames at {pipe.fps:g} fps, {unit}", sys.stderr)
    return frames[:keep]


def asked_frames(pipe: Pipeline, args: argparse.Namespace) -> int | None:
    """The clip's length by --frames or --seconds, not yet in whole chunks."""
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds {args.seconds}: must be above 0")
    frames = args.frames if args.seconds is None else round(args.seconds * pipe.fps)
    return None if frames is None else max(1, frames)


def decoder_of(pipe: Pipeline, args: argparse.Namespace):
    if pipe.engine.decoder is None:
        raise ValueError(f"{args.model}: has no decoder, so it makes no video; give a folder or a shipped model")
    return pipe.engine.decoder


def plan_clip(pipe: Pipeline, args: argparse.Namespace, given: np.ndarray | None) -> Plan:
    decoder, size = decoder_of(pipe, args), pipe.config.chunk_frames
    prefix = 0 if given is None else len(given)
    redone, asked = args.strength is not None, asked_frames(pipe, args)
    own = prefix if redone else pipe.frames + (0 if args.video is None else prefix)
    frames = args.frames if args.frames is not None else own if asked is None else asked
    first, later = decoder.frames_of(size, True), decoder.frames_of(size, False)
    if redone and args.frames is None:
        frames = prefix  # whole chunks already, within --seconds
    if prefix and not redone:  # the chunks come after the given frames
        latent = decoder.latent_frames_of(prefix)
        starts = list(range(prefix, pipeline_inputs.whole_chunks(pipe.engine, frames, latent) + 1, later))
    else:
        starts = [0, *range(first, pipeline_inputs.whole_chunks(pipe.engine, frames) + 1, later)]
    if args.frames is not None and starts[-1] != frames:
        raise ValueError(f"--frames {frames}: must come out as whole chunks; nearest is {starts[-1]}")
    return Plan(starts, {0: args.prompt, **prompt_switches(args.at, starts, pipe.fps)})


def prompt_switches(at: Sequence[tuple[str, str]], starts: Sequence[int], fps: float) -> dict[int, str]:
    """The prompts of --at by the chunk whose start is nearest to the time, the earlier one of two."""
    found: dict[int, str] = {}
    end, previous = len(starts) - 1, -1.0
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
        if frame <= previous:
            raise ValueError(f"--at {when}: comes after {previous:g}f; times must rise, each given once")
        if chunk in found:
            raise ValueError(
                f"--at {when}: takes effect at {starts[chunk]}f, as the previous one; leave a chunk between"
            )
        found[chunk], previous = prompt, frame
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
        if writer is not None and (opening := session.prefix_frames()) is not None:
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
            confidence = "" if chunk.confidence is None else f", confidence={min(chunk.confidence):.2f}"
            bar.set_postfix_str(f"steps={chunk.steps}{confidence}")
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
    """The policy without --steps, in the form of --steps."""
    if pipe.engine.head is None:
        return f"fixed:{pipe.max_steps}"
    return f"confidence:{pipeline_inputs.default_threshold(pipe.engine)}"


def reported_threshold(pipe: Pipeline, policy: str) -> float | None:
    """The threshold that a report draws: of a confidence policy or a preset, none where it moves or there is none."""
    kind, _, value = policy.partition(":")
    return float(value) if kind == "confidence" else pipe.config.presets.get(kind)
