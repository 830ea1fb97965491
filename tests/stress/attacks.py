"""Clients that no server wishes for. Each attack is one visit: it comes, does harm, and goes.

They speak to the socket themselves wherever a library would not let them misbehave. What an attack gets back is noted
by a `Witness`; whether that was right is for the caller to judge.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from urllib.parse import urlsplit

from benchmarks.loadgen.client import PATH, change_message, start_message

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9  # RFC 6455, section 5.2
NOW = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, whatever is still under way
PROMPT = "a red circle moves sideways on black"
MIB = 2**20


@dataclass
class Witness:
    """statuses: (what was asked, HTTP status); closes: (attack, code of the WebSocket's close)."""

    url: str
    statuses: Counter = field(default_factory=Counter)
    closes: Counter = field(default_factory=Counter)
    visits: Counter = field(default_factory=Counter)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port


class Line:
    """A TCP connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def vanish(self) -> None:
        """Gone without a word: the server gets a reset."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
        self.writer.transport.abort()

    async def status(self) -> int | None:
        """Of the HTTP answer, None where the server only closes. The rest of the head is read too."""
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
            if opcode == TEXT and (said := json.loads(data))["type"] == kind:
                return said


@asynccontextmanager
async def line(witness: Witness, small: bool = False) -> AsyncIterator[Line]:
    """small: with hardly any room for what comes in."""
    sock = socket.socket()
    sock.setblocking(False)
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        await asyncio.get_running_loop().sock_connect(sock, witness.address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096 if small else MIB)
    except BaseException:
        sock.close()
        raise
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()


def upgrade(**changed: str | None) -> bytes:
    """The request that opens a WebSocket, with some headers changed, or left out where None."""
    headers = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    }
    headers |= {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"GET {PATH} HTTP/1.1", *lines, "", ""]).encode()


def framed(data: bytes, opcode: int = TEXT, fin: bool = True, said: int | None = None, mask: bool = True) -> bytes:
    """A WebSocket frame of a client. said: the length that it claims to have, where that is a lie."""
    length = len(data) if said is None else said
    short = length if length < 126 else 126 if length < 65536 else 127
    head = bytes([opcode | (128 if fin else 0), short | (128 if mask else 0)])
    head += b"" if short < 126 else length.to_bytes(2 if short == 126 else 8, "big")
    return head + (bytes(4) if mask else b"") + data  # masked with zeros: the data stay as they are


@asynccontextmanager
async def opened(witness: Witness, small: bool = False) -> AsyncIterator[Line]:
    """A WebSocket on which nothing was said."""
    async with line(witness, small) as raw:
        await raw.send(upgrade())
        status = await raw.status()
        witness.statuses["upgrade", status] += 1
        if status != 101:
            raise ConnectionRefusedError(f"upgrade: {status}")
        yield raw


@asynccontextmanager
async def streaming(witness: Witness, rng: Random, small: bool = False, **fields) -> AsyncIterator[Line]:
    """A WebSocket whose stream has been asked for, in any format and policy; fields: of its `session.start`."""
    async with opened(witness, small) as raw:
        start = {"format": rng.choice(("rgb24", "jpeg", "m4s")), "seed": rng.randrange(2**32)}
        start |= {"step_policy": rng.choice(("dsa", "fixed", "fixed:1", "budget"))}
        await raw.send(framed(start_message(PROMPT, start | fields).encode()))
        yield raw


async def farewell(witness: Witness, raw: Line, name: str, patience: float = 5.0) -> None:
    """Listen until the server closes, or for some seconds."""
    try:
        async with asyncio.timeout(patience):
            while True:
                opcode, data = await raw.frame()
                if opcode == CLOSE:
                    witness.closes[name, int.from_bytes(data[:2], "big")] += 1
                    return
    except TimeoutError:
        pass


# The attacks: (witness, random numbers).


async def vanish(witness: Witness, rng: Random) -> None:
    """In the middle of a chunk, of the first or of a later one; or while it waits in the queue."""
    async with streaming(witness, rng) as raw:
        try:
            async with asyncio.timeout(rng.uniform(0.0, 4.0)):
                await raw.until("video.start")
                for _ in range(rng.randrange(4)):
                    await raw.until("video.chunk_metadata")
                    if rng.random() < 0.5:
                        await raw.send(framed(change_message("a blue square jumps on navy", "x").encode()))
                await asyncio.sleep(rng.uniform(0.0, 0.1))
        except TimeoutError:
            pass
        raw.vanish()


GARBAGE: tuple[Callable[[Random], bytes], ...] = (
    lambda r: framed(r.randbytes(r.randrange(1, 2000)), BINARY),
    lambda r: framed(r.randbytes(100)),  # not UTF-8, most likely
    lambda r: framed(b"{"),
    lambda r: framed(b"[" * 50000),
    lambda r: framed(b'{"type": ' * 5000),
    lambda r: framed(json.dumps(r.choice([None, 1, "x", [], {}, [[]], {"type": 1}, {"type": "\ud800"}])).encode()),
    lambda r: framed(b'{"type":"session.start","prompt":"x","confidence_threshold":NaN}'),
    lambda r: framed(b'{"type":"session.start","prompt":"x","seed":1' + b"0" * 5000 + b"}"),
    lambda r: framed(start_message(PROMPT, {"seed": -1}).encode()),
    lambda r: framed(start_message(PROMPT, {"width": 7, "height": -7, "fps": 1e300}).encode()),
    lambda r: framed(start_message(PROMPT, {"format": "../../etc/passwd"}).encode()),
    lambda r: framed(start_message(PROMPT, {"step_policy": "fixed:" + "9" * 900}).encode()),
    lambda r: framed(start_message(PROMPT, {"step_policy": "per-chunk:", "max_steps": 99}).encode()),
    lambda r: framed(start_message("a purple elephant", {}).encode()),
    lambda r: framed(change_message(PROMPT, "too early").encode()),
    lambda r: framed(json.dumps({"type": "session.ping"}).encode()),
    lambda r: framed(b"", PING),
    lambda r: framed(b"x" * 200, PING),  # control frames have at most 125 bytes
    lambda r: framed(b"", 3),  # reserved
    lambda r: framed(b"{}", mask=False),  # clients must mask
    lambda r: framed(b"\x00", CLOSE),  # a close code has two bytes
)


async def garbage(witness: Witness, rng: Random) -> None:
    """Nonsense, before a stream or in the middle of one."""
    async with streaming(witness, rng) if rng.random() < 0.4 else opened(witness) as raw:
        for _ in range(rng.randrange(1, 6)):
            await raw.send(rng.choice(GARBAGE)(rng))
        await farewell(witness, raw, "garbage", 1.0)


async def huge(witness: Witness, rng: Random) -> None:
    """Messages and prompts far beyond every limit."""
    size = rng.choice((100_000, MIB - 200, 3 * MIB))
    message = rng.choice(
        (start_message("x" * size, {}), change_message("y" * size, "z" * size), '"' + "z" * size + '"')
    )
    async with opened(witness) as raw:
        await raw.send(framed(message.encode(), rng.choice((TEXT, BINARY))))
        await farewell(witness, raw, "huge", 3.0)


async def half(witness: Witness, rng: Random) -> None:
    """Frames and messages that never end, and then silence or a reset."""
    async with streaming(witness, rng) if rng.random() < 0.5 else opened(witness) as raw:
        whole = framed(change_message(PROMPT, "half").encode())
        await raw.send(
            rng.choice(
                (
                    whole[: rng.randrange(1, len(whole))],
                    framed(b'{"type":', fin=False),
                    framed(b"{", said=MIB),
                    framed(b"{", said=2**62),
                    framed(b"", fin=False) * 100,
                )
            )
        )
        await farewell(witness, raw, "half", rng.uniform(0.5, 4.0))
        if rng.random() < 0.5:
            raw.vanish()


async def wrong_upgrade(witness: Witness, rng: Random) -> None:
    async with line(witness) as raw:
        await raw.send(
            rng.choice(
                (
                    upgrade(Sec_WebSocket_Version="1"),
                    upgrade(Sec_WebSocket_Key=None),
                    upgrade(Sec_WebSocket_Key="short"),
                    upgrade(Upgrade="h2c"),
                    upgrade(Connection="close"),
                    upgrade(Origin="http://evil.example"),
                    upgrade(Content_Length="5") + b"12345",
                    upgrade()[: rng.randrange(1, 100)],
                    upgrade().replace(b"GET", b"POST"),
                    upgrade().replace(PATH.encode(), b"/v1/realtime/nothing"),
                    b"\x16\x03\x01" + rng.randbytes(200),  # as TLS begins
                    b"GET / HTTP/9.9\r\n\r\n",
                    b"\r\n" * 50,
                )
            )
        )
        await answered(witness, raw, "upgrade")


async def slow(witness: Witness, rng: Random) -> None:
    """Asks for a stream and does not read it."""
    async with streaming(witness, rng, small=True) as raw:
        raw.writer.transport.pause_reading()
        await asyncio.sleep(rng.uniform(2.0, 15.0))
        if rng.random() < 0.3:
            raw.writer.transport.resume_reading()
            await farewell(witness, raw, "slow", 2.0)


async def silent(witness: Witness, rng: Random) -> None:
    """Connects and says nothing: no request, half a request, or no `session.start`."""
    async with line(witness) as raw:
        await raw.send(rng.choice((b"", b"GET /health HT", upgrade())))
        await asyncio.sleep(rng.uniform(1.0, 12.0))


async def flood(witness: Witness, rng: Random) -> None:
    """More prompt changes and pings than anybody can answer."""
    async with streaming(witness, rng) as raw:
        for number in range(rng.randrange(50, 300)):
            await raw.send(
                framed(change_message(f"a red {rng.choice(('circle', 'cross', 'cow'))} rests", str(number)).encode())
            )
            await raw.send(framed(b'{"type":"session.ping"}'))
        await farewell(witness, raw, "flood", 2.0)


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    said = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body))}
    said |= {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in said.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


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
    lambda r: request("POST", "/v1/videos", b"", Content_Length="-5"),
    lambda r: request("POST", "/v1/videos", b"", Content_Length=str(10**12)),
    lambda r: request("POST", "/v1/videos", b"x" * (17 * MIB)),
    lambda r: request("GET", "/health", **{"X" * 50: "y" * 100_000}),
    lambda r: job(prompt="x" * MIB),
    lambda r: job(num_frames=r.choice((0, -3, 7, 10**9, 1.5, True))),
    lambda r: job(seed=r.choice((-1, 2**64, "0", 0.5))),
    lambda r: job(input_reference=base64.b64encode(r.randbytes(3000)).decode()),
    lambda r: job(),
)


async def rest(witness: Witness, rng: Random) -> None:
    """Requests to the REST API, right ones and wrong ones; some leave before the answer."""
    async with line(witness) as raw:
        try:
            await raw.send(rng.choice(REST)(rng))
        except (ConnectionError, BrokenPipeError):
            pass  # the server need not read on once it knows that it is too much; its answer may still be there
        if rng.random() < 0.1:
            return raw.vanish()
        await answered(witness, raw, "rest")


async def answered(witness: Witness, raw: Line, what: str) -> None:
    try:
        async with asyncio.timeout(10.0):
            witness.statuses[what, await raw.status()] += 1
    except (TimeoutError, asyncio.IncompleteReadError):  # half a request gets no answer
        witness.statuses[what, None] += 1


Attack = Callable[[Witness, Random], Awaitable[None]]
ATTACKS: dict[Attack, int] = {  # with how many of a hundred hostile clients make it
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


async def keep_at(attack: Attack, witness: Witness, rng: Random, until: float, pause: float) -> None:
    """One hostile client: the same again and again, `until` by the loop's clock, `pause` seconds apart on average."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        try:
            async with asyncio.timeout(30.0):
                await attack(witness, rng)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):  # sent away, as it should be
            pass
        witness.visits[attack.__name__] += 1
        await asyncio.sleep(min(rng.expovariate(1 / pause), max(0.0, until - loop.time())))
