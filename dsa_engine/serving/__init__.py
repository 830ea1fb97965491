"""Streams and jobs of a pipeline for many clients: a worker, an HTTP application, replicas on Ray.

    backend = LocalBackend(Worker(pipe))
    app = create_app(backend)

`create_app` needs the extra `serving`; the others need nothing more than the engine.
"""

from typing import Any

from dsa_engine.serving.settings import ServerOptions, Settings, WorkerLimits
from dsa_engine.serving.types import (
    Backend,
    ChunkReady,
    Closed,
    Event,
    ModelCard,
    Opened,
    Overloaded,
    Queued,
    Stream,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)
from dsa_engine.serving.worker.in_process import LocalBackend, LocalStream
from dsa_engine.serving.worker.worker import Worker

__all__ = [
    "Backend",
    "ChunkReady",
    "Closed",
    "Event",
    "LocalBackend",
    "LocalStream",
    "ModelCard",
    "Opened",
    "Overloaded",
    "Queued",
    "ServerOptions",
    "Settings",
    "Stream",
    "StreamRequest",
    "UpdateApplied",
    "UpdateRejected",
    "Worker",
    "WorkerLimits",
    "create_app",
]


def __getattr__(name: str) -> Any:
    if name == "create_app":  # needs FastAPI, which a worker does not
        from dsa_engine.serving.http.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
