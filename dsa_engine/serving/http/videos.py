"""The routes of the jobs: `/v1/videos`."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from dsa_engine.media import image
from dsa_engine.serving.http import schemas
from dsa_engine.serving.http.requests import HEAD
from dsa_engine.serving.http.schemas import CreateVideo, Refusal, Video
from dsa_engine.serving.jobs.queue import Jobs
from dsa_engine.serving.jobs.store import ID, Job
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import StreamRequest

FIELDS = 64  # of a form
FORM, TEXT = "multipart/form-data", "application/json"
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            TEXT: {"schema": schemas.request_schema(form=False)},
            FORM: {"schema": schemas.request_schema(form=True)},
        },
    }
}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}, "description": "the MP4 file"}
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of a route, for the OpenAPI document."""
    return {code: {"model": schemas.Error} for code in (401, 403, *codes)}


routes = APIRouter(prefix="/v1/videos", tags=["jobs"])


def _jobs(request: Request) -> Jobs:
    return request.app.state.service.jobs


JobQueue = Annotated[Jobs, Depends(_jobs)]


async def _found(id: str, jobs: JobQueue) -> Job:
    job = await asyncio.to_thread(jobs.store.get, id)  # what is no id is not found either
    if job is None:
        raise missing(id)
    return job


Found = Annotated[Job, Depends(_found)]


def _client(request: Request) -> tuple[str, int]:
    """The client's address, and how many jobs it may queue."""
    return request.client.host if request.client else "", request.app.state.settings.max_client_jobs


def as_video(job: Job, jobs: Jobs) -> Video:
    return Video.of(job, jobs.progress(job.id))


@routes.post("", openapi_extra=BODY, responses=errors(400, 413, 415, 422, 429, 503, 507))
async def create(request: Request, jobs: JobQueue) -> Video:
    """Queue a video. It is made even if the client leaves or the server restarts."""
    settings, card = request.app.state.settings, jobs.backend.card
    try:
        body, data = await read(request, settings)
        stream_request = body.to_request(card, settings, has_image=data is not None)
        if data is not None:
            blank = np.zeros((card.height, card.width, 3), np.uint8)  # all else is checked before a picture is decoded
            await jobs.backend.check(dataclasses.replace(stream_request, image=blank))
            async with jobs.decoding:
                decoded = await asyncio.to_thread(image.decode, data, card.height, card.width)
            stream_request = dataclasses.replace(stream_request, image=decoded)
        return as_video(await jobs.add(stream_request, *_client(request)), jobs)
    except ValidationError as error:  # a ValueError too, but it names fields
        raise RequestValidationError(error.errors()) from error
    except ValueError as error:
        raise error if isinstance(error, Refusal) else Refusal(None, str(error)) from error


@routes.get("", responses=errors(404, 422))
async def index(
    jobs: JobQueue,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=ID)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> schemas.VideoList:
    """A page of the jobs, the newest first."""
    page = await asyncio.to_thread(jobs.store.page, limit, after, order == "desc")
    if page is None:
        raise missing(after)
    videos = [as_video(job, jobs) for job in page[0]]
    first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
    return schemas.VideoList(data=videos, first_id=first, last_id=last, has_more=page[1])


@routes.get("/{id}", responses=errors(404, 422))
async def show(job: Found, jobs: JobQueue) -> Video:
    """The state of a job."""
    return as_video(job, jobs)


@routes.post("/{id}/remix", responses=errors(400, 404, 413, 422, 429, 503, 507))
async def remix(body: schemas.RemixVideo, job: Found, request: Request, jobs: JobQueue) -> Video:
    """Another video of the same seed, length and settings, with another prompt."""
    longest = request.app.state.settings.max_prompt
    if len(body.prompt) > longest:
        raise Refusal("prompt", f" of {len(body.prompt)} characters: at most {longest} are possible")
    picture = await asyncio.to_thread(jobs.store.read_image, job.id) if job.picture else None
    try:
        again = StreamRequest(**{**job.request, "prompt": body.prompt}, image=picture, live=False)
        return as_video(await jobs.add(again, *_client(request)), jobs)
    except ValueError as error:
        raise Refusal(None, str(error)) from error


@routes.delete("/{id}", responses=errors(404, 422))
async def delete(job: Found, jobs: JobQueue) -> schemas.Deleted:
    """Delete a job and its video; a running job is cancelled."""
    if not await jobs.delete(job.id):
        raise missing(job.id)
    return schemas.Deleted(id=job.id)


@routes.get("/{id}/content", response_class=FileResponse, responses={**CONTENT, **errors(404, 409, 422)})
async def content(request: Request, job: Found, jobs: JobQueue, variant: Literal["video"] = "video") -> Response:
    """The video, once the job is completed."""
    if job.status != "completed":
        raise HTTPException(409, f"video {job.id} is {job.status}: there is no file until it is completed")
    path = jobs.store.video(job.id)
    try:
        stat = await asyncio.to_thread(os.stat, path)
    except FileNotFoundError:
        raise HTTPException(404, f"the file of video {job.id} is gone from the server's folder") from None
    response = FileResponse(path, media_type="video/mp4", filename=path.name, stat_result=stat)
    if HEAD not in request.scope:
        return response
    bare = Response()  # nothing is read of the file
    bare.raw_headers = response.raw_headers
    return bare


def picture_text(given: str | schemas.ImageReference) -> str:
    """The data URL or base64 without the line ends that tools such as `base64` put in."""
    return "".join((given if isinstance(given, str) else given.image_url).split())


def missing(id: str | None) -> HTTPException:
    return HTTPException(404, f"there is no video {id!r}")


async def read(request: Request, settings: Settings) -> tuple[CreateVideo, bytes | None]:
    """The body of a request, and its image file. Raises ValidationError, HTTPException or ValueError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == TEXT:
        body = CreateVideo.model_validate_json(await request.body(), strict=True)
        return body, None if body.input_reference is None else image.from_text(picture_text(body.input_reference))
    if kind != FORM:
        raise HTTPException(415, f"content-type {kind!r}: must be {TEXT} or {FORM}")
    found = re.search(r'boundary=(?:"([^"]+)"|([^";,\s]+))', request.headers["content-type"], re.IGNORECASE)
    boundary = "" if found is None else found[1] or found[2]
    if not boundary or f"--{boundary}--".encode("latin-1") not in await request.body():
        raise Refusal(None, f"the {FORM} ends in the middle: its last boundary is not there")
    fields: dict[str, str] = {}
    data: bytes | None = None
    async with request.form(max_files=1, max_fields=FIELDS, max_part_size=settings.max_body) as form:
        for name, value in form.multi_items():
            if value == "" and name != "prompt":  # what a page's form sends for a field that was left empty
                continue
            name = "input_reference" if name == "input_reference[image_url]" else name  # as OpenAI's SDKs write it
            if name in fields or (data is not None and name == "input_reference"):
                raise Refusal(name, ": is there more than once")
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name == "input_reference":
                data = await value.read()
            else:
                raise Refusal(name, ": must be text, not a file")
    body = CreateVideo.model_validate_strings(fields)
    if body.input_reference is not None:
        data = image.from_text(picture_text(body.input_reference))
    return body, data
