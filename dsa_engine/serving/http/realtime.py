"""`WS /v1/realtime/video`: one connection is one live stream. What is said on it: `messages`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
from fastapi import APIRouter, Response, WebSocket, WebSocketDisconnect

from dsa_engine.media import stream_encoders
from dsa_engine.media.stream_encoders import Encoder, Payload
from dsa_engine.serving.http import auth, realtime_schemas
from dsa_engine.serving.http.realtime_schemas import Error, Invalid
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import (
    Backend,
    ChunkReady,
    Closed,
    Opened,
    Overloaded,
    Queued,
    Stream,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)

logger = logging.getLogger(__name__)

PATH = "/v1/realtime/video"
ENCODER_THREADS = 4  # threads, for all streams together
MAX_PENDING_UPDATES = 16  # of one stream that wait for their chunk: whoever tells faster is told to wait
KEEPALIVE_S = 2.0  # seconds between two signs of life of a client that waits in the queue
SEND_TIMEOUT_S = 30.0  # seconds that a client may take to make room for a message
CLOSE_TIMEOUT_S = 2.0  # seconds to say that the connection is closed, to a client that may not listen

# RFC 6455, section 7.4.1
NORMAL, GOING_AWAY, POLICY, TOO_BIG, INTERNAL, TRY_LATER = 1000, 1001, 1008, 1009, 1011, 1013
CODES = {"done": NORMAL, "stopped": NORMAL, "shutdown": GOING_AWAY, "idle": POLICY, "lifetime": POLICY}


def router(backend: Backend, settings: Settings, stall: float = SEND_TIMEOUT_S) -> APIRouter:
    """The route, with the encoders' threads, which end with the app."""
    pool = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="dsa-engine-encoder")

    @asynccontextmanager
    async def lifespan(_) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    routes = APIRouter(lifespan=lifespan)

    @routes.websocket(PATH)
    async def realtime(socket: WebSocket) -> None:
        status = refusal(socket, settings)
        if status is None:
            await socket.accept()
            await RealtimeConnection(socket, backend, settings, pool, stall).run()
        elif "websocket.http.response" in socket.scope.get("extensions", {}):
            await socket.send_denial_response(Response(status_code=status))
        else:
            await socket.close(POLICY)

    return routes


def refusal(socket: WebSocket, settings: Settings) -> int | None:
    """The HTTP status to send a client away with, None for one that may come in: 403 for a page of another host that
    `settings.origins` does not name (browsers ask nobody before they open a WebSocket), 401 for a wrong token. Browsers
    cannot send one in a header: they have it in the query."""
    headers = socket.headers
    if not auth.origin_allowed(headers.get("origin"), headers.get("host"), settings.origins):
        return 403
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        given = socket.query_params.get("token", "").encode().decode("latin-1")  # as it would be in a header
    return None if auth.token_matches(settings.token, given) else 401


class ConnectionClosed(Exception):
    """The connection is closed, by whoever it was."""


class RealtimeConnection:
    """What is said on one accepted connection: one task listens, the other plays the stream's events."""

    def __init__(self, socket: WebSocket, backend: Backend, settings: Settings, pool: ThreadPoolExecutor, stall: float):
        self._socket, self._backend, self._settings = socket, backend, settings
        self._pool, self._stall = pool, stall
        self._longest = 12 * settings.max_prompt + 4096  # a character takes at most 12 in JSON
        self._sending = asyncio.Lock()  # so that nothing comes between a chunk's metadata and its bytes
        self._over = self._opened = False
        self._id = f"video-{uuid.uuid4().hex}"
        self._chunks = 0  # sent
        self._changes = 0  # told and not answered by the stream
        self._told = 0

    async def run(self) -> None:
        try:
            opened = await self._begin()
            if opened is not None:
                await self._converse(*opened)
        except (ConnectionClosed, WebSocketDisconnect):
            pass
        except Exception as error:
            logger.exception("%s failed", self._id)
            await self._end(Error(code="failed", message=str(error), retryable=True), INTERNAL)

    async def _converse(self, start: realtime_schemas.Start, stream: Stream) -> None:
        beside = [asyncio.create_task(work) for work in (self._listen(stream), self._wait(stream))]
        try:
            await self._play(start, stream)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await stream.close()

    async def _wait(self, stream: Stream) -> None:
        """Who waits in the queue has nothing to take and need not say anything: the open connection is its sign."""
        while not self._opened:
            stream.keepalive()
            await asyncio.sleep(KEEPALIVE_S)

    # How it begins.

    async def _begin(self) -> tuple[realtime_schemas.Start, Stream] | None:
        """What is wanted and its stream; None where it came to neither. A wrong `session.start` may be said again."""
        deadline = asyncio.get_running_loop().time() + self._settings.start_timeout
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await self._receive()
            except TimeoutError:
                words = f"no session.start within {self._settings.start_timeout:g} s"
                return await self._end(Error(code="start_timeout", message=words, retryable=True), POLICY)
            if isinstance(message, realtime_schemas.Ping):
                await self._send(realtime_schemas.Pong())
            elif isinstance(message, realtime_schemas.Stop):
                return await self._done("stopped")
            elif isinstance(message, realtime_schemas.InteractionMessage):
                words = "the stream is not open: say session.start first"
                await self._send(Error(code="not_started", message=words, event_id=message.interaction.event_id))
            else:
                try:
                    realtime_schemas.check(message, self._backend.card, self._settings.max_prompt)
                    return message, await self._backend.open(_order(message), self._id)
                except Invalid as error:
                    await self._send(_error(error))
                except ValueError as error:
                    await self._send(Error(code="invalid_value", message=str(error)))
                except Overloaded as error:
                    return await self._end(Error(code="busy", message=str(error), retryable=True), TRY_LATER)

    # What the client says.

    async def _receive(self) -> realtime_schemas.Message:
        """The next message that can be understood; errors answer the others. Raises ConnectionClosed when no more can come."""
        while True:
            heard = await self._socket.receive()
            if heard["type"] == "websocket.disconnect":
                raise ConnectionClosed
            text, data = heard.get("text"), heard.get("bytes") or b""
            size = len(data) if text is None else len(text)
            if size > self._longest:
                words = f"message of {size} characters: must be at most {self._longest}"
                await self._end(Error(code="too_large", message=words), TOO_BIG)
                raise ConnectionClosed
            try:
                if text is None:
                    raise Invalid("binary_message", "a binary message: must be a JSON text")
                return realtime_schemas.parse(text)
            except Invalid as error:
                await self._send(_error(error))

    async def _listen(self, stream: Stream) -> None:
        """Until the client is gone; then nobody is left to make chunks for."""
        try:
            while True:
                message = await self._receive()
                if isinstance(message, realtime_schemas.InteractionMessage):
                    await self._interact(stream, message.interaction)
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

    async def _interact(self, stream: Stream, said: realtime_schemas.Interaction) -> None:
        """Pass a change on. The acknowledgement goes out before the stream's answer to it can."""
        try:
            realtime_schemas.check_change(said, self._settings.max_prompt)
        except Invalid as error:
            return await self._send(_error(error))
        if self._changes >= MAX_PENDING_UPDATES:
            words = f"{self._changes} changes wait for their chunk: wait until one is applied"
            return await self._send(
                Error(code="too_many_interactions", message=words, retryable=True, event_id=said.event_id)
            )
        self._told += 1
        self._changes += 1
        name = said.event_id or f"event-{self._told}"
        async with self._sending:
            await stream.update(
                said.event.prompt,
                name,
                threshold=said.event.confidence_threshold,
                transition_chunks=said.transition_chunks,
            )
            await self._write(realtime_schemas.InteractionQueued(request_id=self._id, event_id=name))

    # What the stream says.

    async def _play(self, start: realtime_schemas.Start, stream: Stream) -> None:
        """Say everything that happens, until the stream is over. A chunk is encoded and sent before the next event is
        asked for, which is what lets the next chunk begin: nothing piles up for a client that is slow."""
        encoder: Encoder | None = None
        async for event in stream:
            match event:
                case Queued():
                    await self._send(realtime_schemas.Queued(position=event.position))
                case Opened():
                    self._opened = True
                    encoder = await self._in_pool(
                        stream_encoders.encoder, start.format, event.fps, event.width, event.height
                    )
                    config = {**start.model_dump(exclude={"type"}), "model": self._backend.card.name}
                    config |= {"width": event.width, "height": event.height, "fps": event.fps}
                    await self._send(
                        realtime_schemas.VideoStart(request_id=self._id, format=start.format, config=config)
                    )
                case UpdateApplied():
                    self._changes -= 1
                    await self._send(
                        realtime_schemas.InteractionApplied(
                            request_id=self._id, event_id=event.event_id, chunk_index=event.index, prompt=event.prompt
                        )
                    )
                case UpdateRejected():
                    self._changes -= 1
                    await self._send(Error(code="invalid_value", message=event.error, event_id=event.event_id))
                case ChunkReady():
                    await self._chunk(event, encoder)
                case Closed():
                    await self._finish(event)

    async def _chunk(self, made: ChunkReady, encoder: Encoder) -> None:
        payload, seconds = await self._in_pool(_encoded, encoder, made.chunk.frames)
        if (metrics := getattr(self._socket.app.state, "metrics", None)) is not None:
            metrics.phase("encode", seconds)
        await self._send(_metadata(made, payload, seconds, self._id, encoder, self._chunks), payload.data)
        self._chunks += 1

    async def _in_pool(self, work, *args):
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def _finish(self, closed: Closed) -> None:
        reason = "stopped" if closed.reason == "closed" else closed.reason
        if reason in CODES:
            return await self._done(reason, closed.error)
        if reason == "failed":
            logger.error("%s failed: %s", self._id, closed.error)
        code = {"refused": POLICY, "busy": TRY_LATER}.get(reason, INTERNAL)
        name = "invalid_value" if reason == "refused" else reason
        await self._end(Error(code=name, message=closed.error or reason, retryable=reason != "refused"), code)

    # How it is said.

    async def _send(self, message: realtime_schemas.ServerMessage, data: bytes | None = None) -> None:
        async with self._sending:
            await self._write(message, data)

    async def _write(self, message: realtime_schemas.ServerMessage, data: bytes | None = None) -> None:
        """Raises ConnectionClosed where the client is gone, or has taken nothing for so long that it might as well be."""
        if self._over:
            raise ConnectionClosed
        try:
            async with asyncio.timeout(self._stall):
                await self._socket.send_text(message.text())
                if data is not None:
                    await self._socket.send_bytes(data)
        except (TimeoutError, WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: closed a moment ago
            if isinstance(error, TimeoutError):
                logger.info("%s: the client took nothing for %g s", self._id, self._stall)
            self._over = True
            raise ConnectionClosed from None

    async def _done(self, reason: str, words: str | None = None) -> None:
        said = realtime_schemas.Done(
            request_id=self._id, reason=reason, message=words, stopped=reason == "stopped", chunks=self._chunks
        )
        await self._end(said, CODES[reason])

    async def _end(self, last: realtime_schemas.ServerMessage, code: int) -> None:
        """The last message, and the connection closed. Whether it arrives is the client's business."""
        async with self._sending:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._write(last)
                    await self._socket.close(code)
            except (ConnectionClosed, TimeoutError, WebSocketDisconnect, RuntimeError):
                pass
            self._over = True


def _order(start: realtime_schemas.Start) -> StreamRequest:
    return StreamRequest(
        prompt=start.prompt,
        seed=start.seed,
        num_frames=start.num_frames,
        steps=start.step_policy,
        threshold=start.confidence_threshold,
        min_steps=start.min_steps,
        max_steps=start.max_steps,
    )


def _error(error: Invalid) -> Error:
    return Error(code=error.code, message=str(error), event_id=error.event_id)


def _encoded(encoder: Encoder, frames: np.ndarray) -> tuple[Payload, float]:
    start = time.perf_counter()
    return encoder.encode(frames), time.perf_counter() - start


def _metadata(
    made: ChunkReady, payload: Payload, seconds: float, id: str, encoder: Encoder, sent: int
) -> realtime_schemas.ChunkMetadata:
    chunk, timings = made.chunk, made.chunk.timings
    frames, height, width, _ = chunk.frames.shape
    return realtime_schemas.ChunkMetadata(
        request_id=id,
        chunk_index=chunk.index,
        generation_chunk_index=chunk.index,
        transport_chunk_index=sent,
        content_type=encoder.content_type,
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
        threshold=made.threshold,
        ms=realtime_schemas.Milliseconds(
            denoise=timings["denoise"], kv=timings["commit"], vae=timings["decode"], encode=1e3 * seconds
        ),
        latency_ms=1e3 * made.latency,
        deadline_ms=None if made.deadline is None else 1e3 * made.deadline,
        late=made.late,
    )
