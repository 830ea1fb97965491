"""What holds for every request, as ASGI middleware: its id, the size and pace of its body, HEAD."""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsa_engine.serving.settings import MIN_BODY_RATE

REQUEST_ID = "x-request-id"
HEAD = "dsa_engine.head"  # in the scope of a request that asked for a header only


class RequestId:
    """Gives every answer an `x-request-id`: the one that a proxy or client sent, or a new one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID, "")
        id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = id
            await send(message)

        await self.app(scope, receive, named)


class HeadAsGet:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def bare(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self.app({**scope, "method": "GET", HEAD: True}, receive, bare)


class BodyLimit:
    """Refuses request bodies larger than `max_bytes`, by the declared length or by what arrives, and those that take
    longer than `timeout` seconds and come more slowly than `MIN_BODY_RATE`."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float):
        self.app, self.max_bytes, self.timeout = app, max_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        header = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        declared, received = int(header) if header.isdigit() else 0, 0
        start, complete = asyncio.get_running_loop().time(), False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            if declared <= self.max_bytes:  # else nothing is read at all
                try:
                    async with asyncio.timeout_at(start + self.timeout + received / MIN_BODY_RATE):
                        message = await receive()
                except TimeoutError:
                    words = f"{received} bytes of the request's body came in time; the server does not wait any longer"
                    raise HTTPException(408, words, {"Connection": "close"}) from None
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received <= self.max_bytes:
                    return message
            raise HTTPException(413, f"the request is larger than {self.max_bytes} bytes, the limit")

        await self.app(scope, limited, send)
