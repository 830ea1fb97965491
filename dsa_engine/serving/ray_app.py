"""The server on Ray Serve: replicas of the engine behind the same HTTP application.

    python -m dsa_engine.serving.ray_app --model shapes --replicas 2 --port 8000
    serve run dsa_engine.serving.ray_app:app model=shapes replicas=2

One deployment, `Ingress`, is the app on a `RemoteBackend`; the other, `EngineReplica`, has the replicas. A stream stays with
its replica while that lives (`StickyRouter`). When it is gone, another one goes on from the snapshot that the detached actor
`InMemorySnapshotStore` keeps. There is one ingress: it has the jobs, and their folder on disk.
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
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError

from dsa_engine.pipeline import Pipeline
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.replicas.client import RemoteBackend, ReplicaUnavailable
from dsa_engine.serving.replicas.replica import POLL_TIMEOUT_S, Replica
from dsa_engine.serving.replicas.snapshots import InMemorySnapshotStore
from dsa_engine.serving.server import address as address_of
from dsa_engine.serving.server import bind
from dsa_engine.serving.settings import Settings, WorkerLimits
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
CALL_TIMEOUT_S = POLL_TIMEOUT_S + 15.0  # seconds after which a replica that has not answered is left
HEALTH_TIMEOUT_S = 20.0  # seconds after which a worker that does nothing counts as stuck, and its replica is replaced
EXTRA_CALLS = 64  # short calls to a replica at once, beside the streams'


class Options(BaseModel, extra="forbid"):
    """What is said on the command line, or after `serve run`."""

    model: str = Field("shapes", description="shipped name, folder or checkpoint")
    device: str | None = Field(None, description="cpu, cuda (default: cuda where replicas have a GPU)")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of a replica")
    family: str | None = Field(None, description="whose chunks, window and schedule a checkpoint gets")
    lora: str | None = Field(None, description="an adapter to merge into a checkpoint")
    vae: str | None = Field(None, description="video VAE of a checkpoint")
    text: str | None = Field(None, description="text encoder of a checkpoint")
    offload: str | None = Field(None, description="auto, or of text,vae: they visit the device")
    deterministic: bool = Field(False, description="a video's bits never depend on what else is made; no batching")

    replicas: int = Field(1, ge=1, description="replicas of the engine, at least")
    max_replicas: int | None = Field(None, ge=1, description="more are started while streams wait, up to so many")
    cpus: float = Field(1.0, ge=0, description="of a replica, as Ray counts them")
    gpus: float | None = Field(None, ge=0, description="of a replica (default: 1 where there is a CUDA device)")
    snapshot_every: int = Field(8, ge=0, description="chunks between two snapshots of a stream, 0 for none")

    host: str = Settings.host
    port: int = Field(Settings.port, ge=0, le=65535, description="0 for any that is free")
    token: str | None = Field(None, description="clients must send it (default: the environment's DSA_TOKEN, or none)")
    origins: tuple[str, ...] = Field((), description="another page that may use the API; repeatable")
    data: Path = Field(Settings.data, description="the jobs' database and videos")
    sessions: int = Field(WorkerLimits.max_sessions, description="live streams at once, of a replica")
    jobs: int = Field(WorkerLimits.max_jobs, description="jobs at once, of a replica")
    waiting: int = Field(WorkerLimits.max_queue, description="live streams that may wait for a place, of a replica")
    idle: float = Field(WorkerLimits.idle_timeout, description="seconds without a sign of the client")
    lifetime: float = Field(WorkerLimits.lifetime, description="seconds of a live stream")
    rows: int = Field(WorkerLimits.max_batch_rows, description="sequences of one forward, at most")
    steps: str | None = Field(None, description="where a request does not say: budget, dsa, fixed or a preset")

    def limits(self) -> WorkerLimits:
        return WorkerLimits(
            max_sessions=self.sessions,
            max_jobs=self.jobs,
            max_queue=self.waiting,
            idle_timeout=self.idle,
            lifetime=self.lifetime,
            max_batch_rows=self.rows,
            steps=self.steps,
        )

    def settings(self) -> Settings:
        names = ("host", "port", "token", "origins", "data")
        return Settings(**{name: getattr(self, name) for name in names})

    def placed(self) -> Options:
        """The same, said in a way that processes elsewhere understand."""
        model = str(Path(self.model).absolute()) if Path(self.model).exists() else self.model
        gpus = float(torch.cuda.is_available()) if self.gpus is None else self.gpus
        device = self.device or ("cuda" if gpus else "cpu")
        if device.startswith("cuda") and not gpus:
            raise ValueError(f"device={device!r} with gpus=0: replicas then see no GPU; give them one with gpus=1")
        token = self.token or os.environ.get("DSA_TOKEN") or None
        changes = {"model": model, "gpus": gpus, "device": device, "token": token, "data": self.data.absolute()}
        return self.model_copy(update=changes)


class StickyRouter(RequestRouter):
    """Calls go to the replica that they name, else to the one with the fewest calls that is not to be avoided."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where all are full: do not ask again at once
        home, avoid = (pending_request.kwargs.get(name) for name in ("home", "avoid"))
        at_home = [replica for replica in candidate_replicas if replica.replica_id.unique_id == home]
        welcome = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in (avoid or ())]
        return [at_home or welcome or candidate_replicas]


class RaySnapshotStore:
    """`snapshots.SnapshotStore` in an actor that outlives the replicas."""

    def __init__(self, app: str, lifetime: float):
        self.actor = (
            ray.remote(InMemorySnapshotStore)
            .options(
                name=f"{app}-snapshots",
                namespace=NAME,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
            )
            .remote(lifetime)
        )

    async def claim(self, id: str, run: str, have: int) -> bytes | None:
        return await self.actor.claim.remote(id, run, have)

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
        keeper = RaySnapshotStore(context.app_name, limits.lifetime)
        await keeper.actor.sizes.remote()  # it is there before anybody waits for it
        self.replica = Replica(self.worker, keeper, context.replica_id.unique_id, options.snapshot_every)
        self._sweeping = asyncio.create_task(self._sweep())

    @staticmethod
    def _load(options: Options) -> tuple[Pipeline, WorkerLimits]:
        names = ("device", "family", "lora", "vae", "text", "offload", "deterministic")
        parts = {name: getattr(options, name) for name in names}
        limits = options.limits()
        places = limits.slots
        asked = places if options.model_fields_set & {"sessions", "jobs"} else None
        pipe = Pipeline.from_pretrained(options.model, max_sessions=asked, **parts)
        if asked is None:
            limits = limits.within(pipe.make_room(places))
        torch.set_num_threads(options.threads or pipe.cpu_threads)  # the process is the replica's own
        pipe.warmup()
        return pipe, limits

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.replica.sweep()

    async def call(self, method: str, args: Sequence[Any], home: str | None = None, avoid: Any = None) -> Any:
        """A method of the replica. home, avoid: where `StickyRouter` has sent the call."""
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
    """`remote.Replicas` behind a deployment's handle."""

    def __init__(self, engine: serve.handle.DeploymentHandle):
        self.engine = engine

    async def call(self, method: str, *args: Any, home: str | None = None, avoid: frozenset[str] = frozenset()) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self.engine.call.remote(method, args, home=home, avoid=avoid)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaUnavailable(_brief(error)) from error

    async def stats(self) -> dict[str, dict[str, float]]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                found = await self.engine.broadcast("stats").results_async(return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaUnavailable(_brief(error)) from error
        return dict(one for one in found if not isinstance(one, Exception))


def _brief(error: Exception) -> str:
    """Ray's errors tell a long story; its first line says what it is."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@serve.ingress()
class Ingress:
    """The deployment of the HTTP application."""

    def __init__(self, engine: serve.handle.DeploymentHandle, options: Options):
        self.engine, self.options = engine, options

    async def __serve_build_asgi_app__(self):
        backend = await RemoteBackend.connect(RayReplicas(self.engine), self.options.replicas)
        app = create_app(backend, self.options.settings(), jobs=self.options.jobs > 0)
        backend.observers.append(app.state.metrics.observe)
        return app


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve.run` and `serve run`. args: of `Options`. Raises ValueError for what cannot be."""
    options = Options.model_validate(args).placed()
    limits, most = options.limits(), options.max_replicas or options.replicas
    if most < options.replicas:
        raise ValueError(f"max_replicas={most}: must be at least replicas={options.replicas}")
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if most > options.replicas:
        # A stream is one call at a time, also while it waits: more calls than places are a queue.
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": most,
                "target_ongoing_requests": limits.max_sessions,
                "metrics_interval_s": 2.0,
                "look_back_period_s": 6.0,
                "upscale_delay_s": 6.0,
            }
        }
    common = {"logging_config": {"enable_access_log": False}}  # it has a line for every chunk
    engine = serve.deployment(
        EngineReplica,
        **scale,
        **common,
        graceful_shutdown_timeout_s=10.0,
        max_ongoing_requests=limits.max_sessions + limits.max_queue + limits.max_jobs + EXTRA_CALLS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=1,
        **common,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_ongoing_requests=most * (limits.max_sessions + limits.max_queue) + EXTRA_CALLS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(engine.bind(options), options)


def run(options: Options, ready: Callable[[str], None], address: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, on the Ray cluster at `address`, or one that is started here and ends with it.

    ready: called with the address of the server once requests are answered.
    """
    with bind(options.settings()) as sock:  # an address that cannot be had is an error before anything starts
        port, where = sock.getsockname()[1], address_of(options.host, sock)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    target = app({**options.model_dump(), "port": port})
    ray.init(address=address, include_dashboard=None if address else False, namespace=NAME)
    try:
        serve.start(http_options={"host": options.host, "port": port})
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
    for name, field in Options.model_fields.items():
        kind = {"action": "store_true"} if field.annotation is bool else {"metavar": "X"}
        kind |= {"action": "append"} if name == "origins" else {}
        default = "" if field.default in (None, (), False) else f" (default {field.default})"
        text = f"{field.description or name}{default}"
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    address = given.pop("address")

    def ready(where: str) -> None:
        sys.stdout.write(f"serving at {where}\n")
        sys.stdout.flush()

    try:
        run(Options.model_validate(given), ready, address)
    except KeyboardInterrupt:
        return 130
    except ValidationError as error:
        words = [f"{one['loc'][0]}={one['input']}: {one['msg']}" for one in error.errors()]
        sys.stderr.write(f"error: {'; '.join(words)}\n")
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    from dsa_engine.serving.ray_app import main as run_main  # what is sent to other processes needs its module's name

    sys.exit(run_main())
