"""Servers and clients of `WS /v1/realtime/video`."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as ws_connect

from dsa_engine.serving.http import realtime
from dsa_engine.serving.settings import Settings, WorkerLimits
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker
from tests.support.fake_backend import CARD, FakeBackend
from tests.support.live_server import PATIENCE, serving, until
from tests.support.serving.sessions import PROMPTS

SERVER = {
    "session.queued",
    "video.start",
    "video.chunk_metadata",
    "session.interaction.queued",
    "session.pong",
    "error",
    "session.interaction.applied",
    "session.done",
}


class Client:
    """A client that reads everything in order. A chunk's metadata gets its bytes as `data`."""

    def __init__(self, host, path=realtime.PATH, **options):
        # entered by hand: what it gives is the connection, in every version of the library
        self.socket = ws_connect(f"ws://{host}{path}", max_size=2**27, open_timeout=PATIENCE, **options).__enter__()
        self.seen: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def say(self, type, **fields):
        self.socket.send(json.dumps({"type": type} | fields))

    def start(self, prompt=PROMPTS[0], **fields):
        self.say("session.start", **{"prompt": prompt} | fields)
        return self

    def change(self, event_id=None, **event):
        self.say("session.interaction", interaction={"event": event} | ({"event_id": event_id} if event_id else {}))

    def hear(self):
        message = json.loads(self.socket.recv(PATIENCE))
        assert message["type"] in SERVER
        if message["type"] == "video.chunk_metadata":
            message["data"] = self.socket.recv(PATIENCE)
            assert isinstance(message["data"], bytes) and len(message["data"]) == message["byte_length"]
        self.seen.append(message)
        return message

    def until(self, type):
        while True:
            message = self.hear()
            if message["type"] == type:
                return message

    def rest(self):
        """Everything to the end; (messages, close code)."""
        seen = []
        try:
            while True:
                seen.append(self.hear())
        except ConnectionClosed as closed:
            return seen, closed.rcvd.code if closed.rcvd else None

    def abort(self):
        """Vanish without a word: the TCP connection is reset."""
        raw = self.socket.socket
        with suppress(OSError):  # closed already, because the server was quicker
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()


def of(messages, type):
    return [message for message in messages if message["type"] == type]


def raw_frames(messages):
    chunks = of(messages, "video.chunk_metadata")
    return np.concatenate(
        [np.frombuffer(c["data"], np.uint8).reshape(c["num_frames"], c["height"], c["width"], 3) for c in chunks]
    )


@contextmanager
def engine(pipe, wanted=Settings(), send_timeout=realtime.SEND_TIMEOUT_S, **limits):  # noqa: B008 frozen
    backend = LocalBackend(Worker(pipe, WorkerLimits(**{"max_sessions": 3, "max_jobs": 0, "max_queue": 2} | limits)))
    backend.start()
    try:
        with serving(realtime.router(backend, wanted, send_timeout)) as host:
            yield host, backend
    finally:
        backend.worker.stop()


@contextmanager
def fake(wanted=Settings(), send_timeout=realtime.SEND_TIMEOUT_S, size=(16, 16), period=0.001, **options):  # noqa: B008
    """Streams whose chunks are single frames."""
    card = replace(CARD, height=size[0], width=size[1], chunks=(1, 1))
    backend = FakeBackend(card, period, **options)
    with serving(realtime.router(backend, wanted, send_timeout)) as host:
        yield host, backend
        until(lambda: not backend.open_streams)  # whatever a test did: no stream is left behind
