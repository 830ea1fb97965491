"""Dynamic Step Allocation (arXiv 2606.04432) for autoregressive video diffusion, as an inference engine."""

from dsa_engine.engine.session import Chunk, Session, Snapshot
from dsa_engine.pipeline import Pipeline, VideoOutput
from dsa_engine.sampling.policy import Budget, Change, Confidence, Convergence, Fixed, PerChunk, Policy, Relative

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Change",
    "Chunk",
    "Confidence",
    "Convergence",
    "Fixed",
    "PerChunk",
    "Pipeline",
    "Policy",
    "Relative",
    "Session",
    "Snapshot",
    "VideoOutput",
]
