"""`WS /v1/realtime/video`: one connection is one live stream. Its messages: `realtime_schemas`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.responses import PlainTextResponse

from dsa_engine.media import stream_encoders
from dsa_engine.media.stream_encoders import Encoder, Payload
from dsa_engine.serving import origins, types
from dsa_engine.serving.http import auth, realtime_schemas
from dsa_engine.serving.http.realtime_schemas import Error, Invalid
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import Backend, Overloaded, Stream

logger = logging.getLogger(__name__)

PATH = "/v1/realtime/video"
ENCODER_THREADS = 4  # for all streams together
MAX_PENDING_UPDATES = 16  # of one stream that wait for their chunk
KEEPALIVE_S = 2.0  # period of the keepalives for a client in the queue
SEND_TIMEOUT_S = 30.0  # a client that has not made room for a message by then is disconnected
CLOSE_TIMEOUT_S = 2.0  # for the last message, to a client that may not read it

# RFC 6455, section 7.4.1
NORMAL, GOING_AWAY, POLICY, TOO_BIG, INTERNAL, TRY_LATER = 1000, 1001, 1008, 1009, 1011, 1013
CODES = {"done": NORMAL, "stopped": NORMAL, "shutdown": GOING_AWAY, "idle": POLICY, "lifetime": POLICY}


def router(backend: Backend, settings: Settings, send_timeout: float = SEND_TIMEOUT_S) -> APIRouter:
    """The route, with the encoder threads, which end with the app."""
    pool = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="dsa-engine-encoder")
    connected: Counter[str] = Counter()  # of each client's address

    @asynccontextmanager
    async def lifespan(_) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    routes = APIRouter(lifespan=lifespan)

    @routes.websocket(PATH)
    async def realtime(socket: WebSocket) -> None:
        client = socket.client.host if socket.client else ""
        refused = refusal(socket, settings) or (
            (429, f"{connected[client]} connections of this address are open, which is the most; close one first")
            if connected[client] >= settings.max_client_streams and not origins.is_local(client)
            else None
        )
        if refused is None:
            connected[client] += 1
            try:
                offered = socket.scope.get("subprotocols", ())
                await socket.accept(auth.PROTOCOL if auth.PROTOCOL in offered else None)
                await RealtimeConnection(socket, backend, settings, pool, send_timeout).run()
            finally:
                connected[client] -= 1
                if not connected[client]:
                    del connected[client]
        elif "websocket.http.response" in socket.scope.get("extensions", {}):
            await socket.send_denial_response(PlainTextResponse(refused[1], refused[0]))
        else:
            await socket.close(POLICY)

    return routes


def refusal(socket: WebSocket, settings: Settings) -> tuple[int, str] | None:
    """The HTTP status that refuses a client and why, None if it is admitted: 403 for a page of another host that is not
    in `settings.origins` (browsers open a WebSocket without a CORS check) and for a foreign Host, 401 for a wrong
    token."""
    words = auth.refused(socket.headers, settings)
    if words is not None:
        return 403, words
    if auth.token_matches(settings.token, auth.websocket_token(socket)):
        return None
    return 401, "a token is needed: as a bearer token, or of a page in a subprotocol"


class ConnectionClosed(Exception):
    """The connection is closed, by either side."""


class RealtimeConnection:
    """One accepted connection: one task receives messages, another sends the stream's events."""

    def __init__(
        self, socket: WebSocket, backend: Backend, settings: Settings, pool: ThreadPoolExecutor, send_timeout: float
    ):
        self._socket, self._backend, self._settings = socket, backend, settings
        self._pool, self._send_timeout = pool, send_timeout
        self._max_message = 12 * settings.max_prompt + 4096  # a character takes at most 12 in JSON
        self._lock = asyncio.Lock()  # of sending: nothing comes between a chunk's metadata and its bytes
        self._closed = self._opened = False
        self._id = f"video-{uuid.uuid4().hex}"
        self._chunks = 0  # sent
        self._updates = 0  # received
        self._pending_updates = 0  # passed to the stream and not answered yet

    async def run(self) -> None:
        try:
            opened = await self._start()
            if opened is not None:
                await self._serve(*opened)
        except (ConnectionClosed, WebSocketDisconnect):
            pass
        except Exception as error:
            logger.exception("%s failed", self._id)
            await self._close(Error(code="failed", message=str(error), retryable=True), INTERNAL)

    async def _serve(self, start: realtime_schemas.Start, stream: Stream) -> None:
        tasks = [asyncio.create_task(work) for work in (self._listen(stream), self._keep_queued(stream))]
        try:
            await self._play(start, stream)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stream.close()

    async def _keep_queued(self, stream: Stream) -> None:
        """A client in the queue need not send anything: its open connection keeps it alive."""
        while not self._opened:
            stream.keepalive()
            await asyncio.sleep(KEEPALIVE_S)

    async def _start(self) -> tuple[realtime_schemas.Start, Stream] | None:
        """The request and its stream; None if the connection ended first. After a wrong `session.start` the client may
        send another."""
        deadline = asyncio.get_running_loop().time() + self._settings.start_timeout
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await self._receive()
            except TimeoutError:
                words = f"no session.start within {self._settings.start_timeout:g} s"
                await self._close(Error(code="start_timeout", message=words, retryable=True), POLICY)
                return None
            if isinstance(message, realtime_schemas.Ping):
                await self._send(realtime_schemas.Pong())
            elif isinstance(message, realtime_schemas.Stop):
                await self._done("stopped")
                return None
            elif isinstance(message, realtime_schemas.InteractionMessage):
                words = "the stream is not open: send session.start first"
                await self._send(Error(code="not_started", message=words, event_id=message.interaction.event_id))
            else:
                try:
                    realtime_schemas.check(message, self._backend.card, self._settings.max_prompt)
                    return message, await self._backend.open(message.to_request(), self._id)
                except Invalid as error:
                    await self._send(Error.of(error))
                except ValueError as error:
                    await self._send(Error(code="invalid_value", message=str(error)))
                except Overloaded as error:
                    await self._close(Error(code="busy", message=str(error), retryable=True), TRY_LATER)
                    return None

    # From the client.

    async def _receive(self) -> realtime_schemas.Message:
        """The next valid message; others are answered with errors. Raises ConnectionClosed when no more can come."""
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                raise ConnectionClosed
            text, data = received.get("text"), received.get("bytes") or b""
            size = len(data) if text is None else len(text)
            if size > self._max_message:
                words = f"message of {size} characters: must be at most {self._max_message}"
                await self._close(Error(code="too_large", message=words), TOO_BIG)
                raise ConnectionClosed
            try:
                if text is None:
                    raise Invalid("binary_message", "a binary message: must be a JSON text")
                return realtime_schemas.parse(text)
            except Invalid as error:
                await self._send(Error.of(error))

    async def _listen(self, stream: Stream) -> None:
        """Until the client is gone; then the stream closes."""
        try:
            while True:
                message = await self._receive()
                if isinstance(message, realtime_schemas.InteractionMessage):
                    await self._update(stream, message.interaction)
                elif isinstance(message, realtime_schemas.Ping):
                    stream.keepalive()
                    await self._send(realtime_schemas.Pong())
                elif isinstance(message, realtime_schemas.Stop):
                    await stream.close()
                else:
                    words = "the stream is open: send session.interaction, or session.stop and connect again"
                    await self._send(Error(code="already_started", message=words))
        except ConnectionClosed:
            pass
        finally:
            await stream.close()

    async def _update(self, stream: Stream, interaction: realtime_schemas.Interaction) -> None:
        """Pass an update on. Its acknowledgement is sent before the stream's answer can be."""
        try:
            realtime_schemas.check_interaction(interaction, self._settings.max_prompt)
        except Invalid as error:
            return await self._send(Error.of(error))
        name, event = interaction.event_id, interaction.event
        if self._pending_updates >= MAX_PENDING_UPDATES:
            words = f"{self._pending_updates} changes wait for their chunk: wait until one is applied"
            return await self._send(Error(code="too_many_interactions", message=words, retryable=True, event_id=name))
        self._updates += 1
        self._pending_updates += 1
        name = name or f"event-{self._updates}"
        async with self._lock:
            threshold, chunks = event.confidence_threshold, interaction.transition_chunks
            await stream.update(event.prompt, name, threshold=threshold, transition_chunks=chunks)
            await self._write(realtime_schemas.InteractionQueued(request_id=self._id, event_id=name))

    # From the stream.

    async def _play(self, start: realtime_schemas.Start, stream: Stream) -> None:
        """Send all events until the stream ends. A chunk is encoded and sent before the next event is requested, which
        is what lets the next chunk start: nothing accumulates for a slow client."""
        encoder: Encoder | None = None
        async for event in stream:
            match event:
                case types.Queued(position):
                    await self._send(realtime_schemas.Queued(position=position))
                case types.Opened(fps, height, width):
                    self._opened = True
                    encoder = await self._in_pool(stream_encoders.encoder, start.format, fps, width, height)
                    config = {**start.model_dump(exclude={"type"}), "model": self._backend.card.name}
                    config |= {"width": width, "height": height, "fps": fps}
                    message = realtime_schemas.VideoStart(request_id=self._id, format=start.format, config=config)
                    await self._send(message)
                case types.UpdateApplied(name, prompt, index):
                    self._pending_updates -= 1
                    answer: dict[str, Any] = {"event_id": name, "chunk_index": index, "prompt": prompt}
                    await self._send(realtime_schemas.InteractionApplied(request_id=self._id, **answer))
                case types.UpdateRejected(name, error):
                    self._pending_updates -= 1
                    await self._send(Error(code="invalid_value", message=error, event_id=name))
                case types.ChunkReady():
                    await self._send_chunk(event, encoder)
                case types.Closed():
                    await self._finish(event)

    async def _send_chunk(self, ready: types.ChunkReady, encoder: Encoder) -> None:
        payload, seconds = await self._in_pool(_encode, encoder, ready.chunk.frames)
        if (metrics := getattr(self._socket.app.state, "metrics", None)) is not None:
            metrics.phase("encode", seconds)
        metadata = _metadata(ready, payload, seconds, self._id, encoder.content_type, self._chunks)
        await self._send(metadata, payload.data)
        self._chunks += 1

    async def _in_pool(self, work, *args):
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def _finish(self, closed: types.Closed) -> None:
        reason = "stopped" if closed.reason == "closed" else closed.reason
        if reason in CODES:
            return await self._done(reason, closed.error)
        if reason == "failed":
            logger.error("%s failed: %s", self._id, closed.error)
        code = {"refused": POLICY, "busy": TRY_LATER}.get(reason, INTERNAL)
        name = "invalid_value" if reason == "refused" else reason
        await self._close(Error(code=name, message=closed.error or reason, retryable=reason != "refused"), code)

    # Sending.

    async def _send(self, message: realtime_schemas.ServerMessage, data: bytes | None = None) -> None:
        async with self._lock:
            await self._write(message, data)

    async def _write(self, message: realtime_schemas.ServerMessage, data: bytes | None = None) -> None:
        """With the lock held. Raises ConnectionClosed if the client is gone, or takes nothing for too long."""
        if self._closed:
            raise ConnectionClosed
        try:
            async with asyncio.timeout(self._send_timeout):
                await self._socket.send_text(message.text())
                if data is not None:
                    await self._socket.send_bytes(data)
        except (TimeoutError, WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: just closed
            if isinstance(error, TimeoutError):
                logger.info("%s: the client took nothing for %g s", self._id, self._send_timeout)
            self._closed = True
            raise ConnectionClosed from None

    async def _done(self, reason: str, words: str | None = None) -> None:
        state: dict[str, Any] = {
            "reason": reason,
            "message": words,
            "stopped": reason == "stopped",
            "chunks": self._chunks,
        }
        await self._close(realtime_schemas.Done(request_id=self._id, **state), CODES[reason])

    async def _close(self, last: realtime_schemas.ServerMessage, code: int) -> None:
        """Send the last message and close the connection, as far as the client lets it."""
        async with self._lock:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._write(last)
                    await self._socket.close(code)
            except (ConnectionClosed, TimeoutError, WebSocketDisconnect, RuntimeError):
                pass
            self._closed = True


def _encode(encoder: Encoder, frames: np.ndarray) -> tuple[Payload, float]:
    start = time.perf_counter()
    return encoder.encode(frames), time.perf_counter() - start


def _metadata(
    ready: types.ChunkReady, payload: Payload, encode_seconds: float, id: str, content_type: str, sent: int
) -> realtime_schemas.ChunkMetadata:
    chunk, timings = ready.chunk, ready.chunk.timings
    frames, height, width, _ = chunk.frames.shape
    return realtime_schemas.ChunkMetadata(
        request_id=id,
        chunk_index=chunk.index,
        generation_chunk_index=chunk.index,
        transport_chunk_index=sent,
        content_type=content_type,
        num_frames=frames,
        width=width,
        height=height,
        byte_length=len(payload.data),
        bytes_per_frame=chunk.frames[0].nbytes,
        payload_lengths=payload.lengths,
        pts=chunk.pts,
        prompt=chunk.prompt,
        steps=chunk.steps,
        confidence=chunk.confidence,
        threshold=ready.threshold,
        ms=realtime_schemas.Milliseconds(
            denoise=timings["denoise"], kv=timings["commit"], vae=timings["decode"], encode=1e3 * encode_seconds
        ),
        latency_ms=1e3 * ready.latency,
        deadline_ms=None if ready.deadline is None else 1e3 * ready.deadline,
        late=ready.late,
    )
