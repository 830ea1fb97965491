"""Device memory of a model: predicted, measured, and which parts to offload so that it fits.

Predicted are the live tensors of this package's own forwards; `tests/models/test_memory_estimate.py` counts them on the
meta device. `CUDA_CONTEXT_BYTES` is an allowance, not measured, for CUDA itself, cuDNN's workspaces and the allocator's
rounding.
"""

from __future__ import annotations

import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.fp8 import E4M3, quantize_linears
from dsa_engine.models.offload import OffloadedCodec
from dsa_engine.models.streaming_vae import StreamingVAE
from dsa_engine.models.taehv import TAEHV
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.shapes.codec import PixelCodec

logger = logging.getLogger(__name__)

CUDA_CONTEXT_BYTES = 500_000_000
GPU_SIZES_GB = (8, 12, 16, 24, 32, 48, 80, 141)  # of 10^9 bytes; a GPU sold with 12 GB has 12.88
LARGE_GPU_SIZES_GB, TABLE_WINDOWS = (80, 141), (21, 12)  # of `report`'s table of sessions; windows in latent frames
MAX_BATCH_ROWS = 8  # of one forward, where many sessions share it (`engine.BatchRunner`)
MAX_SESSIONS = 100_000  # upper end of the search
# Parts on the CPU, cheapest first: prompts change seldom, every chunk is decoded.
PLACEMENTS: tuple[tuple[str, ...], ...] = ((), ("text",), ("text", "vae"))


@dataclass(frozen=True)
class VAEFootprint:
    """A video decoder's size in elements.

    state: kept by a stream between chunks, per pixel of a frame. work: peak of a decode without states, per pixel of
    the frames computed at once: those of `StreamingVAE.pass_frames` latent frames if it `streams`, else of the chunk.
    """

    name: str
    parameters: int
    state: float = 0.0
    work: float = 0.0
    streams: bool = True


@dataclass(frozen=True)
class TextFootprint:
    """A text encoder's size in elements. block: its largest layer, all that is on the device when it is offloaded."""

    name: str
    parameters: int
    block: int


WAN_VAE_FOOTPRINT = VAEFootprint("the Wan VAE", 126_892_531, state=2365.0, work=435.0)
TAEHV_FOOTPRINT = VAEFootprint("TAEHV", 11_315_539, state=84.0, work=140.0)
PIXEL_CODEC_FOOTPRINT = VAEFootprint("the pixel codec", 151_100, work=8.25, streams=False)
UMT5_XXL = TextFootprint("umT5-XXL", 5_680_910_336, 192_948_224)


@dataclass(frozen=True)
class Workload:
    """What a model is used for."""

    height: int = 60  # latent pixels
    width: int = 104
    frames: int = 21  # latent frames of a clip: the window, where the rollout has none
    sessions: int = 1  # cache slots
    dtype: torch.dtype = torch.bfloat16  # weights and activations
    cache: torch.dtype | None = None  # keys and values, None for `dtype`
    linear: torch.dtype | None = None  # weights of the blocks' GEMMs, None for `dtype`
    rows: int | None = None  # of a forward, None for two per session at once


@dataclass(frozen=True)
class Estimate:
    """Bytes of a device. resident: all the time; transient: on top of it while a phase lasts.

    A stream denoises its next chunk while this one is decoded, and each CUDA graph keeps its own working memory between
    replays: so these two phases add up. A prompt is encoded between chunks.
    """

    resident: dict[str, int]
    transient: dict[str, int]

    @property
    def peak(self) -> int:
        beside = max((size for phase, size in self.transient.items() if phase != "denoise"), default=0)
        return sum(self.resident.values()) + self.transient["denoise"] + beside


def predict(
    model: ModelConfig,
    rollout: RolloutConfig,
    load: Workload,
    *,
    vae: VAEFootprint | None = WAN_VAE_FOOTPRINT,
    text: TextFootprint | None = UMT5_XXL,
    weights: Mapping[str, int] | None = None,
    offload: Sequence[str] = (),
) -> Estimate:
    """What a model takes of its device. weights: bytes of parts, where they are not their parameters in load.dtype.

    Resident: weights; KV cache (`cache_bytes`); prompt K/V: 2 x layers x text_len x dim elements, held twice per
    session (source and slot copy) plus one scratch row; latents with their noise; decoder states.
    Transient, per phase:
        denoise: a forward with the commit riding along, so 2 T tokens per session. Per token the larger of its two
            peaks: the feed-forward's 2 ffn_dim + 5 dim elements, or RoPE's 15 dim; per frame (30 + 12 layers) dim for
            modulation; and the prompts of its rows.
        decode: `VAEFootprint.work` and one more state, since the previous one stays valid. An offloaded decoder keeps
            nothing resident and works on one latent frame at a time (`OffloadedCodec`).
        prompt: one layer of an offloaded text encoder.
    """
    size, tokens = load.dtype.itemsize, model.tokens_per_frame(load.height, load.width)
    own = {
        "generator": _dit_bytes(model, load.dtype, load.linear == E4M3),
        "confidence": _head_bytes(model, load.dtype),
        "vae": size * vae.parameters if vae else 0,
        "text": size * text.parameters if text else 0,
    }
    own |= weights or {}
    away = {part for part in offload if part != "text" or text}  # an encoder of unknown size cannot be moved
    prompt = 2 * model.num_layers * model.dim * model.text_len * size
    latents = rollout.chunk_frames * model.in_dim * load.height * load.width * size
    resident = {"cuda_context": CUDA_CONTEXT_BYTES}
    resident |= {part: count for part, count in own.items() if count and part not in away}
    resident["kv_cache"] = cache_bytes(model, rollout, load)
    resident["prompt_kv"] = (2 * load.sessions + 1) * prompt
    resident["inputs"] = (load.sessions + 1) * (2 + len(rollout.steps)) * latents
    per_frame = tokens * max(2 * model.ffn_dim + 5 * model.dim, 15 * model.dim)
    per_frame += (30 + 12 * model.num_layers) * model.dim
    transient = {"denoise": (load.rows or 2 * load.sessions) * (rollout.chunk_frames * per_frame * size + prompt)}
    if vae:
        pixels = 64 * load.height * load.width
        state = size * round(vae.state * pixels)
        passes = StreamingVAE.pass_frames if vae.streams else rollout.chunk_frames
        frames = 1 if "vae" in away else min(passes, rollout.chunk_frames)
        frames *= StreamingVAE.temporal_stride if vae.streams else 1
        transient["decode"] = size * round(vae.work * pixels * frames) + (own["vae"] if "vae" in away else state)
        if state and "vae" not in away:
            resident["vae_state"] = state * load.sessions
    if text and "text" in away:
        transient["prompt"] = own["text"] * text.block // text.parameters
    return Estimate(resident, transient)


def cache_bytes(model: ModelConfig, rollout: RolloutConfig, load: Workload) -> int:
    """Bytes of the KV cache: 2 x layers x frames x S x dim elements per session.

    frames: the whole clip, or the window and one chunk more, where commits ride along. A sink that moves with the
    window (rope="relative") has its keys once more. In e4m3 the float32 scales per layer and head are added.
    """
    window = rollout.window and rollout.window + rollout.chunk_frames
    frames = window or max(load.frames, rollout.sink + rollout.chunk_frames)
    halves = 2 * frames + (rollout.sink if rollout.rope == "relative" else 0)
    per_frame = model.num_layers * model.dim * model.tokens_per_frame(load.height, load.width)
    dtype = load.cache or load.dtype
    scales = 4 * model.num_layers * 2 * model.num_heads if dtype == E4M3 else 0
    return load.sessions * (halves * per_frame * dtype.itemsize + scales)


@cache
def _dit_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> int:
    with torch.device("meta"):
        dit = CausalDiT(config).to(dtype)
    if fp8:
        quantize_linears(dit)
    return module_bytes(dit)


@cache
def _head_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return module_bytes(PooledHead(config).to(dtype))


def count_sessions(model: ModelConfig, rollout: RolloutConfig, load: Workload, available: int, **parts: Any) -> int:
    """How many sessions fit in `available` bytes, with forwards of up to MAX_BATCH_ROWS rows; parts as of `predict`."""

    def peak(count: int) -> int:
        one = replace(load, sessions=count, rows=min(2 * count, MAX_BATCH_ROWS))
        return predict(model, rollout, one, **parts).peak

    return bisect_right(range(1, MAX_SESSIONS + 1), available, key=peak)


def sessions_table(model: ModelConfig, rollout: RolloutConfig, load: Workload, **parts: Any) -> dict[str, Any]:
    """`count_sessions` by GPU size, rolling window and dtype of the cache."""

    def count(gb: int, window: int, cache: torch.dtype) -> int:
        rolling = replace(rollout, window=max(window, rollout.sink + rollout.chunk_frames))
        return count_sessions(model, rolling, replace(load, cache=cache), gb * 10**9, **parts)

    caches = {str(dtype).removeprefix("torch."): dtype for dtype in (load.dtype, E4M3)}
    return {
        f"{gb} GB, window {window}": {name: count(gb, window, dtype) for name, dtype in caches.items()}
        for gb in LARGE_GPU_SIZES_GB
        for window in TABLE_WINDOWS
    }


def report(model: ModelConfig, rollout: RolloutConfig, load: Workload, **parts: Any) -> dict[str, Any]:
    """A prediction for people and JSON, parts as of `predict`.

    for: what it holds for; held, work: resident and transient bytes with nothing offloaded; peak: of each placement;
    fits: the first placement that fits a GPU, None where none does; sessions: how many fit large GPUs.
    """
    peaks = {name: predict(model, rollout, load, offload=name, **parts).peak for name in PLACEMENTS}
    whole = predict(model, rollout, load, **parts)
    vae, text = parts.get("vae", WAN_VAE_FOOTPRINT), parts.get("text", UMT5_XXL)
    window = rollout.window or max(load.frames, rollout.sink + rollout.chunk_frames)
    about = [f"latents of {load.width}x{load.height}", f"a window of {window} latent frames"]
    about += [str(load.dtype).removeprefix("torch."), f"{load.sessions} session{'s' * (load.sessions > 1)}"]
    about += [part.name for part in (vae, text) if part]
    about += [f"{name} in FP8" for name in ("linear", "cache") if getattr(load, name) == E4M3]
    fits = {gb: next((name for name, peak in peaks.items() if peak <= gb * 10**9), None) for gb in GPU_SIZES_GB}
    return {
        "for": ", ".join(about),
        "held": whole.resident,
        "work": whole.transient,
        "peak": {f"offload {_join(name)}": peak for name, peak in peaks.items()},
        "fits": {f"{gb} GB": None if name is None else f"offload {_join(name)}" for gb, name in fits.items()},
        "sessions": sessions_table(model, rollout, load, **parts),
    }


def _join(placement: Sequence[str]) -> str:
    return ",".join(placement) or "nothing"


def format_bytes(facts: Any) -> Any:
    """Facts with bytes as people read them: 6.04 GB, of 10^9 bytes. Counts of sessions stay numbers."""
    if isinstance(facts, dict):
        return {name: value if name == "sessions" else format_bytes(value) for name, value in facts.items()}
    if not isinstance(facts, int):
        return facts
    return f"{facts / 1e9:.2f} GB" if facts >= 1e7 else f"{facts / 1e6:.2f} MB"


def footprints(parts: Mapping[str, nn.Module | None]) -> dict[str, Any]:
    """`predict`'s vae, text and weights, of the parts generator, confidence, vae and text, any of which may be None.

    A text encoder that can be offloaded has its own `footprint`.
    """
    weights = {name: 0 if part is None else module_bytes(part) for name, part in parts.items()}
    return {"vae": vae_footprint(parts["vae"]), "text": getattr(parts["text"], "footprint", None), "weights": weights}


def vae_footprint(decoder: nn.Module | None) -> VAEFootprint | None:
    """The size of a decoder, less for a narrower one. Of a foreign module only the weights are known."""
    if decoder is None:
        return None
    inner = decoder.codec if isinstance(decoder, OffloadedCodec) else decoder
    parameters = sum(p.numel() for p in inner.parameters())
    for kind, footprint, full_width in (
        (WanVAE, WAN_VAE_FOOTPRINT, 96),
        (TAEHV, TAEHV_FOOTPRINT, 64),
        (PixelCodec, PIXEL_CODEC_FOOTPRINT, 32),
    ):
        if isinstance(inner, kind):
            first = next(layer for layer in inner.encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d)))
            share = first.out_channels / full_width
            return replace(footprint, parameters=parameters, state=share * footprint.state, work=share * footprint.work)
    return VAEFootprint(type(inner).__name__, parameters)


def module_tensors(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each tensor once."""
    return sum(tensor.nbytes for tensor in module_tensors(module))


def measure(parts: Mapping[str, nn.Module | None], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Bytes in use: weights by part and device ("unread": still in their file), and memory now and at its peak, of a
    CUDA device as its allocator counts it, and of the process, None where the system does not say."""
    weights: dict[str, dict[str, int]] = {}
    for name, part in parts.items():
        for tensor in module_tensors(part) if part is not None else ():
            where = "unread" if tensor.is_meta else str(tensor.device)
            held = weights.setdefault(name, {})
            held[where] = held.get(where, 0) + tensor.nbytes
    facts: dict[str, Any] = {"weights": weights}
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.memory_allocated(device)
        facts["device_peak"] = torch.cuda.max_memory_allocated(device)
    return facts | {"process": process_memory(), "process_peak": process_memory_peak()}


def process_memory() -> int | None:
    """Resident bytes of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def process_memory_peak() -> int | None:
    """Peak of the resident bytes of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else 1024 * peak, process_memory() or 0)  # the system's own lags behind


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a CUDA device: free ones, and those that the allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def pick_offload(peaks: Mapping[tuple[str, ...], int], available: int) -> tuple[str, ...]:
    """The first placement whose peak is available; the last, with a warning, where none is."""
    for placement, peak in peaks.items():
        if peak <= available:
            logger.info("offload %s: %s of %s", _join(placement), format_bytes(peak), format_bytes(available))
            return placement
    logger.warning(
        "offload %s: %s of %s, so memory may run out; a smaller window, fewer max_sessions or vae='taehv' take less",
        _join(placement),
        format_bytes(peak),
        format_bytes(available),
    )
    return placement


def parse_offload(offload: str | Sequence[str] | None) -> tuple[str, ...]:
    """Parts from their names: one, several with commas between, or a sequence. ValueError for an unknown one."""
    names = offload.split(",") if isinstance(offload, str) else offload or ()
    chosen = tuple(name.strip() for name in names)
    if unknown := [name for name in chosen if name not in PLACEMENTS[-1]]:
        raise ValueError(
            f"offload={', '.join(unknown)}: must be 'auto', None, or of {', '.join(PLACEMENTS[-1])}; the DiT stays"
        )
    return chosen
