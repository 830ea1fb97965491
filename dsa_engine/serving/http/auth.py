"""Access control: the bearer token, the pages and the names of hosts that may be used."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, urlencode

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from dsa_engine.serving import origins
from dsa_engine.serving.settings import Settings

PROTOCOL = "dsa-engine"  # the WebSocket's subprotocol, offered beside the one with the token
TOKEN_PROTOCOL = "dsa-token."  # and then the token's UTF-8 in base64url without padding
QUERY_TOKEN = "dsa_engine.query_token"  # in the scope: taken out of the address


def token_matches(token: str | None, given: str | None) -> bool:
    """Compared in constant time. given: from a header, whose bytes are read as Latin-1."""
    return token is None or hmac.compare_digest((given or "").encode("latin-1"), token.encode())


def refused(headers: Mapping[str, str], settings: Settings) -> str | None:
    """Why a request is refused for its Host or Origin, in words; None if it is not."""
    host, origin = headers.get("host"), headers.get("origin")
    if settings.token is None and not origins.host_allowed(host, settings.host, settings.allowed):
        return (
            f"host {host!r}: this server has no token and answers to localhost and its own address only; start it "
            f"with --origin http://{host} if that name is its own, or with a token"
        )
    forwarded = headers.get("x-forwarded-host", "").partition(",")[0].strip()
    hosts = tuple(name for name in (host, forwarded) if name)
    if not origins.origin_allowed(origin, hosts, settings.allowed):
        words = f"origin {origin!r}: a page of another host may not use this server"
        return words if origin == "null" else f"{words}; --origin {origin} would let it in"
    return None


def websocket_token(connection: HTTPConnection) -> str:
    """The token that a WebSocket's client sent: as a bearer token, or in a subprotocol or in the address (browsers
    cannot set the header). As it would be in a header: UTF-8 that is read as Latin-1."""
    kind, _, given = connection.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given
    for name in connection.scope.get("subprotocols", ()):
        if name.startswith(TOKEN_PROTOCOL):
            text = name.removeprefix(TOKEN_PROTOCOL)
            try:
                return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("latin-1")
            except (binascii.Error, ValueError):
                return ""
    given = connection.scope.get(QUERY_TOKEN, connection.query_params.get("token", ""))
    return given.encode().decode("latin-1")


class TokenFromQuery:
    """Takes `token=` out of the query before anything can log the address; right or wrong, it is in the scope."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = scope.get("query_string", b"")
        if b"token" in query:
            pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
            scope[QUERY_TOKEN] = next((value for name, value in pairs if name == "token"), "")
            kept = [(name, value) for name, value in pairs if name != "token"]
            scope["query_string"] = urlencode(kept).encode("latin-1")  # in place: the server logs from this scope
        await self.app(scope, receive, send)


@contextmanager
def redacted_logs(token: str | None) -> Iterator[None]:
    """No log record of this process, whatever its source, holds the token in any form that it is sent in."""
    if token is None:
        yield
        return
    data = token.encode()
    encoded = base64.urlsafe_b64encode(data).decode()
    forms = {token, quote(token), quote(token, safe=""), quote_plus(token), repr(token)[1:-1], data.decode("latin-1")}
    forms |= {encoded, encoded.rstrip("=")}
    before, formatter = logging.getLogRecordFactory(), logging.Formatter()

    def clean(text: str) -> str:
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
        return text

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = before(*args, **options)
        try:
            text = made.getMessage()
        except Exception:  # of a wrong format string, which its handler reports
            return made
        if text != (cleaned := clean(text)):
            made.msg, made.args = cleaned, ()
        if made.exc_info:
            made.exc_text = clean(formatter.formatException(made.exc_info))
        return made

    logging.setLogRecordFactory(record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
