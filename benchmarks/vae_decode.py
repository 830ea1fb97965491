"""The Wan VAE's decode of a usual chunk, three ways: is it right, and how long does it take on this GPU.

    eager           plain torch op by op, channels first (`plain_vae.py`)
    channels_last   the decoder as it is (`models/vae.py`), launched op by op
    graphed         the same as one CUDA graph (`engine/decoder.py`), its convolutions chosen by time

The weights are random. Right is an error of at most twice plain torch's in the same dtype, both against its float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from benchmarks import cases, plain_vae
from benchmarks.timing import clock, measure
from dsa_engine.engine.decoder import ChunkDecoder
from dsa_engine.models.vae import WanVAE

ROW = "vae_decode"
WAYS = ("eager", "channels_last", "graphed")


def judge(latents: tuple[int, ...], device: str, seed: int, seconds: float | None, dim: int = 96) -> list[dict]:
    """A result for each way, of the third chunk of a clip; latents: a chunk's shape [B, F, 16, h, w]; seconds: of
    timing, None for none; dim: the VAE's, narrower for a try."""
    torch.manual_seed(seed)
    vae, draw = WanVAE(dim=dim).requires_grad_(False).eval().to(device), cases.Draw(device, seed)
    chunks = [draw.normal(*latents) for _ in range(3)]
    with torch.no_grad():
        expected = third("eager", vae, chunks)().clone()
        vae, results = vae.to(torch.bfloat16), []
        for way in WAYS:
            call = third(way, vae, chunks)
            error = cases.distance([call().float()], [expected])
            limit = cases.TWICE * (error if way == "eager" else results[0]["error"]) + cases.FLOOR
            found = {"op": ROW, "row": ROW, "backend": way, "error": error, "limit": limit}
            found["status"] = "ok" if error <= limit else "wrong"  # NaN is wrong
            if found["status"] == "ok" and seconds is not None:
                found |= asdict(measure([call], clock(device, capture=False), seconds))
            results.append(found)
    return results


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
    decoder = ChunkDecoder(vae, chunk.shape)
    if chunk.is_cuda:
        decoder.capture()
    return decoder.decode
