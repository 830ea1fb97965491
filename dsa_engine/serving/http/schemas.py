"""Requests and responses of the REST API. Names follow OpenAI's video API where it has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dsa_engine.serving.jobs.store import ID, Job, State
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import ModelCard, StreamRequest

Id = Annotated[str, Field(pattern=ID)]
# 2.0 is an integer in JSON Schema, if not in Python
Integral = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Count = Annotated[int, Field(ge=1, le=10**6), Integral]


class Refusal(ValueError):
    """A request that is not possible. param: the field at fault, which the message starts with; None for several."""

    def __init__(self, param: str | None, message: str):
        super().__init__((param or "") + message)
        self.param = param


class ImageReference(BaseModel):
    """OpenAI's form of a picture; only a data URL, for the server fetches nothing."""

    model_config = ConfigDict(extra="forbid")

    image_url: str


class CreateVideo(BaseModel):
    """A job. Fields that are omitted or null take the model's own values."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="what the video shows")
    model: str | None = Field(None, max_length=200, description="the name that /v1/models gives")
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")] | None = Field(
        None, description="width x height; only the model's own"
    )
    seconds: (
        Annotated[float, Field(gt=0, le=10**6)] | Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6})?$")] | None
    ) = Field(None, description="length, rounded to whole chunks")
    num_frames: Count | None = Field(None, description="length in frames, whole chunks")
    fps: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="only the model's own")
    seed: Annotated[int, Field(ge=0, lt=2**64), Integral] | None = Field(None, description="0 where it is left out")
    num_inference_steps: Count | None = Field(None, description="the most denoising steps that a chunk may take")
    guidance_scale: float | None = Field(None, description="only 1: the guidance is built into the model")
    negative_prompt: str | None = Field(None, description="not possible: the guidance is built into the model")
    input_reference: str | ImageReference | None = Field(
        None,
        description='the first frame: a data URL or base64, {"image_url": data URL}, or a file of multipart/form-data',
    )
    reference_url: str | None = Field(None, description="not possible: the server fetches nothing")
    step_policy: str | None = Field(
        None, max_length=64, description="dsa, relative, fixed, a preset of the model, or a form such as fixed:2"
    )
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="confidence at which a chunk is done"
    )
    min_steps: Count | None = None
    max_steps: Count | None = None

    def to_request(self, card: ModelCard, settings: Settings, has_image: bool) -> StreamRequest:
        """Without the image; has_image: one is given, and is the first frame.

        Raises ValueError for what this server or model cannot do, with the nearest that it can.
        """
        self._check(card)
        if len(self.prompt) > settings.max_prompt:
            raise Refusal("prompt", f" of {len(self.prompt)} characters: at most {settings.max_prompt} are possible")
        counts = [count for count in (self.num_inference_steps, self.max_steps) if count is not None]
        return StreamRequest(
            self.prompt,
            seed=self.seed or 0,
            num_frames=self._frames(card, settings, has_image),
            height=card.height,
            width=card.width,
            steps=self.step_policy,
            threshold=self.confidence_threshold,
            min_steps=self.min_steps,
            max_steps=min(counts, default=None),
            live=False,
        )

    def _check(self, card: ModelCard) -> None:
        if self.model not in (None, card.name):
            raise Refusal("model", f"={self.model!r}: this server has one model: {card.name!r}")
        size = f"{card.width}x{card.height}"
        if self.size not in (None, size):
            raise Refusal("size", f"={self.size!r}: this server makes videos of the model's own size only: {size!r}")
        if self.fps not in (None, card.fps):
            raise Refusal(
                "fps", f"={self.fps:g}: the model makes {card.fps:g} frames per second; nearest is {card.fps:g}"
            )
        for name in ("guidance_scale", "negative_prompt"):
            if getattr(self, name) not in (None, 1.0, ""):
                raise Refusal(
                    name,
                    ": a distilled few-step model has its guidance built in; only guidance_scale=1 without a negative "
                    "prompt is possible",
                )
        if self.reference_url is not None:
            raise Refusal("reference_url", ": this server fetches nothing from elsewhere; send input_reference instead")
        kind = (self.step_policy or "").partition(":")[0]
        if kind == "budget":
            raise Refusal("step_policy", "='budget': is for realtime streams, a job has no deadline; nearest is 'dsa'")
        if kind == "relative" and self.confidence_threshold is not None:
            raise Refusal("step_policy", "='relative': goes with no confidence_threshold; nearest is 'dsa'")
        if kind == "fixed" and (self.min_steps, self.confidence_threshold) != (None, None):
            raise Refusal("step_policy", "='fixed': goes with neither min_steps nor confidence_threshold")

    def _frames(self, card: ModelCard, settings: Settings, has_image: bool) -> int:
        first, later = card.chunks
        first = 1 + later if has_image else first
        longest = first + max(0, (settings.max_frames - first) // later) * later

        def whole(frames: float) -> int:
            return first + max(0, round((frames - first) / later)) * later

        if self.seconds is not None and self.num_frames is not None:
            raise Refusal("seconds", " and num_frames: give one or the other")
        if self.seconds is not None:
            frames, given = whole(float(self.seconds) * card.fps), f"={self.seconds}"
            if frames > longest:
                raise Refusal("seconds", f"{given}: at most {longest / card.fps:g} are possible")
            if not float(self.seconds) > 0:
                raise Refusal("seconds", f"{given}: must be above 0; nearest is {first / card.fps:g}")
            return frames
        frames = whole(card.frames) if self.num_frames is None else self.num_frames
        near = min(whole(frames), longest)
        if self.num_frames is not None and near != frames:
            rule = f"at most {longest} are possible" if frames > longest else "must come out as whole chunks"
            raise Refusal("num_frames", f"={frames}: {rule}; nearest is {near}")
        return near


class RemixVideo(BaseModel):
    """Another prompt on a video's seed and settings."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)


class JobError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A job. progress: percent; url: of the file, once completed; steps_per_chunk and confidence (a value per latent
    frame of each chunk, null without a confidence head): once completed."""

    id: Id
    object: Literal["video"] = "video"
    model: str
    status: State
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None = None  # videos are kept until they are deleted
    prompt: str
    size: str
    seconds: str
    fps: float
    num_frames: int
    seed: int
    quality: str = "standard"
    url: str | None
    error: JobError | None
    inference_time_s: float | None
    steps_per_chunk: list[int] | None
    confidence: list[list[float]] | None

    @classmethod
    def of(cls, job: Job, progress: int) -> Video:
        request = job.request
        return cls(
            id=job.id,
            model=job.model,
            status=cast(Any, job.status),
            progress=100 if job.status == "completed" else progress,
            created_at=int(job.created),
            completed_at=None if job.completed is None else int(job.completed),
            prompt=request["prompt"],
            size=f"{request['width']}x{request['height']}",
            seconds=f"{request['num_frames'] / job.fps:g}",
            fps=job.fps,
            num_frames=request["num_frames"],
            seed=request["seed"],
            url=f"/v1/videos/{job.id}/content" if job.status == "completed" else None,
            error=None if job.error is None else JobError(code="generation_failed", message=job.error),
            inference_time_s=job.duration_s,
            steps_per_chunk=job.steps,
            confidence=job.confidence,
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: Id
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """confidence_threshold: the default; presets: thresholds by name; prompts: grammar of those it knows, null for
    any."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dsa_engine"
    size: str
    fps: float
    num_frames: int
    max_steps: int
    confidence_threshold: float | None
    presets: dict[str, float]
    prompts: str | None

    @classmethod
    def of(cls, card: ModelCard, created: int) -> Model:
        return cls(
            id=card.name,
            created=created,
            size=f"{card.width}x{card.height}",
            fps=card.fps,
            num_frames=card.frames,
            max_steps=card.steps,
            confidence_threshold=card.threshold,
            presets=card.presets,
            prompts=card.prompts,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "ready", "stopping"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str
    param: str | None = None


class Error(BaseModel):
    """Every response that is not a success."""

    error: ErrorDetail


def request_schema(form: bool) -> dict[str, Any]:
    """JSON schema of `CreateVideo`; form: for multipart/form-data, which has files and no null."""
    schema = CreateVideo.model_json_schema()
    parts = schema.pop("$defs")  # a reference to them leads nowhere in the whole document
    for field in schema["properties"].values():
        for kind in field.get("anyOf", ()):
            if "$ref" in kind:
                kind.update(parts[kind.pop("$ref").rpartition("/")[2]])
    if form:
        for name, field in schema["properties"].items():
            kinds = [kind for kind in field.pop("anyOf", ()) if kind["type"] not in ("null", "object")]
            field.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
            field.pop("default", None)
            if name == "input_reference":
                field["format"] = "binary"
    return schema
