"""One public function an op: formula, shapes, checks, and dispatch to the best implementation of the machine."""

from dsa_engine.ops.attention import attention, cross_attention
from dsa_engine.ops.epilogue import renoise, velocity_to_x0
from dsa_engine.ops.modulate import gate_residual, modulate
from dsa_engine.ops.norm_rope import norm_rope, norm_rope_append, rms_norm
from dsa_engine.ops.pooling import pool_frames

__all__ = [
    "attention",
    "cross_attention",
    "gate_residual",
    "modulate",
    "norm_rope",
    "norm_rope_append",
    "pool_frames",
    "renoise",
    "rms_norm",
    "velocity_to_x0",
]
