"""Hundreds of clients, most of them hostile, for minutes: what is left of a server afterwards.

    python tests/stress/soak.py                                  # 200 clients for 5 minutes, the small model
    python tests/stress/soak.py --seconds 20 --clients 200

The server is a process of its own, under --deterministic. One client in five is honest: it opens streams of a few
chunks, one after another, each with its own seed, steps and prompt changes, and keeps a digest of every chunk. The
others are those of `hostile.py`: they vanish in the middle of chunks, send garbage, huge messages and halves of
messages, upgrade wrongly, read nothing, say nothing, flood, and abuse the REST API.

checks: no_5xx, no HTTP status of 500 or more and no WebSocket closed as the server's fault (1011); log, no traceback in
what the server wrote (`tracebacks`); alive; idle, no stream, no job and no one in the queue after the storm; threads
and files, of the server's process not more than before; memory, its resident set at the end at most --growth MiB above
what it was a third into the storm; honest, every honest stream came to its end (or was told that the server is full,
and tried again); frames, every honest stream's chunks are bit for bit those of a quiet run in this process with its
seed, the same prompt switches at the same chunks and, for a `budget` stream, the thresholds that it was told.
"Before" is after a short storm of the same clients and with all pools of threads filled (`fill`).

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
from benchmarks.loadgen.client import change_message, dial, start_message
from benchmarks.loadgen.server_process import Facts, Server
from dsa_engine import Pipeline
from dsa_engine.evaluation.summary import rounded
from dsa_engine.sampling.policy import Budget
from dsa_engine.shapes.world import sample_captions
from tests.stress.attacks import ATTACKS, Witness, answered, keep_at, line, request, streaming

HONEST = 0.2  # of all clients
STEPS = ("dsa", "fixed", "fixed:2", "budget")  # of honest streams
CHUNKS = (3, 9)  # of an honest stream, from and to
PATIENCE = 900.0  # seconds that an honest stream may take, its place in the queue included
IDLE = 8.0  # seconds, of the server: so that what is left over is gone soon
SETTLE = 30.0  # seconds after the last work until everything must be back
QUIET = 11.0  # seconds at least: AnyIO's threads may be idle for 10
PAUSE = 0.5  # seconds between two visits of a client, on average
POOLED = 16  # things to do at once, more than any pool of threads in a server on two cores has threads
WARM = 5.0  # seconds of the storm before "before"
MIB = 2**20


@dataclass
class Told:
    """An honest stream as it was: changes by the chunk that they were applied before, a digest and a threshold of each
    chunk; ended: why, "done" where all chunks came."""

    start: dict
    prompt: str
    changes: dict[int, list[str]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    thresholds: list[float | None] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    ended: str = ""


def order(rng: Random, chunk_frames: int) -> tuple[str, dict, list[tuple[float, str]]]:
    """A stream: its prompt, its `session.start`, and its changes: seconds after the one before, and the prompt."""
    chunks = rng.randint(*CHUNKS)
    captions = sample_captions(np.random.default_rng(rng.randrange(2**32)), 1 + rng.randrange(4), cut=0.6, soft=0.4)
    start = {"seed": rng.randrange(2**64), "step_policy": rng.choice(STEPS), "format": "rgb24"}
    start |= {"num_frames": chunks * chunk_frames}
    prompt, *others = (str(caption) for caption in captions)
    return prompt, start, [(rng.uniform(0.0, 1.0), other) for other in others]


async def honest(url: str, rng: Random, until: float, chunk_frames: int, told: list[Told]) -> None:
    """One honest client: stream after stream."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        prompt, start, changes = order(rng, chunk_frames)
        one = Told(start, prompt)
        told.append(one)
        try:
            async with asyncio.timeout(PATIENCE), dial(url) as socket:
                await socket.send(start_message(prompt, start))
                talk = asyncio.create_task(_talk(socket, changes))
                try:
                    await _listen(socket, one)
                finally:
                    talk.cancel()
                    await asyncio.gather(talk, return_exceptions=True)
        except (OSError, ConnectionClosed, TimeoutError) as error:
            one.ended = one.ended or f"{type(error).__name__}: {error}"
        await asyncio.sleep(rng.expovariate(1 / PAUSE))


async def _talk(socket, changes: list[tuple[float, str]]) -> None:
    """Its changes, and then a sign now and then that it is still there: it may have to wait for its place."""
    for number, (pause, prompt) in enumerate(changes):
        await asyncio.sleep(pause)
        await socket.send(change_message(prompt, f"change-{number}"))
    while True:
        await asyncio.sleep(IDLE / 4)
        await socket.send(json.dumps({"type": "session.ping"}))


async def _listen(socket, one: Told) -> None:
    async for message in socket:
        if isinstance(message, bytes):
            one.digests.append(sha256(message).hexdigest())
            continue
        said = json.loads(message)
        if said["type"] == "video.chunk_metadata":
            one.thresholds.append(said["threshold"])
            one.steps.append(said["steps"])
        elif said["type"] == "session.interaction.applied":
            one.changes.setdefault(said["chunk_index"], []).append(said["prompt"])
        elif said["type"] == "error":
            one.ended = said["code"]
        elif said["type"] == "session.done":
            one.ended = one.ended or said["reason"]


def unequal(pipe: Pipeline, one: Told) -> str | None:
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


class Storm:
    """All clients at once on one server."""

    def __init__(self, server: Server, clients: int, seed: int, chunk_frames: int):
        self.server, self.clients, self.seed, self.chunk_frames = server, clients, seed, chunk_frames
        self.witness, self.told, self.samples = Witness(server.url), [], []

    def blow(self, seconds: float) -> None:
        asyncio.run(self._blow(seconds))

    async def _blow(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until, friends = loop.time() + seconds, max(1, round(HONEST * self.clients))
        visits = [
            honest(self.server.url, Random(f"{self.seed} {i}"), until, self.chunk_frames, self.told)
            for i in range(friends)
        ]
        attacks = [attack for attack, share in ATTACKS.items() for _ in range(share)]
        Random(self.seed).shuffle(attacks)
        for i in range(self.clients - friends):
            rng = Random(f"{self.seed} hostile {i}")
            visits.append(keep_at(attacks[i % len(attacks)], self.witness, rng, until, PAUSE))
        watching = asyncio.create_task(self._watch(seconds))
        await asyncio.gather(*visits)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, seconds: float) -> None:
        start = time.monotonic()
        while self.server.alive:
            self.samples.append((time.monotonic() - start, self.server.facts()))
            await asyncio.sleep(min(1.0, seconds / 20))


async def fill(url: str) -> None:
    """Give every pool of threads more to do than it has threads: what is left of it afterwards is all that it keeps."""
    witness = Witness(url)
    streams = [streaming(witness, Random(i), format="m4s") for i in range(POOLED)]

    async def watch(stream) -> None:
        async with stream as raw:
            for _ in range(4):
                await raw.until("video.chunk_metadata")

    async def ask() -> None:
        async with line(witness) as raw:
            await raw.send(request("GET", "/v1/videos"))
            await answered(witness, raw, "fill")

    await asyncio.gather(*map(watch, streams), *(ask() for _ in range(POOLED)))


def busy(server: Server) -> dict[str, float]:
    """What a server still has to do, by its metrics; empty where it has nothing."""
    found, names = server.metrics(), ("dsa_sessions", "dsa_queue_depth", "dsa_jobs_running")
    unfinished = [f'dsa_jobs{{state="{state}"}}' for state in ("queued", "in_progress")]
    return {name: found[name] for name in (*names, *unfinished) if found[name]}


def settled(server: Server, before: Facts | None) -> tuple[dict[str, float], Facts]:
    """What is left to do, and what the process holds, as soon as there is nothing to do and, where `before` is told, no
    more is held than then; whatever they are, SETTLE seconds after the model was at work last (it may still have jobs
    to make). Not before AnyIO has let its idle threads go."""
    start = worked = time.monotonic()
    forwards = -1.0
    while True:
        server.get("/")  # a file: AnyIO looks at its idle threads when one of them has worked
        left, now, clock = busy(server), server.facts(), time.monotonic()
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
    with Server(options) as server:
        first = server.facts()
        warm = Storm(server, clients, seed + 1, chunk_frames)
        warm.blow(min(WARM, seconds))
        asyncio.run(fill(server.url))
        _, before = settled(server, None)
        storm = Storm(server, clients, seed, chunk_frames)
        start = time.monotonic()
        storm.blow(seconds)
        took = time.monotonic() - start
        left, after = settled(server, before)
        health, alive, words = server.get("/health")[0], server.alive, server.words()
        stop = server.stop()
    early = [facts.rss for at, facts in storm.samples if at >= seconds / 3][0]
    survivors = [one for one in storm.told if one.ended == "done"]
    differ = [found for found in (unequal(pipe, one) for one in survivors) if found]
    ended = Counter(one.ended for one in storm.told)
    faults = {f"{what} {status}": n for (what, status), n in storm.witness.statuses.items() if (status or 0) >= 500}
    faults |= {f"{what} closed {code}": n for (what, code), n in storm.witness.closes.items() if code == 1011}
    checks = {
        "no_5xx": not faults,
        "log": not tracebacks(words),
        "alive": alive and health == 200,
        "idle": not left,
        "threads": after.threads <= before.threads,
        "files": after.files <= before.files,
        "memory": after.rss - early <= growth * MIB,
        "honest": bool(survivors) and set(ended) <= {"done", "busy"},
        "frames": not differ,
    }
    return {
        "benchmark": "soak",
        "model": model,
        "clients": clients,
        "seconds": took,
        "failed": [name for name, passed in checks.items() if not passed],
        "checks": checks,
        "faults": faults,
        "statuses": {f"{what} {status}": n for (what, status), n in sorted(storm.witness.statuses.items(), key=str)},
        "closes": {f"{what} {code}": n for (what, code), n in sorted(storm.witness.closes.items())},
        "visits": dict(storm.witness.visits),
        "honest": {
            "streams": len(storm.told),
            "ended": dict(ended),
            "chunks_compared": sum(len(one.digests) for one in survivors),
            "switches": sum(len(prompts) for one in survivors for prompts in one.changes.values()),
            "steps": dict(Counter(n for one in survivors for n in one.steps)),
            "unequal": differ[:10],
        },
        "left": left,
        "process": {
            "start": first._asdict(),
            "before": before._asdict(),
            "after": after._asdict(),
            "rss_early": early,
            "rss_most": max(facts.rss for _, facts in storm.samples),
            "threads_most": max(facts.threads for _, facts in storm.samples),
            "files_most": max(facts.files for _, facts in storm.samples),
        },
        "stop_s": stop,
        "log": [one[-2000:] for one in tracebacks(words)[:3]],
        "commit": commit(),
        "machine": machine(),
    }


def tracebacks(words: str) -> list[str]:
    """Those in a log, but for uvicorn's own at a text that is not UTF-8, which it writes when it does the right thing:
    close with 1007."""
    found = re.findall(r"^Traceback .*\n(?:[ ].*\n)*.*", words, re.MULTILINE)
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
