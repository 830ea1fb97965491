"""One public function per op: formula, shapes, checks, and dispatch to the best implementation on this machine."""

from dsa_engine.kernel_types import CacheScales, Epilogue, FinalLayer, HeadWeights, RowwiseFP8, StopRule
from dsa_engine.ops.attention import attention, cross_attention
from dsa_engine.ops.epilogue import epilogue, renoise, velocity_to_x0
from dsa_engine.ops.fp8_linear import fp8_linear, quantize
from dsa_engine.ops.modulate import gate_residual, gelu_bias, linear_gelu, modulate, residual_modulate
from dsa_engine.ops.noise import gaussian
from dsa_engine.ops.norm_rope import norm_rope, norm_rope_append, rms_norm
from dsa_engine.ops.norm_silu import bias_residual, norm_silu
from dsa_engine.ops.pooling import attention_pool, pool_frames

quantise = quantize  # the former spelling

__all__ = [
    "CacheScales",
    "Epilogue",
    "HeadWeights",
    "FinalLayer",
    "RowwiseFP8",
    "StopRule",
    "attention",
    "attention_pool",
    "bias_residual",
    "cross_attention",
    "epilogue",
    "fp8_linear",
    "gate_residual",
    "gaussian",
    "gelu_bias",
    "linear_gelu",
    "modulate",
    "norm_rope",
    "norm_rope_append",
    "norm_silu",
    "pool_frames",
    "quantize",
    "renoise",
    "residual_modulate",
    "rms_norm",
    "velocity_to_x0",
]
