"""Slots, queue, idle times and the end of streams over replicas, without Ray."""

from __future__ import annotations

import asyncio

import pytest

from dsa_engine.serving.types import (
    ChunkReady,
    Closed,
    Opened,
    Overloaded,
    Queued,
    StreamRequest,
)
from tests.support.serving.cluster import PROMPTS, play, run


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

    last = run(scenario, pipes, failover_timeout=0.1)
    assert last.reason == "failed" and "is dead" in last.error


def test_the_backend_closes_its_streams(pipes):
    async def scenario(cluster, backend):
        streams = [await backend.open(StreamRequest(PROMPTS[0], live=live)) for live in (True, False)]
        playing = [asyncio.create_task(play(stream)) for stream in streams]
        while not all(replica.worker.forwards for replica in cluster.replicas.values()):  # never is an error, of `run`
            await asyncio.sleep(0.01)
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
        while any(one["live"] + one["jobs"] for one in (await cluster.stats()).values()):  # never is an error, of `run`
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
        while not (stats := backend.stats()).get("jobs"):  # never is an error, of `run`
            await asyncio.sleep(0.01)
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
