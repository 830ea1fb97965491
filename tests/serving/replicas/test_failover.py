"""Streams over replicas that are lost, without Ray: the frames stay the same."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from functools import partial

import pytest

from dsa_engine.serving.replicas.client import RemoteBackend
from dsa_engine.serving.replicas.replica import PollResponse
from dsa_engine.serving.types import (
    ChunkReady,
    Closed,
    Opened,
    Queued,
    StreamRequest,
    UpdateApplied,
    UpdateRejected,
)
from tests.support.serving.cluster import PROMPTS, check_frames, play, run


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


def test_relative_steps_go_on_elsewhere_from_the_chunk_before(pipes):
    order = StreamRequest(PROMPTS[0], seed=4, num_frames=30, steps="relative", live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)

        async def die():
            cluster.dead.add(stream.replica_id)

        return await play(stream, {6: die}), stream.moves

    events, moves = run(scenario, pipes, every=2)
    check_frames(pipes[0], order, events)
    made = [event for event in events if isinstance(event, ChunkReady)]
    assert moves == 1 and [m.threshold for m in made] == [1.0, *(min(m.chunk.confidence) for m in made[:-1])]


@pytest.mark.parametrize("steps", ["dsa", "budget"])
@pytest.mark.parametrize("every", [0, 1])
def test_a_changed_threshold_goes_with_it(pipes, steps, every):
    order = StreamRequest(PROMPTS[0], seed=4, num_frames=30, steps=steps, threshold=0.75, live=False)

    async def scenario(cluster, backend):
        stream = await backend.open(order)

        async def die():
            if every:
                await cluster.stored(stream, 5)  # with the change; chunks 5 and 6 may have come as one answer
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
            await cluster.stored(stream, 6)
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

    async def scenario(cluster, backend, every):
        stream, before = await backend.open(order), {}

        async def die():
            if every:
                await cluster.stored(stream, 8)
            before.update({name: replica.worker.forwards for name, replica in cluster.replicas.items()})
            cluster.dead.add(stream.replica_id)
            before["home"] = stream.replica_id

        await play(stream, {9: die})
        other = next(name for name in cluster.replicas if name != before["home"])
        return cluster.replicas[other].worker.forwards - before[other]

    most = pipes[0].max_steps
    assert run(partial(scenario, every=1), pipes, every=1) <= 4 * most  # from 8 or 9 on, of 12
    assert run(partial(scenario, every=0), pipes, every=0) >= 11 * most


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
