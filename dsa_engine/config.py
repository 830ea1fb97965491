"""Sizes of a model and settings of a rollout: frozen dataclasses with named presets and checked values."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from dsa_engine.checks import check_choice, check_int, check_unit

logger = logging.getLogger(__name__)


def nearest(value: int, step: int, low: int = 1) -> int:
    """The multiple of `step` nearest to `value` that is at least `low * step`."""
    return max(low, round(value / step)) * step


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a causal DiT in the terms of Wan 2.1's `config.json`.

    `head_dim = dim / num_heads` must be even and at least 6, since RoPE splits it into time, height and width pairs.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 10000.0

    def __post_init__(self):
        sizes = "dim ffn_dim num_heads num_layers in_dim out_dim text_dim text_len freq_dim"
        for name in sizes.split():
            check_int(name, getattr(self, name))
        if self.dim % (2 * self.num_heads) or self.head_dim < 6:
            raise ValueError(
                f"dim={self.dim} with num_heads={self.num_heads}: dim / num_heads must be even and at least 6, for 3-D "
                f"RoPE; nearest is dim={nearest(self.dim, 2 * self.num_heads, low=3)}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim}: must be even; nearest is {self.freq_dim + 1}")
        for name in ("eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0; Wan's is {_WAN[name]}")
        p = self.patch_size
        if len(p) != 3 or p[0] != 1 or p[1] != p[2] or p[1] < 1:
            raise ValueError(f"patch_size={self.patch_size}: must be (1, p, p), as in Wan 2.1: (1, 2, 2)")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent pixels."""
        p = self.patch_size[1]
        if height % p or width % p or height < p or width < p:
            raise ValueError(
                f"latent size {height}x{width}: both must be multiples of the patch {p}; "
                f"nearest is {nearest(height, p)}x{nearest(width, p)}"
            )
        return (height // p) * (width // p)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of `PRESETS` by name. Raises ValueError with the known names."""
        if name not in PRESETS:
            raise ValueError(f"model preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Read a Wan-style `config.json`. Keys that do not change a text-to-video model's maths are passed over."""
        if values.get("model_type", "t2v") != "t2v":
            raise ValueError(f"model_type={values['model_type']!r}: only 't2v' checkpoints can be run")
        for key in ("qk_norm", "cross_attn_norm"):
            if not values.get(key, True):
                raise ValueError(f"{key}={values[key]}: only models with {key}=true (all of Wan 2.1) can be run")
        known = {f.name for f in dataclasses.fields(cls)}
        missing = [k for k in ("dim", "ffn_dim", "num_heads", "num_layers") if k not in values]
        if missing:
            raise ValueError(f"the model's config lacks {', '.join(missing)}; a Wan-style config.json names them")
        unused = [k for k in values if k not in known and k not in _NEUTRAL_KEYS and not k.startswith("_")]
        if unused:
            logger.warning("config keys without a meaning here, not used: %s", ", ".join(unused))
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "t2v", **dataclasses.asdict(self), "patch_size": list(self.patch_size)}


_WAN = {"eps": 1e-6, "rope_theta": 10000.0}
_NEUTRAL_KEYS = {"model_type", "qk_norm", "cross_attn_norm", "window_size", "inject_sample_info"}

PRESETS = {
    "wan2.1-t2v-1.3b": ModelConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    # The small model that ships in the package: 64x64 pixels, 16x8x8 latents, 16 tokens a frame.
    "shapes": ModelConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=5, text_dim=64, text_len=4, freq_dim=64),
}


@dataclass(frozen=True)
class RolloutConfig:
    """How a clip is rolled out: chunks, cache window, noise schedule and the default step policy. Frames are latent."""

    chunk_frames: int = 3
    window: int | None = None  # frames, the current chunk and the sink included; None: attention over the whole clip
    sink: int = 0  # first frames of the clip, which are never evicted
    rope: str = "absolute"  # the sink's position: its own, or "relative": always next to the window (`KVCache`)
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)  # timesteps, 1000 = pure noise, warped by `shift`
    shift: float = 5.0  # of `Schedule`
    commit: str = "clean"  # what is cached of a chunk: K/V of its clean latents, or "exit_step": of its last step
    threshold: float | None = None  # confidence at which a chunk may stop, None: never calibrated
    presets: dict[str, float] = dataclasses.field(default_factory=dict)  # named thresholds

    def __post_init__(self):
        check_int("chunk_frames", self.chunk_frames)
        check_int("sink", self.sink, 0)
        if self.window is not None:
            check_int("window", self.window)
        smallest = self.sink + self.chunk_frames
        if self.window is not None and self.window < smallest:
            raise ValueError(
                f"window={self.window}: must hold the sink ({self.sink}) and the chunk ({self.chunk_frames}); "
                f"the nearest legal value is {smallest}, or None for global attention"
            )
        check_choice("commit", self.commit, COMMIT_MODES)
        check_choice("rope", self.rope, ROPE_MODES)
        for name, value in {"threshold": self.threshold, **self.presets}.items():
            if value is not None:
                check_unit(name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RolloutConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = [k for k in values if k not in known]
        if unknown:
            raise ValueError(
                f"rollout config has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "steps": list(self.steps)}


COMMIT_MODES = ("clean", "exit_step")
ROPE_MODES = ("absolute", "relative")
