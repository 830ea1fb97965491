"""Replicas in this process that die, hang, lose answers and come back."""

from __future__ import annotations

import asyncio

import numpy as np

from dsa_engine.serving.replicas.client import RemoteBackend, ReplicaUnavailable
from dsa_engine.serving.replicas.replica import Replica
from dsa_engine.serving.replicas.snapshots import InMemorySnapshotStore
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import (
    ChunkReady,
    UpdateApplied,
)
from dsa_engine.serving.worker.worker import Worker
from tests.support.serving.sessions import session_chunks

PROMPTS = ("a red circle rests", "a blue square jumps", "a green triangle rests", "a cyan cross moves sideways on navy")


class SnapshotStore:
    """`InMemorySnapshotStore` as it is reached over a network."""

    def __init__(self):
        self.snapshots, self.broken = InMemorySnapshotStore(), False

    async def _do(self, method, *args):
        await asyncio.sleep(0)
        if self.broken:
            raise ConnectionError("no such actor")
        return getattr(self.snapshots, method)(*args)

    async def claim(self, *args):
        return await self._do("claim", *args)

    async def put(self, *args):
        return await self._do("put", *args)

    async def remove(self, *args):
        return await self._do("remove", *args)


class Cluster:
    """`client.Replicas` in this process. dead: those that do not answer; faults(method) -> "before" or "after" loses
    the question or its answer."""

    def __init__(self, pipes, every=2, **limits):
        limits = {"max_sessions": 2, "max_jobs": 2, "max_queue": 1, "steps": "fixed"} | limits
        self.keeper, self.dead, self.calls = SnapshotStore(), set(), []
        self.replicas = {}
        for name, pipe in zip("ab", pipes):
            worker = Worker(pipe, WorkerLimits(**limits))
            worker.start()
            self.replicas[name] = Replica(worker, self.keeper, name, every)
        self.faults = lambda method: None

    async def call(self, method, *args, replica_id=None, avoid=frozenset()):
        await asyncio.sleep(0)
        alive = [name for name in self.replicas if name not in self.dead]
        if replica_id in self.dead or not alive:
            raise ReplicaUnavailable(f"{replica_id} is dead")
        welcome = [name for name in alive if name not in avoid] or alive
        name = replica_id or min(welcome, key=lambda name: len(self.replicas[name]._streams))
        self.calls.append((method, name))
        fault = self.faults(method)
        if fault == "before":
            raise ReplicaUnavailable("the question was lost")
        result = getattr(self.replicas[name], method)(*args)
        result = await result if asyncio.iscoroutine(result) else result
        if fault == "after" or name in self.dead:
            raise ReplicaUnavailable("the answer was lost")
        return result

    async def stats(self):
        return dict(replica.stats() for name, replica in self.replicas.items() if name not in self.dead)

    async def left(self):
        """The snapshots, once all have been removed; never is an error of `run`."""
        while self.keeper.snapshots.sizes():
            await asyncio.sleep(0.01)
        return self.keeper.snapshots.sizes()

    async def stored(self, stream, index):
        """Once a snapshot before chunk `index` or a later one is stored; never is an error of `run`."""
        while (entry := self.keeper.snapshots._entries.get(stream.id)) is None or entry.index < index:
            await asyncio.sleep(0.01)

    async def stop(self):
        for replica in self.replicas.values():
            await replica.stop()


def run(scenario, pipes, failover_timeout=1.0, **options):
    """A scenario(cluster, backend) on two replicas, whose workers end with it."""

    async def main():
        cluster = Cluster(pipes, **options)
        try:
            async with asyncio.timeout(60):
                return await scenario(cluster, await RemoteBackend.connect(cluster, failover_timeout=failover_timeout))
        finally:
            await cluster.stop()

    return asyncio.run(main())


def request_chunks(pipe, request, changes):
    """Frames by chunk of a session in this process that is told the same at the same chunks: {index: [prompt, ...]}."""
    options = {"seed": request.seed, "num_frames": request.num_frames, "step_policy": request.steps or "fixed"}
    return session_chunks(pipe, request.prompt, changes, **options)


def check_order(events):
    """Queued* Opened (UpdateApplied | UpdateRejected | ChunkReady)* Closed."""
    names = [type(event).__name__ for event in events]
    first = names.index("Opened")
    assert set(names[:first]) <= {"Queued"}
    assert set(names[first + 1 : -1]) <= {"UpdateApplied", "UpdateRejected", "ChunkReady"}
    assert names[-1] == "Closed"


def check_frames(pipe, request, events):
    """Every chunk once, in order, as an undisturbed session makes them that is told the same at the same chunks."""
    check_order(events)
    made = [event.chunk for event in events if isinstance(event, ChunkReady)]
    changes = {}
    for event in events:
        if isinstance(event, UpdateApplied):
            changes.setdefault(event.index, []).append(event.prompt)
    expected = request_chunks(pipe, request, changes)
    assert [chunk.index for chunk in made] == list(range(len(expected)))
    for chunk, frames in zip(made, expected):
        assert np.array_equal(chunk.frames, frames), f"chunk {chunk.index}"


async def play(stream, at=None):
    """All events; at: {index of a chunk: what is done once it is there}."""
    events = []
    async for event in stream:
        events.append(event)
        if isinstance(event, ChunkReady) and at and event.chunk.index in at:
            await at[event.chunk.index]()
    return events
