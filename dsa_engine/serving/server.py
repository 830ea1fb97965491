"""A server in this process: pipeline, worker, app, uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import uvicorn

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.http import protocol
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.http.auth import redacted_logs
from dsa_engine.serving.settings import Settings, WorkerLimits
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker

SHUTDOWN_TIMEOUT_S = 1  # for clients to read their last answers
MAX_MESSAGE = 2**20  # bytes of a WebSocket's message


def run(
    pipe: Pipeline,
    limits: WorkerLimits,
    settings: Settings,
    ready: Callable[[str], None],
    at: socket.socket | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, which uvicorn handles and raises again at the end.

    Args:
        pipe: warmed up.
        limits: of the worker.
        settings: of the HTTP application.
        ready: called with the address once requests are answered.
        at: a socket from `bind`; by default it is bound here.

    Raises:
        OSError: the address is not available.
        ValueError: limits or a data folder that are not possible.
    """
    with redacted_logs(settings.token), at or bind(settings) as sock:
        backend = LocalBackend(Worker(pipe, limits), settings.grace)
        app = create_app(backend, settings, jobs=limits.max_jobs > 0)
        backend.worker.observers.append(app.state.metrics.observe)
        config = uvicorn.Config(
            app,
            http=protocol.limited(settings.header_timeout),
            h11_max_incomplete_event_size=settings.max_header,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            log_config=None,
            access_log=False,
            ws_max_size=MAX_MESSAGE,
            ws_per_message_deflate=False,  # video does not get smaller
        )
        backend.start()
        try:
            Server(config, app.state.service.drain, lambda: ready(address(settings.host, sock))).run([sock])
        finally:
            backend.worker.stop(0.0)


def bind(settings: Settings) -> socket.socket:
    """A socket at the address of the settings. Raises OSError if that is not available."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}") from error
    return sock


def address(host: str, sock: socket.socket) -> str:
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn that reports when it is ready, and drains the app before it closes the connections: open streams get
    their running chunk and the reason why no more come."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]], ready: Callable[[], None]):
        super().__init__(config)
        self._drain, self._ready = drain, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain()
        await super().shutdown(sockets)
