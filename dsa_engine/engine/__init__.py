"""Sessions and rollouts of one model: `Engine` opens them, `BatchRunner` runs their chunks together."""

from dsa_engine.engine.batch_runner import BatchRunner, Runner
from dsa_engine.engine.chunk import Chunk
from dsa_engine.engine.engine import Engine
from dsa_engine.engine.session import Session, Snapshot

__all__ = ["BatchRunner", "Chunk", "Engine", "Runner", "Session", "Snapshot"]
