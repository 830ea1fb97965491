"""The HTTP application: jobs, the realtime WebSocket, the page, health checks and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from dsa_engine.serving import origins
from dsa_engine.serving.http import auth, realtime, requests, schemas, videos
from dsa_engine.serving.http.prometheus import Metrics
from dsa_engine.serving.http.schemas import Refusal
from dsa_engine.serving.jobs.queue import Jobs
from dsa_engine.serving.jobs.store import StorageError, Store
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import Backend, Overloaded

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "static"
CODES = {
    400: "invalid_value",
    401: "invalid_token",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "not_ready",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "busy",
    503: "stopping",
    507: "storage",
}


class Service:
    """What an app holds. `drain` may be called before the server closes its connections, and is called at the end of
    the app's lifespan in any case."""

    def __init__(self, backend: Backend, jobs: Jobs | None):
        self.backend, self.jobs = backend, jobs
        self.stopping = False
        self._drained: asyncio.Task[None] | None = None

    async def drain(self) -> None:
        """Admit nobody, let running chunks finish, store the state of the jobs."""
        self.stopping = True
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await self._drained

    async def _drain(self) -> None:
        if self.jobs is not None:
            self.jobs.stop()
        await self.backend.close()
        if self.jobs is not None:
            await self.jobs.close()


def create_app(backend: Backend, settings: Settings | None = None, jobs: bool = True) -> FastAPI:
    """An app whose `state` holds `service` (with `drain`) and `metrics`, whose `observe` is for a worker's observers.

    Args:
        backend: runs already.
        settings: defaults to `Settings()`.
        jobs: serve jobs, stored in `settings.data`.

    Raises:
        ValueError: the data folder cannot be used.
    """
    settings = settings or Settings()
    runner = Jobs(backend, Store(settings.data)) if jobs else None
    service = Service(backend, runner)

    @asynccontextmanager
    async def lifespan(_) -> AsyncIterator[None]:
        if runner is not None:
            await runner.start()
        yield
        await service.drain()

    app = FastAPI(title="dsa-engine", version=_version(), lifespan=lifespan)
    app.state.service, app.state.settings, app.state.started = service, settings, int(time.time())
    app.state.metrics = Metrics(backend.card.steps, backend.stats, None if runner is None else runner.store.counts)
    for router in (routes, *([] if runner is None else [videos.routes])):
        app.include_router(router, dependencies=guards(settings))
    app.include_router(health)
    app.include_router(realtime.router(backend, settings))
    app.include_router(page(PAGE))
    app.add_middleware(requests.BodyLimit, max_bytes=settings.max_body, timeout=settings.body_timeout)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=[requests.REQUEST_ID],
        )
    for middleware in (requests.HeadAsGet, auth.TokenFromQuery, requests.RequestId):  # the last one is the outermost
        app.add_middleware(middleware)
    answer_errors(app)
    if settings.token is None and not origins.is_local(settings.host):
        logger.warning(
            "listening at %s without a token: whoever reaches this machine may use the server; --token or DSA_TOKEN "
            "asks for one",
            settings.host,
        )
    return app


def guards(settings: Settings) -> list[Any]:
    """Dependencies of the routes that need a token."""
    return [Depends(_check_origin), *([] if settings.token is None else [Depends(_check_token)])]


def _check_origin(request: Request) -> None:
    """CORS is not enough: a browser sends some requests of any page, and only hides the answer from it."""
    words = auth.refused(request.headers, request.app.state.settings)
    if words is not None:
        raise HTTPException(403, words)


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def _check_token(request: Request, given: Credentials) -> None:
    if not auth.token_matches(request.app.state.settings.token, given.credentials if given else None):
        words = "a bearer token is needed, as in Authorization: Bearer TOKEN"
        raise HTTPException(401, words, {"WWW-Authenticate": "Bearer"})


routes = APIRouter(tags=["server"])


@routes.get("/v1/models", responses=videos.errors())
async def models(request: Request) -> schemas.ModelList:
    """The server's one model."""
    state = request.app.state
    return schemas.ModelList(data=[schemas.Model.of(state.service.backend.card, state.started)])


@routes.get("/v1/models/{model}", responses=videos.errors(404))
async def model(model: str, request: Request) -> schemas.Model:
    """One model by its name."""
    state = request.app.state
    card = state.service.backend.card
    if model != card.name:
        raise HTTPException(404, f"there is no model {model!r}; this server has {card.name!r}")
    return schemas.Model.of(card, state.started)


METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}
}


@routes.get("/metrics", responses={**METRICS, **videos.errors()}, response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    text = await asyncio.to_thread(request.app.state.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


health = APIRouter(tags=["server"])


@health.get("/health")
async def alive() -> schemas.Health:
    """The server answers."""
    return schemas.Health(status="ok")


@health.get("/readyz", responses={503: {"model": schemas.Health}})
async def ready(request: Request, response: Response) -> schemas.Health:
    """200 while requests are accepted, 503 while the server stops."""
    stopping = request.app.state.service.stopping
    response.status_code = 503 if stopping else 200
    return schemas.Health(status="stopping" if stopping else "ready")


def page(folder: Path) -> APIRouter:
    """A route for each file. A mount at / would answer all unknown paths, in its own error format."""
    routes = APIRouter(include_in_schema=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = "/" + path.relative_to(folder).as_posix()
        for address in (name, "/") if name == "/index.html" else (name,):
            routes.add_api_route(address, _file(path), methods=["GET"])
    return routes


def _file(path: Path):
    async def send() -> FileResponse:
        return FileResponse(path, headers={"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"})

    return send


def answer_errors(app: FastAPI) -> None:
    """Every error in one format (`schemas.Error`)."""

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        headers = {"Allow": ", ".join(allowed(request))} if error.status_code == 405 else error.headers
        return failure(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError) -> JSONResponse:
        errors = error.errors()
        unknown = [_field(e["loc"]) for e in errors if e["type"] == "extra_forbidden"]
        if unknown:  # as OpenAI answers
            return failure(400, f"Unknown parameter: {unknown[0]!r}.", unknown[0], code="unknown_parameter")
        names = [_field(e["loc"]) for e in errors]
        words = [f"{name}: {e['msg']}" for name, e in zip(names, errors)]
        return failure(422, "; ".join(words[:5]), names[0] if names else None)

    @app.exception_handler(Refusal)
    async def impossible(_, error: Refusal) -> JSONResponse:
        return failure(400, str(error), error.param)

    @app.exception_handler(Overloaded)
    async def busy(request: Request, error: Overloaded) -> JSONResponse:
        stopping = request.app.state.service.stopping
        return failure(503 if stopping else 429, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(StorageError)
    async def storage(_, error: StorageError) -> JSONResponse:
        logger.error("%s", error)
        return failure(507, "the server's disk is full or cannot be written to; its log says more")

    @app.exception_handler(ClientDisconnect)
    async def gone(_, error: ClientDisconnect) -> JSONResponse:
        return failure(400, "the request did not come whole")  # nobody reads this answer; not a fault of the server

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        headers = {requests.REQUEST_ID: request.state.request_id}  # this answer is made outside of the middleware
        return failure(500, "the server made a mistake; its log says which", headers=headers)


def allowed(request: Request) -> list[str]:
    """The methods of a path, over all its routes: the router reports those of the first only."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "POST", "DELETE")}
    routes = request.app.routes
    found = [name for name, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes)]
    return ["GET", "HEAD", *found[1:]] if "GET" in found else found  # `HeadAsGet`


def failure(
    status: int,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = schemas.ErrorDetail(message=message, type=kind, code=code or CODES.get(status, "error"), param=param)
    return JSONResponse(schemas.Error(error=detail).model_dump(), status, headers)


def _field(location: Sequence[str | int]) -> str:
    """The field that an error of pydantic names."""
    names = [str(part) for part in location if part not in ("body", "query", "path")]
    return names[0] if names else "body"


def _version() -> str:
    try:
        return version("dsa-engine")
    except PackageNotFoundError:  # run from a checkout
        return "0"
