"""Ray Serve with two replicas on this machine: a replica is killed, and nobody who watches can tell."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
import time

import av
import httpx
import numpy as np
import pytest

pytest.importorskip("ray", reason="needs the extra ray: pip install 'dsa-engine[ray]'")
pytest.importorskip("fastapi", reason="needs the extra serving: pip install 'dsa-engine[serving]'")

from dsa_engine import Pipeline
from dsa_engine.serving.replicas.client import RemoteBackend
from dsa_engine.serving.types import ChunkReady, Closed, StreamRequest, UpdateApplied, UpdateRejected
from tests.support.serving.cluster import check_frames, request_chunks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # Ray's own
]
NAME = "dsa-engine-test"
PROMPT, OTHER, THIRD = "a red circle rests", "a blue square jumps", "a green cross moves sideways"


@pytest.fixture(scope="module")
def server(untrained, tmp_path_factory):
    """A cluster with two replicas; its address."""
    import ray
    from ray import serve

    from dsa_engine.serving import ray_app

    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as sock:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray Serve kills a proxy that is not ready by then, 5 s by default: too few beside other busy processes
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
        port = sock.getsockname()[1]
        sock.close()
        options = {
            "model": str(untrained),
            "device": "cpu",
            "replicas": 2,
            "deterministic": True,
            "steps": "dsa",
            "sessions": 3,
            "jobs": 2,
            "waiting": 1,
            "snapshot_every": 2,
            "data": tmp_path_factory.mktemp("data"),
            "gpus": 0,
        }
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=150 * 2**20,
            log_to_driver=False,
            namespace=ray_app.NAME,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(ray_app.app(options), name=NAME)
            yield f"127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray_app.forget(NAME)
            ray.shutdown()


@pytest.fixture(scope="module")
def exact(untrained):
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True)


def test_only_who_asks_for_ray_needs_it():
    script = (
        "import sys, dsa_engine.cli, dsa_engine.serving.server, dsa_engine.serving.replicas.client\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'ray'))\n"
        "sys.modules['ray'] = None\n"
        "try: import dsa_engine.serving.ray_app\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("[]\n") and "pip install 'dsa-engine[ray]'" in result.stdout, result.stderr


def test_options_are_checked_before_anything_starts():
    from dsa_engine.serving.ray_app import Options, app

    for wrong, words in (
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2: must be at least replicas=3"),
        ({"device": "cuda", "gpus": 0}, "gpus=1"),
        ({"unheard": 1}, "unheard"),
        ({"sessions": 0}, "sessions=0"),
        ({"port": 70000}, "port"),
    ):
        with pytest.raises(ValueError, match=words):
            app(wrong)
    args = {"replicas": "2", "max_replicas": "4", "gpus": "0.5", "deterministic": "true", "token": "t"}  # `serve run`
    options = Options.of(args)
    replicas = options.replicas
    assert (replicas.replicas, replicas.gpus, options.deterministic, options.model.device) == (2, 0.5, True, "cuda")
    assert options.settings.data.is_absolute() and options.settings.token == "t"


def kill(home):
    """End a replica's process, as when its machine goes."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    actor = next(one for one in named if home in one["name"])
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_jobs_and_the_websocket_go_through_the_ingress(server, exact):
    from websockets.sync.client import connect

    with httpx.Client(base_url=f"http://{server}", timeout=30) as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "untrained"
        refused = client.post("/v1/videos", json={"prompt": "nonsense"})
        assert refused.status_code == 400 and "must read" in refused.json()["error"]["message"]
        job = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 3, "num_frames": 24}).json()
        request, frames, applied = StreamRequest(PROMPT, seed=9, num_frames=36, steps="dsa"), [], []
        with connect(f"ws://{server}/v1/realtime/video", max_size=None) as socket:
            start = {name: getattr(request, name) for name in ("prompt", "seed", "num_frames")}
            socket.send(json.dumps({"type": "session.start", "format": "rgb24", **start}))
            while True:
                message = json.loads(socket.recv(timeout=30))
                if message["type"] == "video.chunk_metadata":
                    shape = (message["num_frames"], message["height"], message["width"], 3)
                    frames.append(np.frombuffer(socket.recv(timeout=30), np.uint8).reshape(shape))
                    if message["chunk_index"] == 2:
                        told = {"event_id": "e", "event": {"prompt": OTHER}}
                        socket.send(json.dumps({"type": "session.interaction", "interaction": told}))
                elif message["type"] == "session.interaction.applied":
                    applied.append((message["chunk_index"], message["prompt"]))
                elif message["type"] in ("session.done", "error"):
                    break
        assert message["type"] == "session.done" and message["reason"] == "done"
        ((index, prompt),) = applied
        assert prompt == OTHER
        expected = request_chunks(exact, request, {index: [prompt]})
        assert len(frames) == len(expected) and all(map(np.array_equal, frames, expected))
        deadline = time.monotonic() + 60
        while (job := client.get(f"/v1/videos/{job['id']}").json())["status"] in ("queued", "in_progress"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert job["status"] == "completed"
        with av.open(io.BytesIO(client.get(f"/v1/videos/{job['id']}/content").content)) as file:
            assert sum(1 for _ in file.decode(video=0)) == 24
        assert client.delete(f"/v1/videos/{job['id']}").status_code == 200
        metrics = client.get("/metrics").text
        assert "dsa_sessions_limit 6.0" in metrics
        assert 'dsa_streams_closed_total{kind="live",reason="done"} 1.0' in metrics


def test_streams_outlive_their_replica(server, exact):
    """Three streams on two replicas; one is killed after a change is in force and while another one is told."""
    from ray import serve

    from dsa_engine.serving.ray_app import RayReplicas

    requests = [StreamRequest(PROMPT, seed=seed, num_frames=48, steps="dsa") for seed in range(3)]

    async def play(stream, victim):
        events = []
        async for event in stream:
            events.append(event)
            if isinstance(event, ChunkReady) and event.chunk.index == 2:
                await stream.update(OTHER, "first")
                await stream.update("nonsense", "second")
            if isinstance(event, ChunkReady) and event.chunk.index == 6:
                await stream.update(THIRD, "third")
                if stream is victim:
                    await asyncio.to_thread(kill, stream.replica_id)
        return events

    async def main():
        backend = await RemoteBackend.connect(RayReplicas(serve.get_deployment_handle("Engine", NAME)))
        streams = [await backend.open(request) for request in requests]
        homes = [stream.replica_id for stream in streams]
        async with asyncio.timeout(90):
            events = await asyncio.gather(*(play(stream, streams[0]) for stream in streams))
        return homes, [stream.moves for stream in streams], events

    homes, moves, played = asyncio.run(main())
    assert len(set(homes)) == 2  # the load is spread
    assert [bool(moved) for moved in moves] == [home == homes[0] for home in homes]
    for request, events in zip(requests, played):
        assert events[-1] == Closed("done")
        answers = [event for event in events if isinstance(event, (UpdateApplied, UpdateRejected))]
        assert [answer.event_id for answer in answers] == ["first", "second", "third"]
        assert [event.prompt for event in answers if isinstance(event, UpdateApplied)] == [OTHER, THIRD]
        assert sum(isinstance(event, ChunkReady) for event in events) == 16
        check_frames(exact, request, events)


def test_snapshots_are_gone_with_their_streams(server):
    import ray

    from dsa_engine.serving.ray_app import NAME as NAMESPACE

    actor = ray.get_actor(f"{NAME}-snapshots", namespace=NAMESPACE)
    deadline = time.monotonic() + 60
    while ray.get(actor.sizes.remote()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
