"""Who may ask, from where, and how much: the bearer token, the pages that may use the API, the size of a request."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def token_matches(token: str | None, given: str | None) -> bool:
    """Whether a client may come in; compared in a time that does not tell how much of it was right. given: from a
    header, whose bytes are read as Latin-1."""
    return token is None or hmac.compare_digest((given or "").encode("latin-1"), token.encode())


def origin_allowed(origin: str | None, host: str | None, origins: tuple[str, ...]) -> bool:
    """Whether a browser's page may act here. Without an Origin it is no browser; else the page must be the server's own
    or on the list."""
    return origin is None or origin in origins or "*" in origins or origin in (f"http://{host}", f"https://{host}")


class BodyLimit:
    """Lets no request body through that is larger than `most` bytes, whether it says so or just goes on."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        declared, seen = int(said) if said.isdigit() else 0, 0

        async def limited() -> Message:
            nonlocal seen
            if declared <= self.most:  # else nothing is read at all
                message = await receive()
                seen += len(message.get("body", b""))
                if seen <= self.most:
                    return message
            raise HTTPException(413, f"the request is larger than {self.most} bytes, the most there may be")

        await self.app(scope, limited, send)
