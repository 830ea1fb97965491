"""The memory of a device: what a model takes of it, predicted and measured, and which parts had better be elsewhere.

Predicted are the live tensors of this package's own forwards; `tests/models/test_memory_estimate.py` counts them on the meta
device. What CUDA itself, cuDNN's workspaces and the allocator's rounding take is `CONTEXT`: an allowance, not measured.
"""

from __future__ import annotations

import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.fp8 import E4M3
from dsa_engine.models.offload import Offloaded
from dsa_engine.models.streaming_vae import StreamingVAE
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.shapes.codec import PixelCodec

logger = logging.getLogger(__name__)

CONTEXT = 500_000_000  # bytes
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GB of 10^9 bytes; a card sold as 12 GB has 12.88
BIG_CARDS, WINDOWS = (80, 141), (21, 12)  # of `report`'s table of sessions, GB and latent frames
ROWS = 8  # of a forward, at most, where many sessions share it (`engine.Runner`)
MOST = 100_000  # sessions that are counted
# What may live on the CPU, the cheapest to do without first: prompts change seldom, every chunk is decoded.
PLACEMENTS: tuple[tuple[str, ...], ...] = ((), ("text",), ("text", "vae"))


@dataclass(frozen=True)
class Codec:
    """A video decoder's size in elements. state: what a stream remembers, for each pixel of a frame; work: at the peak
    of a decode beside states, for each pixel of the frames that are computed at once, which are those of
    `StreamingVAE.pass_frames` latent frames where it `streams`, else all."""

    name: str
    parameters: int
    state: float = 0.0
    work: float = 0.0
    streams: bool = True


@dataclass(frozen=True)
class TextSize:
    """A text encoder's size in elements. block: of its largest layer, one of which is there when it is offloaded."""

    name: str
    parameters: int
    block: int


WAN_VAE_FOOTPRINT = Codec("the Wan VAE", 126_892_531, state=2365.0, work=435.0)
TAEHV_FOOTPRINT = Codec("TAEHV", 11_315_539, state=84.0, work=140.0)
PIXEL_CODEC_FOOTPRINT = Codec("the pixel codec", 151_100, work=8.25, streams=False)
UMT5_XXL = TextSize("umT5-XXL", 5_680_910_336, 192_948_224)


@dataclass(frozen=True)
class Workload:
    """What is asked of a model. height, width: of the latents; frames: latent frames of a clip, which are the window
    where the rollout has none; sessions: cache slots; rows: of a forward, None for two a session, all at once; dtype:
    of weights and activations; cache: of keys and values, linear: of the weights of the blocks' products, None for the
    same."""

    height: int = 60
    width: int = 104
    frames: int = 21
    sessions: int = 1
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    linear: torch.dtype | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes of a device. held: all the time; work: beside that while a phase lasts.

    A stream denoises its next chunk while this one is decoded, and CUDA graphs keep the memory that they work with
    between two replays, each their own: so the two add up. A prompt is encoded between chunks.
    """

    held: dict[str, int]
    work: dict[str, int]

    @property
    def peak(self) -> int:
        beside = max((size for phase, size in self.work.items() if phase != "denoise"), default=0)
        return sum(self.held.values()) + self.work["denoise"] + beside


def predict(
    model: ModelConfig,
    rollout: RolloutConfig,
    load: Workload,
    *,
    codec: Codec | None = WAN_VAE_FOOTPRINT,
    text: TextSize | None = UMT5_XXL,
    weights: Mapping[str, int] | None = None,
    offload: Sequence[str] = (),
) -> Estimate:
    """What a model takes of its device. weights: bytes of parts, where they are not their parameters in load.dtype.

    Held: weights; each session's keys and values (`cache_bytes`), its prompt's, 2 * layers * text_len * dim elements,
    twice and once more for a row that has nothing to say, its latents and noise with them, and its decoder's state.
    Work: a forward in which the commit rides along, so over 2 T tokens a session, at the larger of its two peaks, the
    feed-forward's 2 ffn_dim + 5 dim elements a token and RoPE's 15 dim, with (30 + 12 layers) dim a frame for
    modulation and the prompts of its rows; a decode, `Codec.work` and one more state, since the one before stays good;
    a prompt in one layer of an offloaded text encoder. An offloaded decoder holds nothing, its states least of all, and
    works on one latent frame at a time (`Offloaded`).
    """
    size, tokens = load.dtype.itemsize, model.tokens_per_frame(load.height, load.width)
    counts = {"generator": dit_parameters(model), "confidence": head_parameters(model)}
    counts |= {"vae": codec.parameters if codec else 0, "text": text.parameters if text else 0}
    own = {part: size * count for part, count in counts.items()}
    if load.linear == E4M3:
        own["generator"] -= fp8_saves(model, size)
    own |= weights or {}
    away = {part for part in offload if part != "text" or text}  # of an encoder without a size nothing can be moved
    prompt = 2 * model.num_layers * model.dim * model.text_len * size
    latents = rollout.chunk_frames * model.in_dim * load.height * load.width * size
    held = {"cuda_context": CONTEXT} | {part: count for part, count in own.items() if count and part not in away}
    held["kv_cache"] = cache_bytes(model, rollout, load)
    held["prompt_kv"] = (2 * load.sessions + 1) * prompt
    held["inputs"] = (load.sessions + 1) * (2 + len(rollout.steps)) * latents
    a_frame = tokens * max(2 * model.ffn_dim + 5 * model.dim, 15 * model.dim)
    a_frame += (30 + 12 * model.num_layers) * model.dim
    work = {"denoise": (load.rows or 2 * load.sessions) * (rollout.chunk_frames * a_frame * size + prompt)}
    if codec:
        pixels = 64 * load.height * load.width
        state = size * round(codec.state * pixels)
        passes = StreamingVAE.pass_frames if codec.streams else rollout.chunk_frames
        frames = 1 if "vae" in away else min(passes, rollout.chunk_frames)
        frames *= StreamingVAE.temporal_stride if codec.streams else 1
        work["decode"] = size * round(codec.work * pixels * frames) + (own["vae"] if "vae" in away else state)
        if state and "vae" not in away:
            held["vae_state"] = state * load.sessions
    if text and "text" in away:
        work["prompt"] = own["text"] * text.block // text.parameters
    return Estimate(held, work)


def cache_bytes(model: ModelConfig, rollout: RolloutConfig, load: Workload) -> int:
    """Bytes of the KV cache: 2 * layers * frames * S * dim elements a session, of the whole clip, or of the window and
    a chunk more, where commits ride along; and a sink's keys once more where it moves with the window. In e4m3 also
    the float32 scales of each layer's heads."""
    window = rollout.window and rollout.window + rollout.chunk_frames
    frames = window or max(load.frames, rollout.sink + rollout.chunk_frames)
    halves = 2 * frames + (rollout.sink if rollout.rope == "relative" else 0)
    a_frame = model.num_layers * model.dim * model.tokens_per_frame(load.height, load.width)
    dtype = load.cache or load.dtype
    scales = 4 * model.num_layers * 2 * model.num_heads if dtype == E4M3 else 0
    return load.sessions * (halves * a_frame * dtype.itemsize + scales)


def fp8_saves(config: ModelConfig, size: int) -> int:
    """Bytes by which a `CausalDiT` of parameters of `size` bytes is smaller with its blocks' products in e4m3: q, k, v,
    o, the prompt's q and o, and the feed-forward; each output channel has a float32 scale."""
    weights = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    return config.num_layers * ((size - 1) * weights - 4 * (7 * config.dim + config.ffn_dim))


def sessions(model: ModelConfig, rollout: RolloutConfig, load: Workload, room: int, **sizes: Any) -> int:
    """How many sessions fit in `room` bytes, of forwards of at most ROWS rows; sizes as for `predict`."""

    def peak(count: int) -> int:
        one = replace(load, sessions=count, rows=min(2 * count, ROWS))
        return predict(model, rollout, one, **sizes).peak

    return bisect_right(range(1, MOST + 1), room, key=peak)


def sessions_table(model: ModelConfig, rollout: RolloutConfig, load: Workload, **sizes: Any) -> dict[str, Any]:
    """`sessions` by card, rolling window and dtype of the cache."""

    def count(card: int, window: int, cache: torch.dtype) -> int:
        rolling = replace(rollout, window=max(window, rollout.sink + rollout.chunk_frames))
        return sessions(model, rolling, replace(load, cache=cache), card * 10**9, **sizes)

    caches = {str(dtype).removeprefix("torch."): dtype for dtype in (load.dtype, E4M3)}
    return {
        f"{card} GB, window {window}": {name: count(card, window, dtype) for name, dtype in caches.items()}
        for card in BIG_CARDS
        for window in WINDOWS
    }


def dit_parameters(config: ModelConfig) -> int:
    """Parameters of a `CausalDiT`."""
    dim, patch = config.dim, config.patch_size[1] ** 2

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    ends = linear(config.in_dim * patch, dim) + linear(dim, config.out_dim * patch) + 2 * dim
    text = linear(config.text_dim, dim) + linear(dim, dim)
    time = linear(config.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    attention = 4 * linear(dim, dim) + 2 * dim
    feed_forward = linear(dim, config.ffn_dim) + linear(config.ffn_dim, dim)
    return ends + text + time + config.num_layers * (2 * attention + feed_forward + 8 * dim)


def head_parameters(config: ModelConfig) -> int:
    """Parameters of a `ConfidenceHead`."""
    return (3 * config.dim + 2) * (config.dim // 2) + 1


def report(model: ModelConfig, rollout: RolloutConfig, load: Workload, **sizes: Any) -> dict[str, Any]:
    """A prediction for people and JSON, sizes as for `predict`: what it is for, bytes held and worked with when nothing
    is offloaded, the peak of each placement, the first placement that fits a card (None: none does), and how many
    sessions fit the big ones, with nothing offloaded."""
    peaks = {name: predict(model, rollout, load, offload=name, **sizes).peak for name in PLACEMENTS}
    whole = predict(model, rollout, load, **sizes)
    codec, text = sizes.get("codec", WAN_VAE_FOOTPRINT), sizes.get("text", UMT5_XXL)
    window = rollout.window or max(load.frames, rollout.sink + rollout.chunk_frames)
    parts = [part.name for part in (codec, text) if part]
    about = [f"latents of {load.width}x{load.height}", f"a window of {window} latent frames"]
    about += [str(load.dtype).removeprefix("torch."), f"{load.sessions} session{'s' * (load.sessions > 1)}", *parts]
    about += [f"{name} in FP8" for name in ("linear", "cache") if getattr(load, name) == E4M3]
    fits = {card: next((name for name, peak in peaks.items() if peak <= card * 10**9), None) for card in CARDS}
    return {
        "for": ", ".join(about),
        "held": whole.held,
        "work": whole.work,
        "peak": {f"offload {named(name)}": peak for name, peak in peaks.items()},
        "fits": {f"{card} GB": None if name is None else f"offload {named(name)}" for card, name in fits.items()},
        "sessions": sessions_table(model, rollout, load, **sizes),
    }


def named(placement: Sequence[str]) -> str:
    return ",".join(placement) or "nothing"


def shown(facts: Any) -> Any:
    """The same with bytes as people read them: 6.04 GB, of 10^9 bytes. Sessions are not bytes."""
    if isinstance(facts, dict):
        return {name: value if name == "sessions" else shown(value) for name, value in facts.items()}
    if not isinstance(facts, int):
        return facts
    return f"{facts / 1e9:.2f} GB" if facts >= 1e7 else f"{facts / 1e6:.2f} MB"


def sizes_of(parts: Mapping[str, nn.Module | None]) -> dict[str, Any]:
    """The sizes that `predict` takes, of the parts generator, confidence, vae and text, any of which may be None.

    A text encoder that can be offloaded tells its own `size`.
    """
    weights = {name: 0 if part is None else part_bytes(part) for name, part in parts.items()}
    return {"codec": codec_of(parts["vae"]), "text": getattr(parts["text"], "size", None), "weights": weights}


def codec_of(decoder: nn.Module | None) -> Codec | None:
    """The size of a decoder, less for a narrower one. Of a foreign module only the weights are known."""
    if decoder is None:
        return None
    inner = decoder.codec if isinstance(decoder, Offloaded) else decoder
    parameters = sum(p.numel() for p in inner.parameters())
    for kind, codec, full in (
        (WanVAE, WAN_VAE_FOOTPRINT, 96),
        (TAEHV, TAEHV_FOOTPRINT, 64),
        (PixelCodec, PIXEL_CODEC_FOOTPRINT, 32),
    ):
        if isinstance(inner, kind):
            first = next(layer for layer in inner.encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d)))
            share = first.out_channels / full
            return replace(codec, parameters=parameters, state=share * codec.state, work=share * codec.work)
    return Codec(type(inner).__name__, parameters)


def tensors(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def part_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each tensor once."""
    return sum(tensor.nbytes for tensor in tensors(module))


def measure(parts: Mapping[str, nn.Module | None], device: torch.device | str = "cpu") -> dict[str, Any]:
    """What there is, in bytes: weights by part and place ("unread": still in their file), and memory in use now and at
    its peak: of a CUDA device as its allocator counts it, and of the process, None where the system does not say."""
    weights: dict[str, dict[str, int]] = {}
    for name, part in parts.items():
        for tensor in tensors(part) if part is not None else ():
            place = "unread" if tensor.is_meta else str(tensor.device)
            weights.setdefault(name, {}).setdefault(place, 0)
            weights[name][place] += tensor.nbytes
    facts: dict[str, Any] = {"weights": weights}
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.memory_allocated(device)
        facts["device_peak"] = torch.cuda.max_memory_allocated(device)
    return facts | {"process": resident(), "process_peak": resident_peak()}


def resident() -> int | None:
    """Bytes of this process that are in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def resident_peak() -> int | None:
    """The most bytes of this process that ever were in memory."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else 1024 * peak, resident() or 0)  # the system's own lags behind


def room(device: torch.device) -> int:
    """Bytes that can still be had on a CUDA device: free ones, and those that the allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose(peaks: Mapping[tuple[str, ...], int], available: int) -> tuple[str, ...]:
    """The first placement whose peak is available; the last, with a warning, where none is."""
    for placement, peak in peaks.items():
        if peak <= available:
            logger.info("offload %s: %s of %s", named(placement), shown(peak), shown(available))
            return placement
    logger.warning(
        "offload %s: %s of %s, so memory may run out; a smaller window, fewer max_sessions or vae='taehv' take less",
        named(placement),
        shown(peak),
        shown(available),
    )
    return placement


def placement_of(offload: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parts from their names: one, several with commas between, or a sequence. ValueError for an unknown one."""
    given = offload.split(",") if isinstance(offload, str) else offload or ()
    chosen = tuple(name.strip() for name in given)
    if strange := [name for name in chosen if name not in PLACEMENTS[-1]]:
        raise ValueError(
            f"offload={', '.join(strange)}: must be 'auto', None, or of {', '.join(PLACEMENTS[-1])}; the DiT stays"
        )
    return chosen
