"""The client side of a serving benchmark: streams over WebSockets, what each client saw, and that as figures.

All clients live in one asyncio loop. A stream is watched as a player would: it starts to play with the first chunk, and
where the next one is not there in time it stalls until it is, which is a late chunk.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from dsa_engine.shapes.world import sample_captions

PATH = "/v1/realtime/video"
CUT, SOFT = 0.6, 0.4  # of all prompt changes: to another object, to another motion of the same; as 0.15 : 0.10 there
PATIENCE = 10.0  # seconds for a stream to end after its client asked for that


@dataclass(frozen=True)
class ClientScenario:
    """What one client does.

    arrives: seconds from the start; prompts: each with its seconds from the start, the first one at `arrives`; start:
    the other fields of its `session.start`.
    """

    arrives: float
    prompts: list[tuple[float, str]]
    start: dict


def scenarios(
    rng: np.random.Generator, count: int, ramp: float, until: float, change: float, start: dict
) -> list[ClientScenario]:
    """Of `count` clients, each with a seed of its own. They arrive as a Poisson process does that has `count` arrivals
    in `ramp` seconds: at uniform times. They change their prompts as a Poisson process with `change` seconds between
    two on average, up to `until`."""
    found = []
    for arrives in np.sort(rng.uniform(0.0, ramp, count)).tolist():
        times = [arrives]
        while times[-1] < until:
            times.append(times[-1] + rng.exponential(change))
        captions = sample_captions(rng, len(times), CUT, SOFT)
        prompts = [(at, str(caption)) for at, caption in zip(times[:1] + times[1:-1], captions)]
        found.append(ClientScenario(arrives, prompts, start | {"seed": int(rng.integers(2**31))}))
    return found


class Arrival(NamedTuple):
    """A chunk at the client: when, how many frames, and what the server said of it."""

    at: float
    frames: int
    steps: int
    latency: float  # ms
    deadline: float | None  # ms
    late: bool


@dataclass
class ClientRecord:
    """What a client saw."""

    asked: float = 0.0  # when it requested the stream
    fps: float = 0.0
    chunks: list[Arrival] = field(default_factory=list)
    applied: list[float] = field(default_factory=list)  # seconds from a prompt's request to its acknowledgement
    changes: int = 0  # prompts that were requested
    bytes: int = 0
    error: str | None = None  # why the stream ended before its client wanted it to


def start_message(prompt: str, start: dict) -> str:
    return json.dumps({"type": "session.start", "prompt": prompt, **start})


def change_message(prompt: str, event_id: str) -> str:
    event = {"event_id": event_id, "event": {"prompt": prompt}, "transition_chunks": 0}
    return json.dumps({"type": "session.interaction", "interaction": event})


def dial(url: str) -> connect:
    """A connection for a client that must be cheap: no compression, no pings of its own, no proxy between."""
    options = {"compression": None, "ping_interval": None, "max_size": None, "proxy": None}
    return connect(url.replace("http", "ws", 1) + PATH, **options, open_timeout=60, close_timeout=2)


async def converse(talk: Coroutine, listen: Awaitable) -> None:
    """Both at once, to the end of `listen`."""
    talking = asyncio.create_task(talk)
    try:
        await listen
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


async def run_client(url: str, scenario: ClientScenario, begin: float, until: float) -> ClientRecord:
    """One client, from its arrival to `until`, seconds after `begin` of time.monotonic()."""
    record = ClientRecord()
    await asyncio.sleep(begin + scenario.arrives - time.monotonic())
    record.asked = time.monotonic()
    try:
        async with dial(url) as socket, asyncio.timeout(begin + until + PATIENCE - time.monotonic()):
            await socket.send(start_message(scenario.prompts[0][1], scenario.start))
            await converse(_talk(socket, scenario, begin, until, record), _listen(socket, record))
    except TimeoutError:
        record.error = "did not end"
    except (OSError, ConnectionClosed) as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.error is None and time.monotonic() < begin + until:
        record.error = "ended early"
    return record


async def _talk(
    socket: ClientConnection, scenario: ClientScenario, begin: float, until: float, record: ClientRecord
) -> None:
    for number, (at, prompt) in enumerate(scenario.prompts[1:], 1):
        await asyncio.sleep(begin + at - time.monotonic())
        record.changes += 1
        await socket.send(change_message(prompt, f"{number} {time.monotonic()}"))
    await asyncio.sleep(begin + until - time.monotonic())
    await socket.send(json.dumps({"type": "session.stop"}))


async def _listen(socket: ClientConnection, record: ClientRecord) -> None:
    chunk: dict = {}
    async for data in socket:
        now = time.monotonic()
        if isinstance(data, bytes):
            record.bytes += len(data)
            said = (chunk[name] for name in ("num_frames", "steps", "latency_ms", "deadline_ms", "late"))
            record.chunks.append(Arrival(now, *said))
            continue
        message = json.loads(data)
        match message["type"]:
            case "video.chunk_metadata":
                chunk = message
            case "video.start":
                record.fps = message["config"]["fps"]
            case "session.interaction.applied":
                record.applied.append(now - float(message["event_id"].split()[1]))
            case "error":
                record.error = f"{message['code']}: {message['message']}"
            case "session.done":
                return


class Playback(NamedTuple):
    """A stream at its player within a window: seconds that it stalled, chunks that came, and late ones of them."""

    stalled: float
    chunks: int
    late: int


def playback(arrivals: Sequence[tuple[float, int]], fps: float, start: float, stop: float) -> Playback:
    """arrivals: (when, frames) of all chunks from the first on. A player that waits at the end of the window waits for
    a late chunk; one that had none before has stalled all the time."""
    stalled, chunks, late, due = 0.0, 0, 0, None
    for at, frames in arrivals:
        if at >= stop:
            break
        chunks += at >= start
        late += due is not None and at > max(due, start)
        stalled += max(0.0, at - max(start, due or start))
        due = max(due or at, at) + frames / fps
    if due is None or due < stop:
        stalled += stop - max(start, due or start)
        chunks, late = chunks + 1, late + 1
    return Playback(stalled, chunks, late)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)} | {"max": float(max(values))}


def jain(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 where all have the same, 1 / n where one has everything."""
    x = np.asarray(values, dtype=float)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else 1.0


def figures(records: Sequence[ClientRecord], start: float, stop: float) -> dict:
    """Of all clients within the window from start to stop. latency_ms, deadline, late_by_server: as the server says it;
    interval_ms, late, fps: as the clients saw it. chunk_ms: that a chunk plays, which is the deadline of a stream on
    time."""
    plays = [playback([(c.at, c.frames) for c in one.chunks], one.fps or 1.0, start, stop) for one in records]
    inside = [[c for c in one.chunks if start <= c.at < stop] for one in records]
    every = [c for chunks in inside for c in chunks]
    fps = [one.fps * (1 - p.stalled / (stop - start)) for one, p in zip(records, plays)]
    steps = [float(np.mean([c.steps for c in chunks])) for chunks in inside if chunks]
    chunks, frames = sum(p.chunks for p in plays), max((c.frames for one in records for c in one.chunks), default=0)
    wanted = max(one.fps for one in records)
    return {
        "streams": len(records),
        "chunks": chunks,
        "chunks_per_s": len(every) / (stop - start),
        "fps": {"least": min(fps), "mean": float(np.mean(fps)), "wanted": wanted},
        "late": sum(p.late for p in plays) / max(1, chunks),
        "late_by_server": sum(c.late for c in every) / max(1, len(every)),
        "missed": sum(c.late for c in every),
        "latency_ms": percentiles([c.latency for c in every]),
        "chunk_ms": 1e3 * frames / wanted if frames else None,
        "deadline_ms": percentiles([c.deadline for c in every if c.deadline is not None]),
        "interval_ms": percentiles([1e3 * (b.at - a.at) for chunks in inside for a, b in pairwise(chunks)]),
        "first_frame_ms": percentiles([1e3 * (one.chunks[0].at - one.asked) for one in records if one.chunks]),
        "applied_ms": percentiles([1e3 * seconds for one in records for seconds in one.applied]),
        "changes": sum(one.changes for one in records),
        "mean_steps": float(np.mean([c.steps for c in every])) if every else None,
        "steps_histogram": {str(n): count for n, count in sorted(Counter(c.steps for c in every).items())},
        "fairness": {"jain": jain(fps), "steps_spread": max(steps) - min(steps) if steps else None},
        "mbit_per_s": 8e-6 * sum(one.bytes for one in records) / (stop - min(one.asked for one in records)),
        "errors": dict(Counter(one.error for one in records if one.error)),
    }
