"""The messages of `WS /v1/realtime/video`: JSON texts with a `type`, named as in vLLM-Omni.

client: session.start  session.interaction  session.ping  session.stop
server: session.queued*  video.start  (video.chunk_metadata, then one binary message with the chunk's frames)*
        session.interaction.queued  session.interaction.applied  session.pong  error  session.done
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from dsa_engine.media.stream_encoders import FORMATS
from dsa_engine.serving.types import ModelCard, StreamRequest

MAX_SHOWN = 60  # characters of a wrong value in an error message

Id = Annotated[str, Field(min_length=1, max_length=128)]
# 2.0 is an integer in JSON Schema, if not in Python
Integral = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Count = Annotated[int, Field(ge=1, le=2**31), Integral]
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def IfNull(default: Any) -> BeforeValidator:  # noqa: N802 reads as a type
    """null is as if the field were left out."""
    return BeforeValidator(lambda value: default if value is None else value)


class Invalid(ValueError):
    """A message that is not valid. code: for programs; event_id: of the interaction, if it was one and named it."""

    def __init__(self, code: str, message: str, event_id: str | None = None):
        super().__init__(message)
        self.code, self.event_id = code, event_id


class ClientMessage(BaseModel):
    """From a client: no unknown fields, no numbers as strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Start(ClientMessage):
    """Open the stream. width, height, fps: only the model's own; the others as in `types.StreamRequest`."""

    type: Literal["session.start"]
    prompt: str
    model: str | None = None
    format: Annotated[str, IfNull("m4s")] = "m4s"
    width: Annotated[int, Integral] | None = None
    height: Annotated[int, Integral] | None = None
    fps: Annotated[float | None, Field(allow_inf_nan=False)] = None
    num_frames: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64), Integral, IfNull(0)] = 0
    step_policy: Annotated[str, Field(max_length=1000)] | None = None
    confidence_threshold: Unit | None = None
    min_steps: Count | None = None
    max_steps: Count | None = None
    # Of vLLM-Omni's and the jobs API's requests. What is neutral for a distilled model is taken, all else refused.
    size: str | None = None  # width x height; only the model's own
    num_inference_steps: Count | None = None  # as max_steps
    guidance_scale: Annotated[float | None, Field(allow_inf_nan=False)] = None
    negative_prompt: str | None = None
    extra_params: dict[str, Any] | None = None
    sampling_params: dict[str, Any] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None  # not used

    def to_request(self) -> StreamRequest:
        return StreamRequest(
            prompt=self.prompt,
            seed=self.seed,
            num_frames=self.num_frames,
            steps=self.step_policy,
            threshold=self.confidence_threshold,
            min_steps=self.min_steps,
            max_steps=min((n for n in (self.max_steps, self.num_inference_steps) if n is not None), default=None),
        )


class InteractionEvent(ClientMessage):
    """New values from the next chunk on."""

    prompt: str | None = None
    confidence_threshold: Unit | None = None


class Interaction(ClientMessage):
    """transition_chunks: over which the prompt is interpolated; 0 is at once."""

    event: InteractionEvent
    event_id: Id | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=1000)] = 0


class InteractionMessage(ClientMessage):
    type: Literal["session.interaction"]
    interaction: Interaction


class Ping(ClientMessage):
    """A keepalive, so that a stream that waits for its client does not time out."""

    type: Literal["session.ping"]


class Stop(ClientMessage):
    type: Literal["session.stop"]


TYPES = ("session.start", "session.interaction", "session.ping", "session.stop")
Message = Start | InteractionMessage | Ping | Stop
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(text: str) -> Message:
    """A client's message. Raises Invalid with what was given and what is allowed."""
    try:
        data = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise Invalid("invalid_json", f"not a JSON text: {error}") from None
    try:
        return _MESSAGE.validate_python(data)
    except ValidationError as error:
        if isinstance(data, dict) and data.get("type") not in TYPES:
            words = f"type={abbreviate(data.get('type'))}: must be one of {', '.join(TYPES)}"
            raise Invalid("unknown_type", words, event_id(data)) from None
        raise Invalid("invalid_value", _words(error), event_id(data)) from None


def event_id(data: Any) -> str | None:
    """The event id in a message that may be malformed in any way."""
    interaction = data.get("interaction") if isinstance(data, dict) else None
    given = interaction.get("event_id") if isinstance(interaction, dict) else None
    return given if isinstance(given, str) and 0 < len(given) <= 128 else None


def check(start: Start, card: ModelCard, max_prompt: int) -> None:
    """Beyond the schema: the model's name, size and fps, known formats, the length of the prompt in characters. Raises
    Invalid with the legal value."""
    if start.format not in FORMATS:
        raise Invalid("invalid_value", f"format={abbreviate(start.format)}: must be one of {', '.join(FORMATS)}")
    expected = {"model": card.name, "width": card.width, "height": card.height, "fps": card.fps}
    for name, legal in expected.items():
        given = getattr(start, name)
        if given is not None and given != legal:
            code = "model_not_found" if name == "model" else "invalid_value"
            raise Invalid(
                code, f"{name}={abbreviate(given)}: this server's is {abbreviate(legal)}; leave it out or give that"
            )
    size = f"{card.width}x{card.height}"
    if start.size not in (None, size):
        raise Invalid("invalid_value", f"size={abbreviate(start.size)}: this server's is {size!r}; leave it out")
    neutral = {"guidance_scale": 1.0, "negative_prompt": "", "extra_params": {}, "sampling_params": {}}
    for name, value in neutral.items():
        given = getattr(start, name)
        if given is not None and given != value:
            words = f"{name}={abbreviate(given)}: the guidance is built into the model; must be {value!r} or left out"
            if isinstance(value, dict):
                words = (
                    f"{name} of {', '.join(map(repr, list(given)[:3]))}: knows no such names; must be empty or left out"
                )
            raise Invalid("invalid_value", words)
    check_prompt(start.prompt, max_prompt)


def check_interaction(interaction: Interaction, max_prompt: int) -> None:
    """As `check`, for an update of a running stream."""
    event, name = interaction.event, interaction.event_id
    if event.prompt is None and event.confidence_threshold is None:
        raise Invalid("invalid_value", "event={}: must hold a prompt, a confidence_threshold or both", name)
    if event.prompt is None and interaction.transition_chunks:
        words = f"transition_chunks={interaction.transition_chunks}: is of a change of prompt; give one, or 0"
        raise Invalid("invalid_value", words, name)
    if event.prompt is not None:
        check_prompt(event.prompt, max_prompt, name)


def check_prompt(prompt: str, max_prompt: int, name: str | None = None) -> None:
    if len(prompt) > max_prompt:
        raise Invalid("invalid_value", f"prompt of {len(prompt)} characters: must be at most {max_prompt}", name)
    if not prompt.strip():
        raise Invalid("invalid_value", f"prompt={abbreviate(prompt)}: must not be empty", name)


def abbreviate(value: Any) -> str:
    """A wrong value for an error message: short, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return f"a whole number of {int(math.log10(2) * value.bit_length()) + 1} digits"
    if isinstance(value, (dict, list)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _words(error: ValidationError) -> str:
    """The first three errors."""
    lines = []
    for e in error.errors(include_url=False, include_context=False)[:3]:
        where = ".".join(str(part)[:MAX_SHOWN] for part in e["loc"][1:]) or "message"
        given = "" if e["type"] == "missing" else f"={abbreviate(e['input'])}"
        lines.append(f"{where}{given}: {e['msg']}")
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


class ServerMessage(BaseModel):
    """From the server. NaN and infinities, which JSON lacks, become null."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    def text(self) -> str:
        return self.model_dump_json()


class Queued(ServerMessage):
    """All slots are taken. position: 1 is the next to be admitted."""

    type: Literal["session.queued"] = "session.queued"
    position: int


class VideoStart(ServerMessage):
    """The stream has a slot. config: all values in force, with the defaults."""

    type: Literal["video.start"] = "video.start"
    request_id: str
    format: str
    config: dict[str, Any]


class Milliseconds(ServerMessage):
    """Stages of a chunk."""

    denoise: float
    kv: float  # the forward that writes the previous chunk into the cache, if it is not merged with a step
    vae: float
    encode: float  # in the stream's format


class ChunkMetadata(ServerMessage):
    """Describes the next binary message."""

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    kind: Literal["media"] = "media"
    request_id: str
    chunk_index: int
    generation_chunk_index: int
    transport_chunk_index: int
    content_type: str
    num_frames: int
    width: int
    height: int
    byte_length: int
    bytes_per_frame: int  # of a raw frame, whatever the format
    payload_lengths: list[int] | None  # bytes of each frame, for formats with a part per frame
    is_final_frame_batch: Literal[True] = True  # of its chunk: each is sent as one
    pts: float  # seconds of the first frame from the clip's start
    prompt: str | None
    steps: int
    confidence: list[float] | None  # per latent frame; None without a confidence head
    threshold: float | None  # that the chunk was decided with; None if confidence is not used
    ms: Milliseconds
    latency_ms: float  # since the chunk could start
    deadline_ms: float | None  # when the player runs out; None for the first chunk
    late: bool


class InteractionQueued(ServerMessage):
    """The update was received; a later chunk will apply it."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    request_id: str
    event_id: str


class InteractionApplied(ServerMessage):
    """The update is in force from chunk `chunk_index` on."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    request_id: str
    event_id: str | None
    chunk_index: int
    prompt: str


class Pong(ServerMessage):
    type: Literal["session.pong"] = "session.pong"


class Done(ServerMessage):
    """The last message. reason: "done", "stopped", "idle", "lifetime" or "shutdown"; chunks: sent in all."""

    type: Literal["session.done"] = "session.done"
    request_id: str | None
    reason: str
    message: str | None = None
    stopped: bool
    chunks: int


class Error(ServerMessage):
    """retryable: the same may be possible later; event_id: of the interaction that it answers. The stream goes on
    unless the connection is closed after it."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool = False
    event_id: str | None = None

    @classmethod
    def of(cls, error: Invalid) -> Error:
        return cls(code=error.code, message=str(error), event_id=error.event_id)
