"""Access control: the bearer token, the origins that may use the API, the size of a request."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def token_matches(token: str | None, given: str | None) -> bool:
    """Compared in constant time. given: from a header, whose bytes are read as Latin-1."""
    return token is None or hmac.compare_digest((given or "").encode("latin-1"), token.encode())


def origin_allowed(origin: str | None, host: str | None, origins: tuple[str, ...]) -> bool:
    """A request without an Origin is not from a browser's page; others must be from the server's own pages or
    listed."""
    return origin is None or origin in origins or "*" in origins or origin in (f"http://{host}", f"https://{host}")


class BodyLimit:
    """Refuses request bodies larger than `max_bytes`, by the declared length or by what arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        header = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        declared, received = int(header) if header.isdigit() else 0, 0

        async def limited() -> Message:
            nonlocal received
            if declared <= self.max_bytes:  # else nothing is read at all
                message = await receive()
                received += len(message.get("body", b""))
                if received <= self.max_bytes:
                    return message
            raise HTTPException(413, f"the request is larger than {self.max_bytes} bytes, the limit")

        await self.app(scope, limited, send)
