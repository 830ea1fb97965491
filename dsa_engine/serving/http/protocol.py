"""HTTP/1.1 for a server without a proxy in front: clients that do not send whole requests do not hold connections."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def limited(timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol in h11, which bounds the size of a header (`h11_max_incomplete_event_size`), where each
    header has to come within `timeout` seconds of the connection, or of the request before it."""

    class LimitedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._arm()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._disarm()
            elif self._deadline is None:  # the next request has begun; between two, the keep-alive timeout holds
                self._arm()

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            self._disarm()
            super().handle_websocket_upgrade(event)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _arm(self) -> None:
            self._deadline = self.loop.call_later(timeout, self._late)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            """Nothing of a request is known, so there is nothing to answer."""
            self._deadline = None
            if not self.transport.is_closing():
                self.transport.abort()

    return LimitedProtocol
