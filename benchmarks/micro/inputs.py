"""Inputs, outputs and the float32 truth of every op that is timed: what a backend is given and judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.micro.roofline import KEY_FRAMES, VAE_LEVELS, Row, Sizes
from dsa_engine.ops import CacheScales, FinalLayer, HeadWeights, RowwiseFP8, StopRule, reference

EPS = 1e-6
E4M3 = torch.float8_e4m3fn
# An FP8 attention rounds queries and probabilities to e4m3 as well (2.6 % each, root mean square), which plain torch,
# whose errors the other limits follow, does not.
FP8_ATTENTION = 0.06
TWICE, FLOOR = 2.0, 1e-4  # of plain torch's error in the same dtype; one that rounds nowhere leaves no room at all


class Draw:
    """Fresh random tensors: the seed gives all of them. On the meta device only their shapes."""

    def __init__(self, device: torch.device | str, seed: int):
        self.device = torch.device(device)
        self.source = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype=torch.bfloat16, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.source, device=self.device).mul_(std).to(dtype)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.source, device=self.device) * (high - low) + low

    def e4m3(self, *shape: int) -> Tensor:
        """The largest magnitudes are near 448, as after a scale that was chosen so."""
        return reference.to_e4m3(self.normal(*shape, dtype=torch.float32, std=100.0))

    def rowwise(self, *shape: int) -> RowwiseFP8:
        return RowwiseFP8(self.e4m3(*shape), self.between(0.005, 0.02, *shape[:-1], 1))

    def whole(self, values: Sequence, dtype=torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def inputs(row: Row, s: Sizes, device: torch.device | str, seed: int) -> tuple:
    """Arguments for the op of that name, in `reference`'s order."""
    return MAKERS[row.op](Draw(device, seed), row, s)


def _cache(d: Draw, row: Row, s: Sizes, frames: int, scale: float) -> tuple[Tensor, Tensor, CacheScales | None]:
    """scale: about that of an FP8 cache, a little different for each head."""
    shape = (1, frames, s.S, s.H, s.config.head_dim)
    if row.precision == "bf16":
        return d.normal(*shape), d.normal(*shape), None
    k, v = (d.between(0.8 * scale, 1.2 * scale, 1, s.H) for _ in range(2))
    scales = CacheScales(k, v)
    return d.e4m3(*shape), d.e4m3(*shape), scales


def norm_rope_append(d: Draw, row: Row, s: Sizes) -> tuple:
    q, k, v = d.normal(1, s.T, 3 * s.C).split(s.C, dim=-1)  # views of one product, as in the model
    gains = d.normal(s.C), d.normal(s.C)
    angles = d.between(0, 6.28, 1, s.T, s.config.head_dim // 2)
    k_cache, v_cache, scales = _cache(d, row, s, s.F, scale=0.025)  # nothing is clamped
    place = d.whole([0]), d.whole([[*range(1, s.F), 0]])  # as where the ring wraps
    return q, k, v, *gains, angles.cos(), angles.sin(), EPS, k_cache, v_cache, *place, scales


def attention(d: Draw, row: Row, s: Sizes) -> tuple:
    k_cache, v_cache, scales = _cache(d, row, s, max(KEY_FRAMES), scale=0.01)  # keys of unit variance
    q = d.normal(1, s.T, s.H, s.config.head_dim)
    return q, k_cache, v_cache, d.whole([0]), d.whole([[[0, row.frames]]]), scales


def cross_attention(d: Draw, row: Row, s: Sizes) -> tuple:
    q = d.normal(1, s.T, s.H, s.config.head_dim)
    k, v = (d.normal(1, s.config.text_len, s.H, s.config.head_dim) for _ in range(2))
    if row.what.startswith("keys"):
        return q, k, v, None, None
    return q, k, v, d.whole([row.keys]), d.whole([s.config.text_len + 1 - row.keys], torch.float32)


def _vectors(d: Draw, s: Sizes, count: int) -> list[Tensor]:
    return [d.normal(1, s.F, s.C, dtype=torch.float32, std=0.5) for _ in range(count)]


def modulate(d: Draw, row: Row, s: Sizes) -> tuple:
    return d.normal(1, s.T, s.C), *_vectors(d, s, 2), EPS, row.precision == "fp8"


def gate_residual(d: Draw, row: Row, s: Sizes) -> tuple:
    return d.normal(1, s.T, s.C), d.normal(1, s.T, s.C), *_vectors(d, s, 1)


def residual_modulate(d: Draw, row: Row, s: Sizes) -> tuple:
    return d.normal(1, s.T, s.C), d.normal(1, s.T, s.C), *_vectors(d, s, 3), EPS, row.precision == "fp8"


def gelu_bias(d: Draw, row: Row, s: Sizes) -> tuple:
    return d.normal(1, s.T, s.config.ffn_dim), d.normal(s.config.ffn_dim), row.precision == "fp8"


def linear(d: Draw, row: Row, s: Sizes) -> tuple:
    n, k, _, bias = s.products[row.what]
    return d.normal(1, s.T, k), d.normal(n, k, std=k**-0.5), d.normal(n) if bias else None


def linear_gelu(d: Draw, row: Row, s: Sizes) -> tuple:
    n, k, _, _ = s.products[row.what]
    return d.normal(1, s.T, k), d.normal(n, k, std=k**-0.5), d.normal(n)


def fp8_linear(d: Draw, row: Row, s: Sizes) -> tuple:
    n, k, _, bias = s.products[row.what]
    return d.rowwise(1, s.T, k), d.rowwise(n, k), d.normal(n) if bias else None, torch.bfloat16


def epilogue(d: Draw, row: Row, s: Sizes) -> tuple:
    latent = (1, s.F, s.config.in_dim, *s.latent)
    hidden = d.normal(1, s.T, s.C)
    time, x, noise = d.normal(1, s.F, s.C), d.normal(*latent), d.normal(*latent)
    final = FinalLayer(*_vectors(d, s, 2), d.normal(s.patch, s.C, std=s.C**-0.5), d.normal(s.patch))
    wide = s.C // 2
    head = HeadWeights(d.normal(wide, 3 * s.C, std=s.C**-0.5), d.normal(wide), d.normal(1, wide, std=0.05), d.normal(1))
    counts = (d.whole([n], torch.int32) for n in (2, 1, 4, 0))
    rule = StopRule(*counts, d.whole([0.5], torch.float32))
    # One level a row, expanded over its frames: the strides that the engine passes (engine/inputs.py).
    levels = (d.between(*bounds, 1, 1).expand(-1, s.F) for bounds in ((0.5, 1.0), (0.0, 0.5)))
    return hidden, time, x, noise, *levels, final, head, rule, EPS


def gaussian(d: Draw, row: Row, s: Sizes) -> tuple:
    seed = torch.randint(2**62, (1,), generator=d.source, device=d.device)
    return seed, d.whole([7]), d.whole([2]), (s.F, s.config.in_dim, *s.latent)


def _activation(d: Draw, row: Row, s: Sizes) -> tuple[Tensor, int]:
    """Channels last, of the level that the row names, and its channels."""
    channels, scale = next(level for level in VAE_LEVELS if row.what.startswith(f"{level[0]} "))
    return d.normal(1, s.F * min(scale, 4), scale * s.latent[0], scale * s.latent[1], channels), channels


def norm_silu(d: Draw, row: Row, s: Sizes) -> tuple:
    x, channels = _activation(d, row, s)
    return x, d.normal(channels), True, d.normal(channels)


def bias_residual(d: Draw, row: Row, s: Sizes) -> tuple:
    x, channels = _activation(d, row, s)
    return x, d.normal(*x.shape), d.normal(channels)


MAKERS = {
    "norm_rope_append": norm_rope_append,
    "attention": attention,
    "cross_attention": cross_attention,
    "modulate": modulate,
    "gate_residual": gate_residual,
    "residual_modulate": residual_modulate,
    "gelu_bias": gelu_bias,
    "linear": linear,
    "linear_gelu": linear_gelu,
    "fp8_linear": fp8_linear,
    "epilogue": epilogue,
    "gaussian": gaussian,
    "norm_silu": norm_silu,
    "bias_residual": bias_residual,
    "rms_norm": lambda d, row, s: (d.normal(1, s.T, s.C), d.normal(s.C), EPS),
    "quantise": lambda d, row, s: (d.normal(1, s.T, s.C),),
    "pool_frames": lambda d, row, s: (d.normal(1, s.T, s.C), s.F, EPS),
}


def widened(value):
    """bfloat16 tensors as float32, all else as it is; through the tuples that `ops` takes."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, tuple):
        parts = [widened(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def truth(row: Row, args: tuple) -> list[Tensor]:
    """What the op means, in float32 with nothing rounded to FP8 that was not given so."""
    wide = widened(args)
    if row.op == "linear":
        return [F.linear(*wide)]
    if row.op == "linear_gelu":
        return [F.gelu(F.linear(*wide), approximate="tanh")]
    if row.op == "quantise":
        return [wide[0]]
    if row.op == "fp8_linear":
        return [reference.fp8_linear(*wide[:3], torch.float32)]
    if row.op == "norm_rope_append":
        *front, k_cache, v_cache, slot, write, _ = wide
        caches = k_cache.to(torch.float32, copy=True), v_cache.to(torch.float32, copy=True)
        return [reference.norm_rope_append(*front, *caches, slot, write, None), *caches]
    if row.op in ("modulate", "residual_modulate", "gelu_bias"):
        wide = (*wide[:-1], False)
    return outputs(row, wide, getattr(reference, row.op)(*wide))


def outputs(row: Row, args: tuple, result) -> list[Tensor]:
    """All numbers that a call made, in float32, those of FP8 as what they stand for."""
    if row.op == "norm_rope_append":
        *_, k_cache, v_cache, _, _, scales = args
        k, v = k_cache.float(), v_cache.float()
        if scales is not None:
            k = k * scales.k[:, None, None, :, None]
            v = v * scales.v[:, None, None, :, None]
        return [result.float(), k, v]
    if isinstance(result, RowwiseFP8):
        return [result.values.float() * result.scale]
    if isinstance(result, Tensor):
        return [result.float()]
    return [part for member in result for part in outputs(row, args, member)]


def hostile(row: Row, args: tuple) -> tuple:
    """NaN in everything that must be written or must not be read: caches before an append, frames and keys that are
    not valid. Written in place."""
    nan = float("nan")
    if row.op == "norm_rope_append":
        for cache in args[8:10]:
            cache.fill_(nan)
    if row.op == "attention":
        for cache in args[1:3]:
            cache[:, row.frames :].fill_(nan)
    if row.op == "cross_attention" and args[3] is not None:
        for x in args[1:3]:
            x[:, row.keys :].fill_(nan)
    return args


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||found - expected|| / ||expected|| of the worst output; NaN if any is not finite."""
    shares = []
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        shares.append(((one - other.view(one.shape)).norm() / other.norm()).item())
    return max(shares) if all(share == share and share != float("inf") for share in shares) else float("nan")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out unwritten holds NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def limit(row: Row, plain: float) -> float:
    """The largest error that passes, where plain torch in the same dtype has the error `plain`."""
    if row.op == "attention" and row.precision == "fp8":
        return FP8_ATTENTION
    return TWICE * plain + FLOOR
