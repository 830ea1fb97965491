"""The server on Ray Serve: replicas of the engine behind the same HTTP application.

    python -m dsa_engine.serving.ray_app --model shapes --replicas 2 --port 8000
    serve run dsa_engine.serving.ray_app:app model=shapes replicas=2

There are two deployments: `Ingress` runs the application on a `RemoteBackend`, `EngineReplica` the replicas. A stream
stays on its replica while that is alive (`StickyRouter`). Then another replica continues it from its last snapshot,
which a detached actor keeps (`InMemorySnapshotStore`). There is one ingress, as it holds the jobs and their folder on
disk.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.replicas.client import RemoteBackend, ReplicaUnavailable
from dsa_engine.serving.replicas.replica import POLL_TIMEOUT_S, Replica
from dsa_engine.serving.replicas.snapshots import InMemorySnapshotStore
from dsa_engine.serving.server import address as address_of
from dsa_engine.serving.server import bind
from dsa_engine.serving.settings import ServerOptions, WorkerLimits, add_flags, flag, group
from dsa_engine.serving.worker.worker import Worker

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import RayServeException
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ImportError as error:
    raise ImportError(f"serving on Ray needs the extra ray: pip install 'dsa-engine[ray]' ({error})") from error

logger = logging.getLogger(__name__)

NAME = "dsa-engine"
CALL_TIMEOUT_S = POLL_TIMEOUT_S + 15.0  # a replica that has not answered by then is left
HEALTH_TIMEOUT_S = 20.0  # a worker that has not answered by then is stuck: its replica is replaced
EXTRA_CALLS = 64  # concurrent short calls to a replica, beside one per stream


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas there are and what each gets. Raises ValueError for values out of range."""

    replicas: int = flag(1, "replicas of the engine, at least", int, metavar="N")
    max_replicas: int | None = flag(None, "more are started while streams wait, up to so many", int, metavar="N")
    cpus: float = flag(1.0, "of a replica, as Ray counts them", float, metavar="N")
    gpus: float | None = flag(None, "of a replica (default: 1 where there is a CUDA device)", float, metavar="N")
    snapshot_every: int = flag(8, "chunks between two snapshots of a stream, 0 for none", int, metavar="N")

    def __post_init__(self):
        for name, low in (("replicas", 1), ("max_replicas", self.replicas), ("cpus", 0), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                what = f"replicas={low}" if name == "max_replicas" else low
                raise ValueError(f"{name}={value}: must be at least {what}")
        if self.snapshot_every < 0:
            raise ValueError(f"snapshot_every={self.snapshot_every}: must be at least 0")


@dataclass(frozen=True)
class Options(ServerOptions):
    """A server on Ray."""

    replicas: ReplicaOptions = group(ReplicaOptions)

    @classmethod
    def parse(cls, args: argparse.Namespace) -> Options:
        """With paths and devices that mean the same in processes elsewhere."""
        options: Any = super().parse(args)
        model, gpus = options.model, options.replicas.gpus
        path = str(Path(model.model).absolute()) if Path(model.model).exists() else model.model
        gpus = float(torch.cuda.is_available()) if gpus is None else gpus
        device = model.device or ("cuda" if gpus else "cpu")
        if device.startswith("cuda") and not gpus:
            raise ValueError(f"device={device!r} with gpus=0: replicas then see no GPU; give them one with gpus=1")
        return replace(
            options,
            model=replace(model, model=path, device=device),
            settings=replace(options.settings, data=options.settings.data.absolute()),
            replicas=replace(options.replicas, gpus=gpus),
        )

    @classmethod
    def of(cls, args: dict[str, Any]) -> Options:
        """From flags by name, without dashes, such as {"max_sessions": 3}; strings are converted as on the command
        line. Raises ValueError for what is unknown or not possible."""
        argv = []
        for name, value in args.items():
            key, text = f"--{name.replace('_', '-')}", str(value)
            if text.lower() in ("true", "false"):
                argv += [key] if text.lower() == "true" else []
            else:
                values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
                argv += [f"{key}={one}" for one in values]
        parser = Parser(allow_abbrev=False)
        add_flags(parser, cls)
        return cls.parse(parser.parse_args(argv))


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of ending the process."""

    def error(self, message: str) -> None:
        raise ValueError(message)


class StickyRouter(RequestRouter):
    """Sends a call to the replica that it names; else to the least loaded one, preferably none that it avoids."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if all are full, do not retry at once
        wanted, avoid = (pending_request.kwargs.get(name) for name in ("replica_id", "avoid"))
        own = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in (avoid or ())]
        return [own or others or candidate_replicas]


class RaySnapshotStore:
    """`SnapshotStore` in an actor that outlives the replicas."""

    def __init__(self, app: str, lifetime: float):
        options = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0, "max_restarts": -1}
        store = ray.remote(InMemorySnapshotStore).options(name=f"{app}-snapshots", namespace=NAME, **options)
        self.actor = store.remote(lifetime)

    async def claim(self, id: str, run: str, needed: int) -> bytes | None:
        return await self.actor.claim.remote(id, run, needed)

    async def put(self, id: str, run: str, index: int, data: bytes) -> bool:
        return await self.actor.put.remote(id, run, index, data)

    async def remove(self, id: str, run: str) -> None:
        await self.actor.remove.remote(id, run)


class EngineReplica:
    """The deployment of the replicas: pipeline, worker, `Replica`."""

    async def __init__(self, options: Options):
        context = serve.get_replica_context()
        pipe, limits = await asyncio.to_thread(self._load, options)
        self.worker = Worker(pipe, limits)
        self.worker.start()
        store = RaySnapshotStore(context.app_name, limits.lifetime)
        await store.actor.sizes.remote()  # the actor runs before a stream needs it
        self.replica = Replica(self.worker, store, context.replica_id.unique_id, options.replicas.snapshot_every)
        self._sweeping = asyncio.create_task(self._sweep())

    @staticmethod
    def _load(options: Options) -> tuple[Pipeline, WorkerLimits]:
        pipe, limits = options.load()
        pipe.warmup()
        return pipe, limits

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.replica.sweep()

    async def call(self, method: str, args: Sequence[Any], replica_id: str | None = None, avoid: Any = None) -> Any:
        """A method of the replica. replica_id, avoid: for `StickyRouter`."""
        result = getattr(self.replica, method)(*args)
        return await result if inspect.isawaitable(result) else result

    async def stats(self) -> tuple[str, dict[str, float]]:
        return self.replica.stats()

    async def check_health(self) -> None:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await asyncio.wrap_future(self.worker.call(lambda: None))

    async def __del__(self):
        if hasattr(self, "replica"):
            self._sweeping.cancel()
            await self.replica.stop()


class RayReplicas:
    """`client.Replicas` behind a deployment's handle."""

    def __init__(self, engine: serve.handle.DeploymentHandle):
        self.engine = engine

    async def call(
        self, method: str, *args: Any, replica_id: str | None = None, avoid: frozenset[str] = frozenset()
    ) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self.engine.call.remote(method, args, replica_id=replica_id, avoid=avoid)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaUnavailable(_brief(error)) from error

    async def stats(self) -> dict[str, dict[str, float]]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answers = await self.engine.broadcast("stats").results_async(return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaUnavailable(_brief(error)) from error
        return dict(answer for answer in answers if not isinstance(answer, Exception))


def _brief(error: Exception) -> str:
    """The first line of an error of Ray, which may have hundreds."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@serve.ingress()
class Ingress:
    """The deployment of the HTTP application."""

    def __init__(self, engine: serve.handle.DeploymentHandle, options: Options):
        self.engine, self.options = engine, options

    async def __serve_build_asgi_app__(self):
        backend = await RemoteBackend.connect(RayReplicas(self.engine), self.options.replicas.replicas)
        app = create_app(backend, self.options.settings, jobs=self.options.limits.max_jobs > 0)
        backend.observers.append(app.state.metrics.observe)
        return app


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve.run` and `serve run`.

    Args:
        args: flags by name (`Options.of`).

    Raises:
        ValueError: an unknown flag, or a value that is not possible.
    """
    return build(Options.of(args))


def build(options: Options) -> serve.Application:
    limits, replicas = options.limits, options.replicas
    max_replicas = replicas.max_replicas or replicas.replicas
    scale: dict[str, Any] = {"num_replicas": replicas.replicas}
    if max_replicas > replicas.replicas:
        # A stream is one call at a time, also while it is queued: more calls than slots are a queue.
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": limits.max_sessions,
                "metrics_interval_s": 2.0,
                "look_back_period_s": 6.0,
                "upscale_delay_s": 6.0,
            }
        }
    common = {"logging_config": {"enable_access_log": False}}  # it has a line for every chunk
    engine = serve.deployment(
        EngineReplica,
        name="Engine",
        **scale,
        **common,
        graceful_shutdown_timeout_s=10.0,
        max_ongoing_requests=limits.slots + limits.max_queue + EXTRA_CALLS,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=1,
        **common,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_ongoing_requests=max_replicas * (limits.max_sessions + limits.max_queue) + EXTRA_CALLS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(engine.bind(options), options)


def run(options: Options, ready: Callable[[str], None], address: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        options: of the server; port 0 is any that is free.
        ready: called with the server's address once requests are answered.
        address: of a Ray cluster; None starts one, which ends with the server.
    """
    with bind(options.settings) as sock:  # an address that cannot be had is an error before anything starts
        host, port = options.settings.host, sock.getsockname()[1]
        where = address_of(host, sock)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    target = build(replace(options, settings=replace(options.settings, port=port)))
    ray.init(address=address, include_dashboard=None if address else False, namespace=NAME)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(target, name=NAME)
        ready(where)
        _wait()
    finally:
        serve.shutdown()
        forget(NAME)
        ray.shutdown()


def _wait() -> None:
    """Until SIGTERM or Ctrl-C. Ray's own handler, there since `ray.init`, would abort the process."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        stop.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def forget(name: str) -> None:
    """End the actor that keeps the snapshots of an app, which outlives it."""
    try:
        ray.kill(ray.get_actor(f"{name}-snapshots", namespace=NAME))
    except ValueError:  # there is none
        pass


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsa_engine.serving.ray_app", description="Serve on Ray.")
    parser.add_argument("--address", help="of a Ray cluster (default: one is started, and ends with the server)")
    add_flags(parser, Options)
    args = parser.parse_args(argv)

    def ready(where: str) -> None:
        sys.stdout.write(f"serving at {where}\n")
        sys.stdout.flush()

    try:
        run(Options.parse(args), ready, args.address)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    from dsa_engine.serving.ray_app import main as run_main  # what is sent to other processes needs its module's name

    sys.exit(run_main())
