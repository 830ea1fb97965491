"""A contest: which clips are made, by whom, in which order; the pipelines and policies that it is about."""

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
from benchmarks.e2e.timeline import EngineStream, Run, Stopwatch, play
from benchmarks.micro import roofline
from dsa_engine import PerChunk, Pipeline, Policy, pipeline_inputs
from dsa_engine.checkpoints.families import FAMILIES
from dsa_engine.config import PRESETS, RolloutConfig
from dsa_engine.engine.engine import Engine
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.world import sample_captions

HISTOGRAM = (0.2, 0.3, 0.3, 0.2)  # shares of chunks with 1, 2, ... steps: 2.5 on average
VAES = {"wan": WanVAE, "taehv": TAEHV}


@dataclass(frozen=True)
class Regime:
    """chunks: of a run that are recorded; skip: before them; window: frames of the cache; frames: pixel frames of a
    clip, None for an endless stream."""

    name: str
    clips: int
    rounds: int
    chunks: int
    skip: int
    window: int
    frames: int | None


Contestant = Callable[[Regime, int], Run]  # plays a clip, told by its number
Rounds = list[list[Run]]  # of one contestant, in each of them the same clips


@dataclass
class Bench:
    """The pipeline, the prompt embeddings of each clip, and which policy a clip gets."""

    pipe: Pipeline
    embeds: list[Tensor]
    policy: Callable[[Regime, int], Policy]
    seed: int

    def __post_init__(self):
        self.watch = Stopwatch(self.pipe.engine.dit.device)
        self.size = pipeline_inputs.latent_size(self.pipe.engine, self.pipe.height, self.pipe.width)

    def clip(self, chunks: int, clips: int, rounds: int = 1) -> Regime:
        frames, decoder = chunks * self.pipe.config.chunk_frames, self.pipe.engine.decoder
        window = self.pipe.config.window or frames
        return Regime("clip", clips, rounds, chunks, 0, window, decoder.frames_of(frames, True))

    def steady(self, chunks: int, clips: int) -> Regime:
        """After the window is full; without one of its own, the length of the model's clips."""
        window = self.pipe.config.window or clip_chunks(self.pipe) * self.pipe.config.chunk_frames
        return Regime("steady", clips, 1, chunks, -(-window // self.pipe.config.chunk_frames), window, None)

    def capture(self, regime: Regime) -> float:
        """Seconds in which the CUDA graphs of a regime's streams are captured, 0 where there is no GPU."""
        engine, config, frames = self.pipe.engine, self.pipe.config, regime.frames
        if engine.dit.device.type != "cuda":
            return 0.0
        if frames is None:
            config = replace(config, window=regime.window)
        else:
            frames = pipeline_inputs.latent_frames(engine, frames)
        return engine.capture(height=self.size[0], width=self.size[1], frames=frames, config=config)

    def stream(self, regime: Regime, clip: int, policy: Policy, commit: str = "clean", pixels: bool = True):
        session = self.pipe.session(
            prompt_embeds=self.embeds[clip % len(self.embeds)],
            seed=self.seed + clip,
            step_policy=policy,
            num_frames=regime.frames,
            window=regime.window if regime.frames is None else None,
            commit=commit,
        )
        return EngineStream(session, self.watch, pixels)

    def engine(self, policy: Callable[[Regime, int], Policy]) -> Contestant:
        """The clip, and then its steps once more without commits and pixels."""

        def made(regime: Regime, clip: int) -> Run:
            given = policy(regime, clip)
            run = play(lambda: self.stream(regime, clip, given), regime.chunks, regime.skip)
            again = PerChunk([self.pipe.max_steps] * regime.skip + [c.steps for c in run.chunks])
            run.dit = play(
                lambda: self.stream(regime, clip, again, "exit_step", pixels=False), regime.chunks, regime.skip
            )
            return run

        return made

    def plain(self, baseline: Baseline) -> Contestant:
        def made(regime: Regime, clip: int) -> Run:
            embeds = self.embeds[clip % len(self.embeds)]
            chunks = None if regime.frames is None else regime.chunks
            return play(
                lambda: BaselineStream(baseline, self.watch, embeds, regime.window, self.size, chunks),
                regime.chunks,
                regime.skip,
            )

        return made


def clip_chunks(pipe: Pipeline) -> int:
    """Whole chunks in a clip of the model's own length."""
    return pipeline_inputs.latent_frames(pipe.engine, pipe.frames) // pipe.config.chunk_frames


def interleaved(
    contestants: dict[str, Contestant],
    regime: Regime,
    limit: Limit | None = None,
    seen: Callable[[dict[str, Rounds]], object] = lambda runs: None,
) -> tuple[dict[str, Rounds], bool]:
    """Runs by contestant, round and clip: every clip is made by all, one after the other; and whether these are all.

    seen: told the runs after each of them. None is begun that, by the time of the contestant's last one, would end
    after the limit; from there on only shorter ones are made.
    """
    runs: dict[str, Rounds] = {name: [] for name in contestants}
    took, whole = dict.fromkeys(contestants, 0.0), True
    for number in range(regime.rounds):
        for clip in range(regime.clips):
            for name, made in contestants.items():
                if limit is not None and limit.over(took[name]):
                    whole = False
                    continue
                if len(runs[name]) == number:
                    runs[name].append([])
                start = time.perf_counter()
                runs[name][-1].append(made(regime, clip))
                took[name] = time.perf_counter() - start
                seen(runs)
    return runs, whole


def drawn(histogram: Sequence[float], count: int, seed: int) -> list[int]:
    """Steps of `count` chunks: n in the share histogram[n - 1], as nearly as whole numbers can (of equal remainders
    more steps win), in a random order."""
    exact = [share * count for share in histogram]
    quota = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: (round(quota[i] - exact[i], 9), -i))[: count - sum(quota)]:
        quota[i] += 1
    steps = [n for n, times in enumerate(quota, 1) for _ in range(times)]
    random.Random(seed).shuffle(steps)
    return steps


def check_histogram(histogram: Sequence[float], limit: int) -> None:
    if len(histogram) > limit or min(histogram) < 0 or abs(sum(histogram) - 1) > 1e-6:
        raise ValueError(
            f"{label(histogram)}: must be shares of at least 0 whose sum is 1, of chunks with 1 to {limit} steps; e.g. "
            f"{label(HISTOGRAM)}"
        )


def histogram_policy(histogram: Sequence[float], limit: int, seed: int) -> Callable[[Regime, int], Policy]:
    """Counts drawn once for all recorded chunks of a regime, and cut into its clips."""
    check_histogram(histogram, limit)

    def policy(regime: Regime, clip: int) -> Policy:
        steps = drawn(histogram, regime.clips * regime.chunks, seed)[clip * regime.chunks :][: regime.chunks]
        return PerChunk([limit] * regime.skip + steps)

    return policy


def label(histogram: Sequence[float]) -> str:
    """(0.25, 0, 0.75) -> histogram:1=0.25,3=0.75."""
    return "histogram:" + ",".join(f"{n}={share:g}" for n, share in enumerate(histogram, 1) if share)


def parse_histogram(text: str) -> tuple[float, ...]:
    """What `label` writes, in any order; or the shares of 1, 2, ... steps alone: 0.25,0,0.75."""
    parts = text.removeprefix("histogram:").split(",")
    try:
        if not any("=" in part for part in parts):
            return tuple(float(part) for part in parts)
        shares = {int(n): float(share) for n, _, share in (part.partition("=") for part in parts)}
    except ValueError as error:
        raise ValueError(f"{text}: must be STEPS=SHARE,..., e.g. {label(HISTOGRAM)}") from error
    if len(shares) < len(parts) or min(shares) < 1 or max(shares) > 1000:
        raise ValueError(f"{text}: must name each number of steps once, from 1 on; e.g. {label(HISTOGRAM)}")
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
        parts = CausalDiT(config), ConfidenceHead(config), PixelCodec() if small else VAES[vae or "wan"]()
    # A part may keep some buffers on the CPU whatever device it is made on: it is moved as a loaded one is.
    dit, head, decoder = (part.to(device, dtype).requires_grad_(False).eval() for part in parts)
    sizes = {"height": 64, "width": 64, "frames": 48, "fps": 12.0}
    sizes = sizes if small else {"height": 480, "width": 832, "frames": 81, "fps": 16.0}
    return Pipeline(Engine(dit, head, decoder, None, rollout, max_sessions=1), name=name, **sizes)


def embeddings(pipe: Pipeline, clips: int, seed: int) -> list[Tensor]:
    """Of a prompt a clip, from the synthetic world's grammar; random ones of a usual length without a text encoder."""
    model, draw = pipe.engine.dit.config, np.random.default_rng(seed)
    if pipe.engine.text is not None:
        return [pipe.engine.encode([str(sample_captions(draw, 1)[0])]) for _ in range(clips)]
    shape = (1, min(roofline.TEXT_KEYS, model.text_len), model.text_dim)
    return [torch.from_numpy(draw.standard_normal(shape)).to(pipe.engine.dit.device, pipe.engine.dit.dtype)] * clips
