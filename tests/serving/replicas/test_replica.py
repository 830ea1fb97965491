"""Streams over replicas, without Ray: replicas in this process that die, hang, lose answers and come back."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest

from dsa_engine import Pipeline
from dsa_engine.serving.replicas import replica as replicas
from dsa_engine.serving.replicas.client import RemoteBackend, ReplicaUnavailable
from dsa_engine.serving.replicas.replica import PollResponse, Replica
from dsa_engine.serving.replicas.snapshots import InMemorySnapshotStore, StreamSnapshot
from dsa_engine.serving.settings import WorkerLimits
from dsa_engine.serving.types import (
    ChunkReady,
    Closed,
    Opened,
    Overloaded,
    Queued,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)
from dsa_engine.serving.worker.worker import Worker

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
    """`remote.Replicas` in this process. dead: those that do not answer; faults(method) -> "before" or "after" loses
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
        """The snapshots, once what is under way has come to its end."""
        await asyncio.sleep(0.2)
        return self.keeper.snapshots.sizes()

    async def stop(self):
        for replica in self.replicas.values():
            await replica.stop()


@pytest.fixture(scope="module")
def pipes(untrained):
    return [Pipeline.from_pretrained(untrained, device="cpu", max_sessions=4, deterministic=True) for _ in range(2)]


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(replicas, "POLL_TIMEOUT_S", 0.2)


def run(scenario, pipes, **options):
    """A scenario(cluster, backend) on two replicas, whose workers end with it."""

    async def main():
        cluster = Cluster(pipes, **options)
        try:
            async with asyncio.timeout(60):
                return await scenario(cluster, await RemoteBackend.connect(cluster, failover_timeout=1.0))
        finally:
            await cluster.stop()

    return asyncio.run(main())


def undisturbed(pipe, order, changes):
    """The frames of a session in this process that is told the same at the same chunks: {index: [prompt, ...]}."""
    frames = []
    with pipe.session(
        order.prompt, seed=order.seed, num_frames=order.num_frames, step_policy=order.steps or "fixed"
    ) as session:
        while not session.exhausted:
            for prompt in changes.get(session.index, ()):
                session.update(prompt)
            frames.append(session.next_chunk().frames)
    return frames


def check_order(events):
    """Queued* Opened (UpdateApplied | UpdateRejected | ChunkReady)* Closed."""
    names = [type(event).__name__ for event in events]
    first = names.index("Opened")
    assert set(names[:first]) <= {"Queued"}
    assert set(names[first + 1 : -1]) <= {"UpdateApplied", "UpdateRejected", "ChunkReady"}
    assert names[-1] == "Closed"


def check_frames(pipe, order, events):
    """Every chunk once, in order, as an undisturbed session makes them that is told the same at the same chunks."""
    check_order(events)
    made = [event.chunk for event in events if isinstance(event, ChunkReady)]
    changes = {}
    for event in events:
        if isinstance(event, UpdateApplied):
            changes.setdefault(event.index, []).append(event.prompt)
    expected = undisturbed(pipe, order, changes)
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


def test_a_stream_is_that_of_a_session(pipes):
    order = StreamRequest(PROMPTS[0], seed=5, num_frames=24, live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)
        events = await play(
            stream, {2: lambda: stream.update(PROMPTS[1], "first"), 4: lambda: stream.update("no", "second")}
        )
        return events, stream.moves, await cluster.left(), backend._streams

    events, moves, left, streams = run(scenario, pipes)
    check_frames(pipes[0], order, events)
    assert [event.event_id for event in events if isinstance(event, (UpdateApplied, UpdateRejected))] == [
        "first",
        "second",
    ]
    assert events[-1] == Closed("done")
    assert (moves, left, streams) == (0, {}, {})
    assert all(made.snapshot is None for made in events if isinstance(made, ChunkReady))


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("live", [False, True])
def test_it_goes_on_elsewhere_with_the_same_frames(pipes, every, live):
    """Two changes are in force and one is told but not applied when the replica dies."""
    order = StreamRequest(PROMPTS[0], seed=11, num_frames=30, live=live)

    async def scenario(cluster, backend):
        stream = await backend.open(order)

        async def die():
            await stream.update(PROMPTS[3], "third")
            cluster.dead.add(stream.replica_id)

        at = {1: lambda: stream.update(PROMPTS[1], "1st"), 4: lambda: stream.update(PROMPTS[2], "2nd"), 6: die}
        return await play(stream, at), stream, cluster

    events, stream, cluster = run(scenario, pipes, every=every)
    check_frames(pipes[0], order, events)
    assert [event.event_id for event in events if isinstance(event, UpdateApplied)] == ["1st", "2nd", "third"]
    assert stream.moves == 1
    made = [event for event in events if isinstance(event, ChunkReady)]
    if live:
        again = next(event for event in made if event.chunk.index == 7)
        assert again.deadline is None  # the player has run out long ago: it begins anew


@pytest.mark.parametrize("steps", ["dsa", "budget"])
@pytest.mark.parametrize("every", [0, 1])
def test_a_changed_threshold_goes_with_it(pipes, steps, every):
    order = StreamRequest(PROMPTS[0], seed=4, num_frames=30, steps=steps, threshold=0.75, live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)

        async def die():
            await asyncio.sleep(0.3)
            cluster.dead.add(stream.replica_id)

        return await play(stream, {1: lambda: stream.update(threshold=0.25), 6: die}), stream.moves

    events, moves = run(scenario, pipes, every=every)
    applied = next(event.index for event in events if isinstance(event, UpdateApplied))
    thresholds = [made.threshold for made in events if isinstance(made, ChunkReady)]
    assert moves == 1 and thresholds == [0.75] * applied + [0.25] * (10 - applied)


def test_what_the_snapshot_has_is_not_applied_again(pipes):
    """Also where the consumer has never heard how much that is, and says it all again."""
    order = StreamRequest(PROMPTS[0], seed=6, num_frames=36, live=False)  # replicas are up to two chunks ahead

    async def scenario(cluster, backend):
        stream, applied = await backend.open(order), []
        call = cluster.call

        async def forgetful(method, *args, **options):
            answer = await call(method, *args, **options)
            return replace(answer, persisted=0) if isinstance(answer, PollResponse) else answer

        async def die():
            await asyncio.sleep(0.3)
            cluster.dead.add(stream.replica_id)
            for replica in cluster.replicas.values():
                replica.worker.observers.append(lambda task, event: applied.append(event))

        cluster.call = forgetful
        at = {1: lambda: stream.update(PROMPTS[1], "1st"), 7: die, 8: lambda: stream.update(PROMPTS[2], "2nd")}
        events = await play(stream, at)
        return events, [event.event_id for event in applied if isinstance(event, UpdateApplied)]

    events, again = run(scenario, pipes, every=1)
    check_frames(pipes[0], order, events)
    assert again == ["1"]  # its number; number 0 is in the snapshot


def test_a_stream_gives_nothing_twice(pipes):
    """Whatever a replica says again."""
    with pipes[0].session(PROMPTS[0]) as session:
        made = [ChunkReady(session.next_chunk(), 0.1, None) for _ in range(2)]
    opened, queued = Opened(12.0, 64, 64, 0), Queued(1)
    said = [
        [queued, opened, made[0]],
        [queued, opened, UpdateApplied("0", PROMPTS[1], 1), UpdateRejected("1", "no"), made[0]],
        [UpdateApplied("0", PROMPTS[1], 1), UpdateRejected("1", "no"), made[1]],
        [made[1], Closed("done")],
    ]

    class Script:
        async def call(self, method, *args, **options):
            return PollResponse("a", "run", 0, 0, said.pop(0)) if method == "poll" else None

        async def stats(self):
            return {}

    async def main():
        stream = await RemoteBackend(Script(), None).open(StreamRequest(PROMPTS[0]))
        await stream.update(PROMPTS[1], "x")
        await stream.update("nonsense", "y")
        return [event async for event in stream]

    applied, refused = UpdateApplied("x", PROMPTS[1], 1), UpdateRejected("y", "no")
    assert asyncio.run(main()) == [queued, opened, made[0], applied, refused, made[1], Closed("done")]


def test_only_what_is_after_the_snapshot_is_made_again(pipes):
    order = StreamRequest(PROMPTS[0], seed=2, num_frames=36, live=False)

    async def scenario(cluster, backend):
        stream, before = await backend.open(order), {}

        async def die():
            await asyncio.sleep(0.3)  # the snapshot is on its way
            before.update({name: replica.worker.forwards for name, replica in cluster.replicas.items()})
            cluster.dead.add(stream.replica_id)
            before["home"] = stream.replica_id

        await play(stream, {9: die})
        other = next(name for name in cluster.replicas if name != before["home"])
        return cluster.replicas[other].worker.forwards - before[other]

    most = pipes[0].max_steps
    assert run(scenario, pipes, every=1) <= 4 * most  # 9 or 10, and 11, of 12
    assert run(scenario, pipes, every=0) >= 11 * most


@pytest.mark.parametrize("seed", range(4))
def test_any_question_and_any_answer_may_be_lost(pipes, seed):
    chance = random.Random(seed)
    order = StreamRequest(PROMPTS[0], seed=seed, num_frames=36, live=False)

    async def scenario(cluster, backend):
        cluster.faults = lambda method: chance.choice(["before", "after", *5 * [None]])
        cluster.keeper.broken = seed % 3 == 2
        stream = await backend.open(order)
        at = {i: lambda i=i: stream.update(PROMPTS[i % 4], str(i)) for i in range(0, 9, 2)}
        events = await play(stream, at)
        cluster.faults = lambda method: None
        return events, stream.moves

    events, moves = run(scenario, pipes)
    check_frames(pipes[0], order, events)
    assert [event.event_id for event in events if isinstance(event, UpdateApplied)] == ["0", "2", "4", "6", "8"]
    assert moves > 0


def test_giving_up_on_an_event_loses_nothing(pipes):
    order = StreamRequest(PROMPTS[0], seed=3, num_frames=24, live=False)

    async def scenario(cluster, backend):
        stream, events = await backend.open(order), []
        while not events or not isinstance(events[-1], Closed):
            try:
                events.append(await asyncio.wait_for(anext(stream), 0.004))
            except TimeoutError:
                pass
        return events

    check_frames(pipes[0], order, run(scenario, pipes))


def test_a_replica_without_room_sends_it_to_the_other(pipes):
    async def scenario(cluster, backend):
        order = StreamRequest(PROMPTS[0], num_frames=300, live=False)
        streams = [await backend.open(order) for _ in range(4)]
        with pytest.raises(Overloaded, match="places for jobs"):
            await backend.open(order)
        homes = sorted(stream.replica_id for stream in streams)
        for stream in streams:
            await stream.close()
        ends = [(await play(stream))[-1] for stream in streams]
        again = await backend.open(order)
        await again.close()
        return homes, ends

    homes, ends = run(scenario, pipes)
    assert homes == ["a", "a", "b", "b"]
    assert ends == [Closed("closed")] * 4


def test_a_full_server_queues_and_says_when_it_is_full(pipes):
    async def scenario(cluster, backend):
        order = StreamRequest(PROMPTS[0])
        streams = [await backend.open(order) for _ in range(4)]
        firsts = [type(await anext(stream)) for stream in streams]
        for stream in streams:
            await stream.close()
            await play(stream)
        return firsts

    assert run(scenario, pipes, max_sessions=1, max_queue=1).count(Queued) == 2

    async def full(cluster, backend):
        streams = [await backend.open(StreamRequest(PROMPTS[0])) for _ in range(2)]
        with pytest.raises(Overloaded, match="try again later"):
            await backend.open(StreamRequest(PROMPTS[0]))
        return {stream.replica_id for stream in streams}

    assert run(full, pipes, max_sessions=1, max_queue=0) == {"a", "b"}


def test_who_waits_goes_where_a_place_is_free(pipes):
    """Such as on a replica that was started because somebody waits."""

    async def scenario(cluster, backend):
        first, second, third = [await backend.open(StreamRequest(PROMPTS[0])) for _ in range(3)]
        assert isinstance(await anext(third), Queued)
        other = next(stream for stream in (first, second) if stream.replica_id != third.replica_id)
        playing = asyncio.create_task(anext(third))
        await other.close()
        opened = await playing
        return opened, third.replica_id == other.replica_id, third.moves

    opened, moved, moves = run(scenario, pipes, max_sessions=1)
    assert isinstance(opened, Opened) and moved and moves == 1


def test_a_replica_that_leaves_hands_its_streams_over(pipes):
    order = StreamRequest(PROMPTS[0], seed=8, num_frames=30, live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)
        events = await play(stream, {5: lambda: cluster.replicas[stream.replica_id].stop()})
        return events, stream.moves, await cluster.left(), cluster.replicas[stream.replica_id].worker.forwards

    events, moves, left, forwards = run(scenario, pipes)
    assert forwards <= 7 * pipes[0].max_steps  # of 10 chunks: it did not begin again
    check_frames(pipes[0], order, events)
    assert moves == 1
    assert left == {}


def test_a_stream_that_comes_back_forgets_what_was_made_there_before(pipes):
    """It leaves a, is told something on b, and returns to a, which is one chunk ahead without it."""
    order = StreamRequest(PROMPTS[0], seed=13, num_frames=36, live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)
        first = stream.replica_id

        async def away():
            cluster.dead.add(first)

        async def back():
            cluster.dead = {stream.replica_id}

        events = await play(stream, {3: away, 4: lambda: stream.update(PROMPTS[2], "x"), 7: back})
        return events, stream.moves

    events, moves = run(scenario, pipes)
    check_frames(pipes[0], order, events)
    assert moves == 2


def test_what_cannot_be_is_refused_and_what_cannot_be_reached_fails(pipes):
    async def scenario(cluster, backend):
        with pytest.raises(ValueError, match="must read"):
            await backend.open(StreamRequest("nonsense"))
        with pytest.raises(ValueError, match="must read"):
            await backend.check(StreamRequest("nonsense"))
        await backend.check(StreamRequest(PROMPTS[0]))
        stream = await backend.open(StreamRequest(PROMPTS[0], live=False))
        cluster.dead = {"a", "b"}
        last = (await play(stream))[-1]
        with pytest.raises(Overloaded, match="no replica answers"):
            await backend.open(StreamRequest(PROMPTS[0]))
        with pytest.raises(Overloaded, match="no replica answers"):
            await backend.check(StreamRequest(PROMPTS[0]))
        return last

    last = run(scenario, pipes)
    assert last.reason == "failed" and "is dead" in last.error


def test_the_backend_closes_its_streams(pipes):
    async def scenario(cluster, backend):
        streams = [await backend.open(StreamRequest(PROMPTS[0], live=live)) for live in (True, False)]
        playing = [asyncio.create_task(play(stream)) for stream in streams]
        await asyncio.sleep(0.3)
        await backend.close()
        lasts = [(await one)[-1] for one in playing]
        with pytest.raises(Overloaded, match="stopping"):
            await backend.open(StreamRequest(PROMPTS[0]))
        while any(one["live"] + one["jobs"] for one in (await cluster.stats()).values()):
            await asyncio.sleep(0.01)  # a worker hears of it after its forward; never is an error, of `run`
        return lasts

    assert run(scenario, pipes) == [Closed("shutdown")] * 2


@pytest.mark.parametrize("waits", range(4))
def test_a_stream_that_is_being_opened_at_the_close_keeps_no_place(pipes, waits):
    async def scenario(cluster, backend):
        opening = asyncio.create_task(backend.open(StreamRequest(PROMPTS[0], live=False)))
        for _ in range(waits):  # until the question is on its way, and until it is there
            await asyncio.sleep(0)
        await backend.close()
        try:
            last = (await play(await opening))[-1]
        except Overloaded:
            last = Closed("shutdown")
        while any(one["jobs"] for one in (await cluster.stats()).values()):
            await asyncio.sleep(0.01)
        return last

    assert run(scenario, pipes) == Closed("shutdown")


def test_places_of_consumers_that_are_gone_are_given_back(pipes):
    async def scenario(cluster, backend):
        for live in (True, False):
            await backend.open(StreamRequest(PROMPTS[0], live=live))
        held = [dict(one) for one in (await cluster.stats()).values()]
        for _ in range(40):
            await asyncio.sleep(0.05)
            for replica in cluster.replicas.values():
                replica.sweep()
        left = [one["live"] + one["jobs"] for one in (await cluster.stats()).values()]
        return sum(one["live"] + one["jobs"] for one in held), left

    assert run(scenario, pipes, idle_timeout=0.5) == (2, [0, 0])


def test_a_consumer_that_gives_signs_is_not_idle(pipes):
    async def scenario(cluster, backend):
        stream = await backend.open(StreamRequest(PROMPTS[0]))
        assert isinstance(await anext(stream), Opened)
        for _ in range(15):
            await asyncio.sleep(0.2)
            stream.keepalive()
        return (await cluster.stats())[stream.replica_id]["live"]

    assert run(scenario, pipes, idle_timeout=2.0) == 1


def test_numbers_are_those_of_all_replicas(pipes):
    async def scenario(cluster, backend):
        stream = await backend.open(StreamRequest(PROMPTS[0], live=False))
        backend._stats_time -= 10
        backend.stats()
        await asyncio.sleep(0.1)
        stats = backend.stats()
        await stream.close()
        return stats

    stats = run(scenario, pipes)
    assert (stats["replicas"], stats["jobs"], stats["max_sessions"], stats["max_jobs"]) == (2, 1, 4, 4)


def test_a_slow_consumer_is_one_chunk_ahead_at_most(pipes):
    async def scenario(cluster, backend):
        stream = await backend.open(StreamRequest(PROMPTS[0], live=False, num_frames=300))
        while not isinstance(await anext(stream), ChunkReady):
            pass
        ahead = cluster.replicas[stream.replica_id]._streams[stream.id]
        while ahead._next < 2:  # never is an error, of `run`
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # in which a dozen could be made
        made = ahead._next
        await stream.close()
        return made

    assert run(scenario, pipes) == 2


def test_a_snapshot_survives_its_bytes(pipes):
    """Into another pipeline: cache, past, prompt, noise, the decoder's state and the policy's own state."""
    ours, other = pipes
    with ours.session(PROMPTS[0], seed=2**63 + 5, step_policy="budget:1000fps") as session:
        for _ in range(4):
            session.next_chunk()
        session.update(PROMPTS[1])
        data = StreamSnapshot(session.snapshot(), session.index, 1, 0.25).pack()
        lag = session.rollout.policies[0].lag
        kept = StreamSnapshot.unpack(data, other.engine.dit.device)
        assert (kept.index, kept.settled, kept.threshold) == (4, 1, 0.25)
        assert kept.snapshot.rollout["policies"][0].lag == lag
        with other.session(PROMPTS[2], seed=1, step_policy="fixed") as restored:
            restored.restore(kept.snapshot)
            restored.rollout.policies[0].threshold = session.rollout.policies[0].threshold = 0.5
            for _ in range(3):
                expected, chunk = session.next_chunk(), restored.next_chunk()
                restored.rollout.policies[0].threshold = session.rollout.policies[0].threshold = 0.5
                assert np.array_equal(chunk.frames, expected.frames) and chunk.pts == expected.pts
                assert chunk.prompt == PROMPTS[1]


def test_snapshots_belong_to_the_run_that_claimed_them_last():
    now = [0.0]
    snapshots = InMemorySnapshotStore(lifetime=10.0, clock=lambda: now[0])
    assert snapshots.claim("s", "one", 0) is None
    assert snapshots.put("s", "one", 4, b"four")
    assert snapshots.claim("s", "two", 5) == b"four"
    assert not snapshots.put("s", "one", 6, b"six")
    snapshots.remove("s", "one")
    assert snapshots.claim("s", "three", 4) == b"four"
    assert snapshots.claim("s", "four", 3) is None  # of a later chunk than is wanted: another stream of that name
    snapshots.remove("s", "four")
    assert snapshots.sizes() == {}
    snapshots.put("old", "one", 1, b"1")
    now[0] = 11.0
    snapshots.put("new", "one", 1, b"1")
    assert snapshots.sizes() == {"new": 1}
