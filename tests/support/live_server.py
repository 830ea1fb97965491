"""A server in a thread of this process."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

PATIENCE = 30.0  # seconds; only what hangs gets there


@contextmanager
def serving(*routers, **options):
    """host:port of an app of these routers. `options` of uvicorn."""
    app = FastAPI()
    for routes in routers:
        app.include_router(routes)
    config = uvicorn.Config(app, port=0, log_level="warning", ws_per_message_deflate=False, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


def until(true, patience=PATIENCE):
    """Wait until something is so; fails where it never gets so."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
