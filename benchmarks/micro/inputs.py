"""Inputs of every op that is timed, its outputs, and what they must be in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.micro.roofline import KEY_FRAMES, VAE_LEVELS, Row, Sizes
from dsa_engine.models.confidence import TOKENS
from dsa_engine.models.wan_vae import WanVAE
from dsa_engine.ops import CacheScales, FinalLayer, HeadWeights, RowwiseFP8, StopRule, reference

EPS = 1e-6
# An FP8 attention rounds queries and probabilities to e4m3 as well (2.6 % each, root mean square), which plain torch,
# whose errors the other tolerances follow, does not.
FP8_ATTENTION = 0.06
TWICE, FLOOR = 2.0, 1e-4  # of plain torch's error in the same dtype; one that rounds nowhere leaves no room at all


class TensorFactory:
    """Fresh random tensors: the seed gives all of them. On the meta device only their shapes."""

    def __init__(self, device: torch.device | str, seed: int):
        self.device = torch.device(device)
        self.source = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype=torch.bfloat16, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.source, device=self.device).mul_(std).to(dtype)

    def normals(self, count: int, *shape: int) -> list[Tensor]:
        return [self.normal(*shape) for _ in range(count)]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.source, device=self.device) * (high - low) + low

    def e4m3(self, *shape: int) -> Tensor:
        """The largest magnitudes are near 448, as after a scale that was chosen so."""
        return reference.to_e4m3(self.normal(*shape, dtype=torch.float32, std=100.0))

    def rowwise(self, *shape: int) -> RowwiseFP8:
        return RowwiseFP8(self.e4m3(*shape), self.uniform(0.005, 0.02, *shape[:-1], 1))

    def tensor(self, values: Sequence, dtype=torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def modulation(self, s: Sizes, count: int) -> list[Tensor]:
        """Shifts, scales or gates, one vector per frame."""
        return [self.normal(1, s.F, s.C, dtype=torch.float32, std=0.5) for _ in range(count)]

    def cache(self, row: Row, s: Sizes, frames: int, scale: float) -> tuple[Tensor, Tensor, CacheScales | None]:
        """scale: about that of an FP8 cache, a little different for each head."""
        shape = (1, frames, s.S, s.H, s.config.head_dim)
        if not row.fp8:
            return *self.normals(2, *shape), None
        k, v = (self.uniform(0.8 * scale, 1.2 * scale, 1, s.H) for _ in range(2))
        return self.e4m3(*shape), self.e4m3(*shape), CacheScales(k, v)


def inputs(row: Row, s: Sizes, device: torch.device | str, seed: int) -> tuple:
    """Arguments for the op of that name, in `reference`'s order; for vae_decode: the VAE, and three chunks of latents,
    the last of which is decoded."""
    return tuple(MAKERS[row.op](TensorFactory(device, seed), row, s))


def norm_rope_append(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    q, k, v = d.normal(1, s.T, 3 * s.C).split(s.C, dim=-1)  # views of one GEMM's output, as in the model
    weights = d.normals(2, s.C)
    angles = d.uniform(0, 6.28, 1, s.T, s.config.head_dim // 2)
    k_cache, v_cache, scales = d.cache(row, s, s.F, scale=0.025)  # nothing is clamped
    target = d.tensor([0]), d.tensor([[*range(1, s.F), 0]])  # as where the ring wraps
    return q, k, v, *weights, angles.cos(), angles.sin(), EPS, k_cache, v_cache, *target, scales


def attention(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    k_cache, v_cache, scales = d.cache(row, s, max(KEY_FRAMES), scale=0.01)  # keys of unit variance
    q = d.normal(1, s.T, s.H, s.config.head_dim)
    return q, k_cache, v_cache, d.tensor([0]), d.tensor([[[0, row.frames]]]), scales


def cross_attention(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    q = d.normal(1, s.T, s.H, s.config.head_dim)
    k, v = d.normals(2, 1, s.config.text_len, s.H, s.config.head_dim)
    if row.what.startswith("keys"):
        return q, k, v, None, None
    return q, k, v, d.tensor([row.keys]), d.tensor([s.config.text_len + 1 - row.keys], torch.float32)


def linear(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    n, k, _, bias = s.linears[row.what]
    return d.normal(1, s.T, k), d.normal(n, k, std=k**-0.5), d.normal(n) if bias or row.op == "linear_gelu" else None


def fp8_linear(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    n, k, _, bias = s.linears[row.what]
    return d.rowwise(1, s.T, k), d.rowwise(n, k), d.normal(n) if bias else None, torch.bfloat16


def epilogue(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    latent = (1, s.F, s.config.in_dim, *s.latent)
    hidden, time, (x, noise) = d.normal(1, s.T, s.C), d.normal(1, s.F, s.C), d.normals(2, *latent)
    final = FinalLayer(*d.modulation(s, 2), d.normal(s.patch, s.C, std=s.C**-0.5), d.normal(s.patch))
    wide = s.C // 2
    head = HeadWeights(d.normal(wide, 3 * s.C, std=s.C**-0.5), d.normal(wide), d.normal(1, wide, std=0.05), d.normal(1))
    counts = (d.tensor([n], torch.int32) for n in (2, 1, 4, 0))
    rule = StopRule(*counts, d.tensor([0.5], torch.float32))
    # One noise level per row, expanded over its frames: the strides that the engine passes.
    levels = (d.uniform(*bounds, 1, 1).expand(-1, s.F) for bounds in ((0.5, 1.0), (0.0, 0.5)))
    return hidden, time, x, noise, *levels, final, head, rule, EPS


def gaussian(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    seed = torch.randint(2**62, (1,), generator=d.source, device=d.device)
    return seed, d.tensor([7]), d.tensor([2]), (s.F, s.config.in_dim, *s.latent)


def level(d: TensorFactory, row: Row, s: Sizes) -> tuple[Tensor, Tensor]:
    """Of the VAE's level that the row names, channels last; and a vector of its channels."""
    channels, scale = next(one for one in VAE_LEVELS if row.what.startswith(f"{one[0]} "))
    return d.normal(1, s.F * min(scale, 4), *(scale * side for side in s.latent), channels), d.normal(channels)


def norm_silu(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    x, weight = level(d, row, s)
    return x, weight, True, d.normal(*weight.shape)


def bias_residual(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    x, bias = level(d, row, s)
    return x, d.normal(*x.shape), bias


def vae_decode(d: TensorFactory, row: Row, s: Sizes) -> tuple:
    torch.manual_seed(0 if d.source is None else d.source.initial_seed())
    with torch.device(d.device):
        vae = WanVAE(s.vae_dim).requires_grad_(False).eval().bfloat16()
    return vae, d.normal(3, 1, s.F, 16, *s.latent)


def activations(d: TensorFactory, s: Sizes, count: int) -> list[Tensor]:
    return d.normals(count, 1, s.T, s.C)


MAKERS: dict[str, Callable[[TensorFactory, Row, Sizes], Sequence]] = {
    "modulate": lambda d, row, s: (*activations(d, s, 1), *d.modulation(s, 2), EPS, row.fp8),
    "gate_residual": lambda d, row, s: (*activations(d, s, 2), *d.modulation(s, 1)),
    "residual_modulate": lambda d, row, s: (*activations(d, s, 2), *d.modulation(s, 3), EPS, row.fp8),
    "gelu_bias": lambda d, row, s: (d.normal(1, s.T, s.config.ffn_dim), d.normal(s.config.ffn_dim), row.fp8),
    "linear_gelu": linear,
    "rms_norm": lambda d, row, s: (*activations(d, s, 1), d.normal(s.C), EPS),
    "quantize": lambda d, row, s: activations(d, s, 1),
    "pool_frames": lambda d, row, s: (*activations(d, s, 1), s.F, EPS),
    "attention_pool": lambda d, row, s: (
        tuple(activations(d, s, 1)),
        d.normal(1, TOKENS, s.C, std=s.C**-0.5),
        s.F,
        EPS,
    ),
}
MAKERS |= {f.__name__: f for f in (norm_rope_append, attention, cross_attention, linear, fp8_linear)}
MAKERS |= {f.__name__: f for f in (epilogue, gaussian, norm_silu, bias_residual, vae_decode)}


def widened(value):
    """bfloat16 tensors and modules in float32, all else as it is; through the tuples that `ops` takes."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).float()
    if isinstance(value, tuple):
        parts = [widened(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def reference_fp32(row: Row, args: tuple, plain: Callable) -> list[Tensor]:
    """What the op means, in float32 with nothing rounded to FP8 that was not given so. plain: the op in plain torch."""
    wide = widened(args)
    if row.op == "quantize":
        return [wide[0]]
    if row.op == "linear_gelu":
        return [F.gelu(F.linear(*wide), approximate="tanh")]
    if row.op == "fp8_linear":
        return [plain(*wide[:3], torch.float32)]
    if row.op == "norm_rope_append":
        *front, k_cache, v_cache, slot, write, _ = wide
        caches = k_cache.to(torch.float32, copy=True), v_cache.to(torch.float32, copy=True)
        return [plain(*front, *caches, slot, write, None), *caches]
    if row.op in ("modulate", "residual_modulate", "gelu_bias"):
        wide = (*wide[:-1], False)
    return outputs(row, wide, plain(*wide))


def outputs(row: Row, args: tuple, result) -> list[Tensor]:
    """All values that a call has written, in float32, dequantized."""
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


def poison_unused(row: Row, args: tuple) -> tuple:
    """NaN in everything that must be written or must not be read: caches before an append, frames and keys that are
    not valid. Written in place."""
    unused: list[Tensor] = []
    if row.op == "norm_rope_append":
        unused += args[8:10]
    if row.op == "attention":
        unused += [cache[:, row.frames :] for cache in args[1:3]]
    if row.op == "cross_attention" and args[3] is not None:
        unused += [x[:, row.keys :] for x in args[1:3]]
    for x in unused:
        x.fill_(float("nan"))
    return args


@contextmanager
def poisoned_memory(warn_only: bool = False) -> Iterator[None]:
    """Memory that torch hands out unwritten holds NaN: an output or a workspace that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)  # which fills it, see `torch.utils.deterministic`
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||found - expected|| / ||expected|| of the worst output; NaN if any is not finite."""
    shares = []
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        shares.append(((one - other.view(one.shape)).norm() / other.norm()).item())
    return max(shares) if all(share == share and share != float("inf") for share in shares) else float("nan")


def tolerance(row: Row, plain: float) -> float:
    """The largest error that passes, where plain torch in the same dtype has the error `plain`."""
    if row.op == "attention" and row.fp8:
        return FP8_ATTENTION
    return TWICE * plain + FLOOR
