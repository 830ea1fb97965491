"""Hundreds of clients, most of them hostile, for minutes: what is left of a server afterwards.

    python tests/stress/soak.py                                  # 200 clients for 5 minutes, the small model
    python tests/stress/soak.py --seconds 20 --clients 200

The server is a process of its own, under --deterministic. One client in five is honest: it opens streams of a few
chunks, one after another, each with its own seed, steps and prompt changes, and keeps a digest of every chunk. The
others are those of `attacks.py`: they vanish in the middle of chunks, send garbage, huge messages and halves of
messages, upgrade wrongly, read nothing, say nothing, flood, and abuse the REST API.

checks: no_5xx, no HTTP status of 500 or more and no WebSocket closed as the server's fault (1011); log, no traceback in
what the server wrote (`tracebacks`); alive; idle, no stream, no job and no one in the queue afterwards; threads and
files, of the server's process not more than before; memory, its resident set at the end at most --growth MiB above what
it was a third into the run; honest, every honest stream came to its end (or was refused because the server is full, and
tried again); frames, every honest stream's chunks are bit for bit those of a quiet run in this process with its seed,
the same prompt switches at the same chunks and, for a `budget` stream, the thresholds that the server reported.
"Before" is after a short run of the same clients and with all pools of threads filled (`fill_thread_pools`).

The last line of stdout is one JSON object; the exit code is 1 where a check has failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed

sys.path.append(str(Path(__file__).resolve().parents[2]))  # run as a script, Python looks only beside this file

from benchmarks.common.environment import commit, machine, save
from benchmarks.loadgen.client import change_message, converse, dial, start_message
from benchmarks.loadgen.server_process import COMMAND, ProcessStats, Server
from dsa_engine import Pipeline
from dsa_engine.evaluation.summary import rounded
from dsa_engine.sampling.policy import Budget
from dsa_engine.shapes.world import sample_captions
from tests.stress.attacks import ATTACKS, ResponseLog, connected, repeat, request, streaming

HONEST = 0.2  # of all clients
STEPS = ("dsa", "relative", "fixed", "fixed:2", "budget")  # of honest streams
CHUNKS = (3, 9)  # of an honest stream, from and to
PATIENCE = 900.0  # seconds that an honest stream may take, its time in the queue included
IDLE = 8.0  # seconds, of the server: so that what is left over is gone soon
SETTLE = 30.0  # seconds after the last forward until everything must be back
QUIET = 11.0  # seconds at least: AnyIO's threads may be idle for 10
PAUSE = 0.5  # seconds between two visits of a client, on average
POOLED = 16  # concurrent requests, more than any pool of threads in a server on two cores has threads
WARM = 5.0  # seconds of the run before "before"
MIB = 2**20


@dataclass
class HonestStream:
    """What an honest client saw of one stream."""

    start: dict
    prompt: str
    changes: dict[int, list[str]] = field(default_factory=dict)  # by the chunk that they were applied before
    digests: list[str] = field(default_factory=list)
    thresholds: list[float | None] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ended: str = ""  # why, "done" where all chunks came

    async def listen(self, socket) -> None:
        async for data in socket:
            if isinstance(data, bytes):
                self.digests.append(sha256(data).hexdigest())
                continue
            message = json.loads(data)
            match message["type"]:
                case "video.chunk_metadata":
                    self.thresholds.append(message["threshold"])
                    self.steps.append(message["steps"])
                case "session.interaction.applied":
                    self.changes.setdefault(message["chunk_index"], []).append(message["prompt"])
                case "error":
                    self.ended = message["code"]
                case "session.done":
                    self.ended = self.ended or message["reason"]


async def talk(socket, changes: list[tuple[float, str]]) -> None:
    """Its changes, (seconds after the previous one, prompt), then pings: it may have to wait in the queue."""
    for number, (pause, prompt) in enumerate(changes):
        await asyncio.sleep(pause)
        await socket.send(change_message(prompt, f"change-{number}"))
    while True:
        await asyncio.sleep(IDLE / 4)
        await socket.send(json.dumps({"type": "session.ping"}))


async def honest(url: str, rng: Random, until: float, chunk_frames: int, streams: list[HonestStream]) -> None:
    """One honest client: stream after stream."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        start = {"seed": rng.randrange(2**64), "step_policy": rng.choice(STEPS), "format": "rgb24"}
        start |= {"num_frames": rng.randint(*CHUNKS) * chunk_frames}
        captions = np.random.default_rng(rng.randrange(2**32)), 1 + rng.randrange(4)
        prompt, *others = map(str, sample_captions(*captions, cut=0.6, soft=0.4))
        changes = [(rng.uniform(0.0, 1.0), other) for other in others]
        streams.append(one := HonestStream(start, prompt))
        try:
            async with asyncio.timeout(PATIENCE), dial(url) as socket:
                await socket.send(start_message(prompt, start))
                await converse(talk(socket, changes), one.listen(socket))
        except (OSError, ConnectionClosed, TimeoutError) as error:
            one.ended = one.ended or f"{type(error).__name__}: {error}"
        await asyncio.sleep(rng.expovariate(1 / PAUSE))


def first_mismatch(pipe: Pipeline, one: HonestStream) -> str | None:
    """Where a stream differs from a quiet run of the same; None where it does not."""
    steps, options = one.start["step_policy"], {name: one.start[name] for name in ("seed", "num_frames")}
    policy = Budget(pipe.fps) if steps == "budget" else steps
    with pipe.session(one.prompt, step_policy=policy, **options) as session:
        for index, (digest, threshold, taken) in enumerate(zip(one.digests, one.thresholds, one.steps)):
            for prompt in one.changes.get(index, ()):
                session.update(prompt)
            if steps == "budget":
                session.rollout.policies[0].threshold = threshold
            chunk = session.next_chunk()
            if sha256(chunk.frames.tobytes()).hexdigest() != digest:
                return f"chunk {index} of {one.start}, {chunk.steps} steps here and {taken} there"
        return None if session.exhausted else f"{len(one.digests)} chunks of {one.start}"


class Swarm:
    """All clients at once on one server."""

    def __init__(self, server: Server, clients: int, seed: int, chunk_frames: int):
        self.server, self.clients, self.seed, self.chunk_frames = server, clients, seed, chunk_frames
        self.log, self.streams = ResponseLog(server.url), []
        self.samples: list[tuple[float, ProcessStats]] = []  # with the seconds since the start

    async def run(self, seconds: float) -> None:
        until, friends = asyncio.get_running_loop().time() + seconds, max(1, round(HONEST * self.clients))
        clients = [
            honest(self.server.url, Random(f"{self.seed} {i}"), until, self.chunk_frames, self.streams)
            for i in range(friends)
        ]
        attacks = [attack for attack, share in ATTACKS.items() for _ in range(share)]
        Random(self.seed).shuffle(attacks)
        for i in range(self.clients - friends):
            rng = Random(f"{self.seed} hostile {i}")
            clients.append(repeat(attacks[i % len(attacks)], self.log, rng, until, PAUSE))
        await converse(self._sample(min(1.0, seconds / 20)), asyncio.gather(*clients))

    async def _sample(self, interval: float) -> None:
        start = time.monotonic()
        while self.server.alive:
            self.samples.append((time.monotonic() - start, self.server.stats()))
            await asyncio.sleep(interval)


async def fill_thread_pools(url: str) -> None:
    """Give every pool of threads more to do than it has threads: what is left of it afterwards is all that it keeps."""
    log = ResponseLog(url)

    async def watch(seed: int) -> None:
        async with streaming(log, Random(seed), format="m4s") as raw:
            for _ in range(4):
                await raw.until("video.chunk_metadata")

    async def ask() -> None:
        async with connected(log) as raw:
            await raw.send(request("GET", "/v1/videos"))
            await log.note(raw, "fill")

    await asyncio.gather(*map(watch, range(POOLED)), *(ask() for _ in range(POOLED)))


def busy(server: Server) -> dict[str, float]:
    """What a server still has to do, by its metrics; empty where it has nothing."""
    found, names = server.metrics(), ("dsa_sessions", "dsa_queue_depth", "dsa_jobs_running")
    unfinished = [f'dsa_jobs{{state="{state}"}}' for state in ("queued", "in_progress")]
    return {name: found[name] for name in (*names, *unfinished) if found[name]}


def wait_until_idle(server: Server, before: ProcessStats | None) -> tuple[dict[str, float], ProcessStats]:
    """Wait until the server has nothing to do and, if `before` is given, its threads and files are back to that level.

    At least QUIET seconds, until AnyIO has let its idle threads go. Gives up SETTLE seconds after the last forward (it
    may still have jobs to make). Returns what is left to do, and the process's statistics.
    """
    start = worked = time.monotonic()
    forwards = -1.0
    while True:
        server.get("/")  # a file: AnyIO looks at its idle threads when one of them has worked
        left, now, clock = busy(server), server.stats(), time.monotonic()
        if (done := server.metrics()["dsa_forwards"]) != forwards:
            forwards, worked = done, clock
        back = before is None or (now.threads <= before.threads and now.files <= before.files)
        if (back and not left and clock - start > QUIET) or clock - worked > SETTLE:
            return left, now
        time.sleep(0.5)


def soak(model: str, clients: int, seconds: float, growth: float, seed: int = 0) -> dict:
    """All figures as one object, with `failed`, the checks that have failed."""
    pipe = Pipeline.from_pretrained(model, device="cpu", max_sessions=1, deterministic=True)
    torch.set_num_threads(pipe.cpu_threads)  # as the server does: other sums have other bits
    chunk_frames = pipe.engine.decoder.frames_of(pipe.config.chunk_frames, False)
    options = ["--model", model, "--device", "cpu", "--deterministic", "--idle-timeout", f"{IDLE:g}"]
    with Server(options, COMMAND) as server:
        first = server.stats()
        asyncio.run(Swarm(server, clients, seed + 1, chunk_frames).run(min(WARM, seconds)))
        asyncio.run(fill_thread_pools(server.url))
        _, before = wait_until_idle(server, None)
        swarm, start = Swarm(server, clients, seed, chunk_frames), time.monotonic()
        asyncio.run(swarm.run(seconds))
        elapsed = time.monotonic() - start
        left, after = wait_until_idle(server, before)
        health, alive, text = server.get("/health")[0], server.alive, server.log_text()
        stop = server.stop()
    early = next(stats.rss for at, stats in swarm.samples if at >= seconds / 3)
    survivors = [one for one in swarm.streams if one.ended == "done"]
    mismatches = [found for found in (first_mismatch(pipe, one) for one in survivors) if found]
    ended, log = Counter(one.ended for one in swarm.streams), swarm.log
    faults = {f"{what} {status}": n for (what, status), n in log.statuses.items() if (status or 0) >= 500}
    faults |= {f"{what} closed {code}": n for (what, code), n in log.closes.items() if code == 1011}
    checks = {
        "no_5xx": not faults,
        "log": not tracebacks(text),
        "alive": alive and health == 200,
        "idle": not left,
        "threads": after.threads <= before.threads,
        "files": after.files <= before.files,
        "memory": after.rss - early <= growth * MIB,
        "honest": bool(survivors) and set(ended) <= {"done", "busy"},
        "frames": not mismatches,
    }
    return {
        "benchmark": "soak",
        "model": model,
        "clients": clients,
        "seconds": elapsed,
        "failed": [name for name, passed in checks.items() if not passed],
        "checks": checks,
        "faults": faults,
        "statuses": {f"{what} {status}": n for (what, status), n in sorted(log.statuses.items(), key=str)},
        "closes": {f"{what} {code}": n for (what, code), n in sorted(log.closes.items())},
        "visits": dict(log.visits),
        "honest": {
            "streams": len(swarm.streams),
            "ended": dict(ended),
            "chunks_compared": sum(len(one.digests) for one in survivors),
            "switches": sum(len(prompts) for one in survivors for prompts in one.changes.values()),
            "steps": dict(Counter(n for one in survivors for n in one.steps)),
            "unequal": mismatches[:10],
        },
        "left": left,
        "process": {"start": first._asdict(), "before": before._asdict(), "after": after._asdict(), "rss_early": early}
        | {
            f"{name}_most": max(getattr(stats, name) for _, stats in swarm.samples)
            for name in ("rss", "threads", "files")
        },
        "stop_s": stop,
        "log": [one[-2000:] for one in tracebacks(text)[:3]],
        "commit": commit(),
        "machine": machine(),
    }


def tracebacks(text: str) -> list[str]:
    """Those in a log, but for uvicorn's own at a text that is not UTF-8, which it writes when it does the right thing:
    close with 1007."""
    found = re.findall(r"^Traceback .*\n(?:[ ].*\n)*.*", text, re.MULTILINE)
    return [one for one in found if not ("uvicorn/protocols" in one and "UnicodeDecodeError" in one)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="shapes", help="shipped name or folder")
    add("--clients", type=int, default=200)
    add("--seconds", type=float, default=300.0)
    add("--growth", type=float, default=48.0, help="MiB that the server's memory may have grown by")
    add("--seed", type=int, default=0)
    add("--save", type=Path, metavar="JSON", help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    result = rounded(soak(args.model, args.clients, args.seconds, args.growth, args.seed))
    if args.save:
        save(result, args.save)
    sys.stdout.write(json.dumps(result, separators=(",", ":")) + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
