"""Which clips are generated, by whom, in which order; the pipelines and step policies that are compared."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.limit import Limit
from benchmarks.e2e.eager_baseline import Baseline, BaselineStream
from benchmarks.e2e.timeline import EngineStream, Run, play
from benchmarks.micro import roofline
from dsa_engine import PerChunk, Pipeline, Policy, pipeline_inputs
from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.config import PRESETS, RolloutConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.engine.session import Session
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.world import sample_captions

HISTOGRAM = (0.2, 0.3, 0.3, 0.2)  # shares of chunks with 1, 2, ... steps: 2.5 on average
VAES = {"wan": WanVAE, "taehv": TAEHV}


@dataclass(frozen=True)
class Scenario:
    """chunks: of a run that are recorded; skip: before them; window: frames of the cache; frames: pixel frames of a
    clip, None for an endless stream."""

    name: str
    clips: int
    rounds: int
    chunks: int
    skip: int
    window: int
    frames: int | None


Subject = Callable[[Scenario, int], Run]  # plays clip number i
Rounds = list[list[Run]]  # of one subject, in each of them the same clips


@dataclass
class Bench:
    """The pipeline, the prompt embeddings of each clip, and which policy a clip gets."""

    pipe: Pipeline
    embeds: list[Tensor]
    policy: Callable[[Scenario, int], Policy]
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Of the latents."""
        return pipeline_inputs.latent_size(self.pipe.engine, self.pipe.height, self.pipe.width)

    def clip(self, chunks: int, clips: int, rounds: int = 1) -> Scenario:
        frames = chunks * self.pipe.config.chunk_frames
        pixel_frames = self.pipe.engine.decoder.frames_of(frames, True)
        return Scenario("clip", clips, rounds, chunks, 0, self.pipe.config.window or frames, pixel_frames)

    def steady(self, chunks: int, clips: int) -> Scenario:
        """After the window is full; without one of its own, the length of the model's clips."""
        window = self.pipe.config.window or clip_chunks(self.pipe) * self.pipe.config.chunk_frames
        return Scenario("steady", clips, 1, chunks, -(-window // self.pipe.config.chunk_frames), window, None)

    def capture(self, scenario: Scenario) -> float:
        """Seconds in which the CUDA graphs of a scenario's streams are captured, 0 where there is no GPU."""
        engine, config, frames = self.pipe.engine, self.pipe.config, scenario.frames
        if engine.dit.device.type != "cuda":
            return 0.0
        if frames is None:
            config = replace(config, window=scenario.window)
        else:
            frames = pipeline_inputs.latent_frames(engine, frames)
        return engine.capture(height=self.size[0], width=self.size[1], frames=frames, config=config)

    def session(self, scenario: Scenario, clip: int, policy: Policy, commit: str = "clean") -> Session:
        return self.pipe.session(
            prompt_embeds=self.embeds[clip % len(self.embeds)],
            seed=self.seed + clip,
            step_policy=policy,
            num_frames=scenario.frames,
            window=scenario.window if scenario.frames is None else None,
            commit=commit,
        )

    def engine(self, policy: Callable[[Scenario, int], Policy]) -> Subject:
        """The clip, and then its steps once more without commits."""

        def run(scenario: Scenario, clip: int) -> Run:
            def stream(policy: Policy, commit: str) -> EngineStream:
                return EngineStream(self.session(scenario, clip, policy, commit))

            chosen = policy(scenario, clip)
            found = play(lambda: stream(chosen, "clean"), scenario.chunks, scenario.skip)
            again = PerChunk([self.pipe.max_steps] * scenario.skip + [c.steps for c in found.chunks])
            found.dit = play(lambda: stream(again, "exit_step"), scenario.chunks, scenario.skip)
            return found

        return run

    def baseline(self, baseline: Baseline) -> Subject:
        def run(scenario: Scenario, clip: int) -> Run:
            embeds, chunks = self.embeds[clip % len(self.embeds)], scenario.frames and scenario.chunks
            return play(
                lambda: BaselineStream(baseline, embeds, scenario.window, self.size, chunks),
                scenario.chunks,
                scenario.skip,
            )

        return run


def clip_chunks(pipe: Pipeline) -> int:
    """Whole chunks in a clip of the model's own length."""
    return pipeline_inputs.latent_frames(pipe.engine, pipe.frames) // pipe.config.chunk_frames


def interleaved(
    subjects: dict[str, Subject],
    scenario: Scenario,
    limit: Limit | None = None,
    report: Callable[[dict[str, Rounds]], object] = lambda runs: None,
) -> tuple[dict[str, Rounds], bool]:
    """Runs by subject, round and clip: every clip is played by all, one after the other; and whether these are all.

    report: called with the runs after each of them. None is begun that, judged by the subject's last one, would end
    after the limit; from there on only shorter ones are played.
    """
    runs: dict[str, Rounds] = {name: [] for name in subjects}
    seconds, complete = dict.fromkeys(subjects, 0.0), True
    for number in range(scenario.rounds):
        for clip in range(scenario.clips):
            for name, subject in subjects.items():
                if limit is not None and limit.over(seconds[name]):
                    complete = False
                    continue
                if len(runs[name]) == number:
                    runs[name].append([])
                start = time.perf_counter()
                runs[name][-1].append(subject(scenario, clip))
                seconds[name] = time.perf_counter() - start
                report(runs)
    return runs, complete


def sample_step_counts(histogram: Sequence[float], count: int, seed: int) -> list[int]:
    """Steps of `count` chunks in a random order: n in the share histogram[n - 1], rounded by largest remainder (of
    equal remainders more steps win)."""
    exact = [share * count for share in histogram]
    quota = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: (round(quota[i] - exact[i], 9), -i))[: count - sum(quota)]:
        quota[i] += 1
    steps = [n for n, times in enumerate(quota, 1) for _ in range(times)]
    random.Random(seed).shuffle(steps)
    return steps


def histogram_policy(histogram: Sequence[float], max_steps: int, seed: int) -> Callable[[Scenario, int], Policy]:
    """Counts drawn once for all recorded chunks of a scenario, and cut into its clips."""
    if len(histogram) > max_steps or min(histogram) < 0 or abs(sum(histogram) - 1) > 1e-6:
        raise ValueError(
            f"{format_histogram(histogram)}: must be shares of at least 0 whose sum is 1, of chunks with 1 to "
            f"{max_steps} steps; e.g. {format_histogram(HISTOGRAM)}"
        )

    def policy(scenario: Scenario, clip: int) -> Policy:
        steps = sample_step_counts(histogram, scenario.clips * scenario.chunks, seed)
        own = steps[clip * scenario.chunks :][: scenario.chunks]
        return PerChunk([max_steps] * scenario.skip + own)

    return policy


def format_histogram(histogram: Sequence[float]) -> str:
    """(0.25, 0, 0.75) -> histogram:1=0.25,3=0.75."""
    return "histogram:" + ",".join(f"{n}={share:g}" for n, share in enumerate(histogram, 1) if share)


def parse_histogram(text: str) -> tuple[float, ...]:
    """What `format_histogram` writes, in any order; or the shares of 1, 2, ... steps alone: 0.25,0,0.75."""
    parts = text.removeprefix("histogram:").split(",")
    try:
        if not any("=" in part for part in parts):
            return tuple(float(part) for part in parts)
        shares = {int(n): float(share) for n, _, share in (part.partition("=") for part in parts)}
    except ValueError as error:
        raise ValueError(f"{text}: must be STEPS=SHARE,..., e.g. {format_histogram(HISTOGRAM)}") from error
    if len(shares) < len(parts) or min(shares) < 1 or max(shares) > 1000:
        raise ValueError(f"{text}: must name each number of steps once, from 1 on; e.g. {format_histogram(HISTOGRAM)}")
    return tuple(shares.get(n, 0.0) for n in range(1, max(shares) + 1))


def random_pipeline(name: str, device: str, vae: str | None) -> Pipeline:
    """A preset with random weights, its confidence head too: as fast as the real one, and noise to look at."""
    if name not in PRESETS:
        raise ValueError(f"--random-weights with --model {name}: must be one of {', '.join(PRESETS)}")
    if vae not in (None, *VAES):
        raise ValueError(f"--random-weights with --vae {vae}: must be one of {', '.join(VAES)}")
    config, small = PRESETS[name], name == "shapes"
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    rollout = RolloutConfig(window=9, shift=3.0) if small else FAMILIES["self-forcing"].rollout
    with torch.device(device):
        parts = CausalDiT(config), PooledHead(config), PixelCodec() if small else VAES[vae or "wan"]()
    # Some buffers stay on the CPU whatever the default device is, so every part is moved as a loaded one is.
    dit, head, decoder = (part.to(device, dtype).requires_grad_(False).eval() for part in parts)
    clip = {"height": 480, "width": 832, "frames": 81, "fps": 16.0}
    clip = {"height": 64, "width": 64, "frames": 48, "fps": 12.0} if small else clip
    return Pipeline(Engine(dit, head, decoder, None, rollout, max_sessions=1), name=name, **clip)


def embeddings(pipe: Pipeline, clips: int, seed: int) -> list[Tensor]:
    """Of a prompt per clip, from the shapes world's grammar; without a text encoder random ones of a usual length."""
    dit, draw = pipe.engine.dit, np.random.default_rng(seed)
    if pipe.engine.text is not None:
        return [pipe.engine.encode([str(sample_captions(draw, 1)[0])]) for _ in range(clips)]
    shape = (1, min(roofline.TEXT_KEYS, dit.config.text_len), dit.config.text_dim)
    return [torch.from_numpy(draw.standard_normal(shape)).to(dit.device, dit.dtype)] * clips
