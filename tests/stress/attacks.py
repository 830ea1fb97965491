"""Hostile clients. Each attack is one visit: it connects, does harm, and goes.

They write to the socket themselves wherever a library would not let them misbehave. A `ResponseLog` notes what an
attack gets back; whether that was right is for the caller to judge.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from urllib.parse import urlsplit

from benchmarks.loadgen.client import PATH, change_message, start_message

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9  # RFC 6455, section 5.2
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, whatever is still under way
PROMPT = "a red circle moves sideways on black"
MIB = 2**20
HOLD = 1.0  # scales how long a client holds on to what it has, and waits for what never comes


@dataclass
class ResponseLog:
    """statuses: (request, HTTP status); closes: (attack, code of the WebSocket's close)."""

    url: str
    statuses: Counter = field(default_factory=Counter)
    closes: Counter = field(default_factory=Counter)
    visits: Counter = field(default_factory=Counter)

    async def note(self, raw: RawConnection, what: str) -> None:
        """The status of the HTTP response; None where the server only closes, or leaves half a request unanswered."""
        status = None
        with suppress(TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(HOLD * 10.0):
                status = await raw.status()
        self.statuses[what, status] += 1


class RawConnection:
    """A TCP connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close without a word: the server gets a TCP reset."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()

    async def status(self) -> int:
        """Of the HTTP response, whose head is read to its end."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split(None, 2)[1])

    async def frame(self) -> tuple[int, bytes]:
        """The next WebSocket frame of the server: opcode, payload."""
        first, length = await self.reader.readexactly(2)
        if length >= 126:
            length = int.from_bytes(await self.reader.readexactly(2 if length == 126 else 8), "big")
        return first & 15, await self.reader.readexactly(length)

    async def until(self, kind: str) -> dict:
        """The next text message of a type."""
        while True:
            opcode, data = await self.frame()
            if opcode == CLOSE:
                raise ConnectionResetError("closed by the server")
            if opcode == TEXT and (message := json.loads(data))["type"] == kind:
                return message


@asynccontextmanager
async def connected(log: ResponseLog, small: bool = False) -> AsyncIterator[RawConnection]:
    """small: with hardly any room for what comes in."""
    parts, sock = urlsplit(log.url), socket.socket()
    sock.setblocking(False)
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096 if small else MIB)
    except BaseException:
        sock.close()
        raise
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.transport.abort()


def upgrade(**changed: str | None) -> bytes:
    """The request that opens a WebSocket, with some headers changed, or left out where None."""
    headers = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode()}
    return request("GET", PATH, headers=headers, **changed)


def request(method: str, path: str, body: bytes = b"", headers: dict | None = None, **changed: str | None) -> bytes:
    if headers is None:
        headers = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body))}
        headers |= {"Content-Type": "application/json"}
    headers = headers | {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


def framed(data: bytes | str, opcode: int = TEXT, fin: bool = True, length: int | None = None, mask=True) -> bytes:
    """A WebSocket frame of a client. length: what it claims to have, where that is a lie."""
    data = data.encode() if isinstance(data, str) else data
    length = len(data) if length is None else length
    short = length if length < 126 else 126 if length < 65536 else 127
    head = bytes([opcode | (128 if fin else 0), short | (128 if mask else 0)])
    head += b"" if short < 126 else length.to_bytes(2 if short == 126 else 8, "big")
    return head + (bytes(4) if mask else b"") + data  # masked with zeros: the data stay as they are


@asynccontextmanager
async def opened(log: ResponseLog, small: bool = False) -> AsyncIterator[RawConnection]:
    """A WebSocket on which nothing was said."""
    async with connected(log, small) as raw:
        await raw.send(upgrade())
        status = await raw.status()
        log.statuses["upgrade", status] += 1
        if status != 101:
            raise ConnectionRefusedError(f"upgrade: {status}")
        yield raw


@asynccontextmanager
async def streaming(log: ResponseLog, rng: Random, small: bool = False, **fields) -> AsyncIterator[RawConnection]:
    """A WebSocket whose stream has been requested, in any format and policy; fields: of its `session.start`."""
    async with opened(log, small) as raw:
        start = {"format": rng.choice(("rgb24", "jpeg", "m4s")), "seed": rng.randrange(2**32)}
        start |= {"step_policy": rng.choice(("dsa", "fixed", "fixed:1", "budget"))}
        await raw.send(framed(start_message(PROMPT, start | fields)))
        yield raw


async def until_closed(log: ResponseLog, raw: RawConnection, name: str, seconds: float) -> None:
    """Listen until the server closes, or for some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                opcode, data = await raw.frame()
                if opcode == CLOSE:
                    log.closes[name, int.from_bytes(data[:2], "big")] += 1
                    return


# The attacks: (response log, random numbers).


async def vanish(log: ResponseLog, rng: Random) -> None:
    """In the middle of a chunk, of the first or of a later one; or while it waits in the queue."""
    async with streaming(log, rng) as raw:
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, 4.0)):
                await raw.until("video.start")
                for _ in range(rng.randrange(4)):
                    await raw.until("video.chunk_metadata")
                    if rng.random() < 0.5:
                        await raw.send(framed(change_message("a blue square jumps on navy", "x")))
                await asyncio.sleep(rng.uniform(0.0, 0.1))
        raw.reset()


GARBAGE: tuple[Callable[[Random], bytes], ...] = (
    lambda r: framed(r.randbytes(r.randrange(1, 2000)), BINARY),
    lambda r: framed(r.randbytes(100)),  # not UTF-8, most likely
    lambda r: framed("{"),
    lambda r: framed("[" * 50000),
    lambda r: framed('{"type": ' * 5000),
    lambda r: framed(json.dumps(r.choice([None, 1, "x", [], {}, [[]], {"type": 1}, {"type": "\ud800"}]))),
    lambda r: framed('{"type":"session.start","prompt":"x","confidence_threshold":NaN}'),
    lambda r: framed('{"type":"session.start","prompt":"x","seed":1' + "0" * 5000 + "}"),
    lambda r: framed(start_message(PROMPT, {"seed": -1})),
    lambda r: framed(start_message(PROMPT, {"width": 7, "height": -7, "fps": 1e300})),
    lambda r: framed(start_message(PROMPT, {"format": "../../etc/passwd"})),
    lambda r: framed(start_message(PROMPT, {"step_policy": "fixed:" + "9" * 900})),
    lambda r: framed(start_message(PROMPT, {"step_policy": "per-chunk:", "max_steps": 99})),
    lambda r: framed(start_message("a purple elephant", {})),
    lambda r: framed(change_message(PROMPT, "too early")),
    lambda r: framed('{"type": "session.ping"}'),
    lambda r: framed("", PING),
    lambda r: framed("x" * 200, PING),  # control frames have at most 125 bytes
    lambda r: framed("", 3),  # reserved
    lambda r: framed("{}", mask=False),  # clients must mask
    lambda r: framed("\x00", CLOSE),  # a close code has two bytes
)


async def garbage(log: ResponseLog, rng: Random) -> None:
    """Nonsense, before a stream or in the middle of one."""
    async with streaming(log, rng) if rng.random() < 0.4 else opened(log) as raw:
        for _ in range(rng.randrange(1, 6)):
            await raw.send(rng.choice(GARBAGE)(rng))
        await until_closed(log, raw, "garbage", 1.0)


async def huge(log: ResponseLog, rng: Random) -> None:
    """Messages and prompts far beyond every limit."""
    text = "x" * rng.choice((100_000, MIB - 200, 3 * MIB))
    message = rng.choice((start_message(text, {}), change_message(text, text), f'"{text}"'))
    async with opened(log) as raw:
        await raw.send(framed(message, rng.choice((TEXT, BINARY))))
        await until_closed(log, raw, "huge", 3.0)


async def half(log: ResponseLog, rng: Random) -> None:
    """Frames and messages that never end, and then silence or a reset."""
    whole = framed(change_message(PROMPT, "half"))
    unended = (
        whole[: rng.randrange(1, len(whole))],
        framed('{"type":', fin=False),
        framed("{", length=MIB),
        framed("{", length=2**62),
        framed("", fin=False) * 100,
    )
    async with streaming(log, rng) if rng.random() < 0.5 else opened(log) as raw:
        await raw.send(rng.choice(unended))
        await until_closed(log, raw, "half", rng.uniform(0.5, 4.0))
        if rng.random() < 0.5:
            raw.reset()


WRONG_UPGRADES: tuple[Callable[[Random], bytes], ...] = (
    lambda r: upgrade(Sec_WebSocket_Version="1"),
    lambda r: upgrade(Sec_WebSocket_Key=None),
    lambda r: upgrade(Sec_WebSocket_Key="short"),
    lambda r: upgrade(Upgrade="h2c"),
    lambda r: upgrade(Connection="close"),
    lambda r: upgrade(Origin="http://evil.example"),
    lambda r: upgrade(Content_Length="5") + b"12345",
    lambda r: upgrade()[: r.randrange(1, 100)],
    lambda r: upgrade().replace(b"GET", b"POST"),
    lambda r: upgrade().replace(PATH.encode(), b"/v1/realtime/nothing"),
    lambda r: b"\x16\x03\x01" + r.randbytes(200),  # as TLS begins
    lambda r: b"GET / HTTP/9.9\r\n\r\n",
    lambda r: b"\r\n" * 50,
)


async def wrong_upgrade(log: ResponseLog, rng: Random) -> None:
    async with connected(log) as raw:
        await raw.send(rng.choice(WRONG_UPGRADES)(rng))
        await log.note(raw, "upgrade")


async def slow(log: ResponseLog, rng: Random) -> None:
    """Requests a stream and does not read it."""
    async with streaming(log, rng, small=True) as raw:
        raw.writer.transport.pause_reading()
        await asyncio.sleep(HOLD * rng.uniform(2.0, 15.0))
        if rng.random() < 0.3:
            raw.writer.transport.resume_reading()
            await until_closed(log, raw, "slow", 2.0)


async def silent(log: ResponseLog, rng: Random) -> None:
    """Connects and says nothing: no request, half a request, or no `session.start`."""
    async with connected(log) as raw:
        await raw.send(rng.choice((b"", b"GET /health HT", upgrade())))
        await asyncio.sleep(HOLD * rng.uniform(1.0, 12.0))


async def flood(log: ResponseLog, rng: Random) -> None:
    """More prompt changes and pings than anybody can answer."""
    async with streaming(log, rng) as raw:
        for number in range(rng.randrange(50, 300)):
            await raw.send(framed(change_message(f"a red {rng.choice(('circle', 'cross', 'cow'))} rests", str(number))))
            await raw.send(framed('{"type":"session.ping"}'))
        await until_closed(log, raw, "flood", 2.0)


def job(**fields) -> bytes:
    return request("POST", "/v1/videos", json.dumps({"prompt": PROMPT, "num_frames": 6, **fields}).encode())


ELSEWHERE = ("/v1/videos/../../etc/passwd", "/v1/videos/%2e%2e%2f%2e%2e", "/%00", "//", "/v1/videos/" + "x" * 3000)
REST: tuple[Callable[[Random], bytes], ...] = (
    lambda r: request("GET", r.choice(("/health", "/readyz", "/metrics", "/v1/models", "/v1/videos", "/"))),
    lambda r: request("GET", r.choice(ELSEWHERE)),
    lambda r: request("DELETE", "/v1/videos/video_" + "0" * 32),
    lambda r: request("GET", "/v1/videos?limit=" + r.choice(("-1", "1e9", "NaN", "100", "'"))),
    lambda r: request(r.choice(("PUT", "PATCH", "TRACE", "OPTIONS", "BREW")), "/v1/videos"),
    lambda r: request("POST", "/v1/videos", r.randbytes(r.randrange(1000))),
    lambda r: request("POST", "/v1/videos", b"[" * 100_000),
    lambda r: request("POST", "/v1/videos", b'{"prompt": "x", "seconds": NaN}'),
    lambda r: request("POST", "/v1/videos", b"--x\r\n", Content_Type="multipart/form-data; boundary=x"),
    lambda r: request("POST", "/v1/videos", b"{}", Content_Length="1000"),  # and no more comes
    lambda r: request("POST", "/v1/videos", Content_Length="-5"),
    lambda r: request("POST", "/v1/videos", Content_Length=str(10**12)),
    lambda r: request("POST", "/v1/videos", b"x" * (17 * MIB)),
    lambda r: request("GET", "/health", **{"X" * 50: "y" * 100_000}),
    lambda r: job(prompt="x" * MIB),
    lambda r: job(num_frames=r.choice((0, -3, 7, 10**9, 1.5, True))),
    lambda r: job(seed=r.choice((-1, 2**64, "0", 0.5))),
    lambda r: job(input_reference=base64.b64encode(r.randbytes(3000)).decode()),
    lambda r: job(),
)


async def rest(log: ResponseLog, rng: Random) -> None:
    """Requests to the REST API, right ones and wrong ones; some leave before the response."""
    async with connected(log) as raw:
        with suppress(ConnectionError):  # the server need not read on once it is too much, and may still respond
            await raw.send(rng.choice(REST)(rng))
        if rng.random() < 0.1:
            return raw.reset()
        await log.note(raw, "rest")


Attack = Callable[[ResponseLog, Random], Awaitable[None]]
ATTACKS: dict[Attack, int] = {  # how many of a hundred hostile clients make it
    vanish: 25,
    garbage: 15,
    huge: 8,
    half: 12,
    wrong_upgrade: 10,
    slow: 8,
    silent: 5,
    flood: 5,
    rest: 12,
}


async def repeat(attack: Attack, log: ResponseLog, rng: Random, until: float, pause: float) -> None:
    """One hostile client: the same again and again, `until` by the loop's clock, `pause` seconds apart on average."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):  # sent away, as it should be
            async with asyncio.timeout(30.0):
                await attack(log, rng)
        log.visits[attack.__name__] += 1
        await asyncio.sleep(min(rng.expovariate(1 / pause), max(0.0, until - loop.time())))
