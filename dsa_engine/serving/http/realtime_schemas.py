"""The messages of `WS /v1/realtime/video`: JSON texts with a `type`, in the names that vLLM-Omni gave them.

client: session.start  session.interaction  session.ping  session.stop
server: session.queued*  video.start  (video.chunk_metadata, then one binary message with the chunk's frames)*
        session.interaction.queued  session.interaction.applied  session.pong  error  session.done
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dsa_engine.media.stream_encoders import FORMATS

MAX_SHOWN = 60  # characters of a wrong value that an error repeats

Id = Annotated[str, Field(min_length=1, max_length=128)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Invalid(ValueError):
    """A message that cannot be had. code: for programs; event_id: of the interaction that it was, where it said so."""

    def __init__(self, code: str, message: str, event_id: str | None = None):
        super().__init__(message)
        self.code, self.event_id = code, event_id


class ClientMessage(BaseModel):
    """What a client may say: nothing unknown, no number as a text, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Start(ClientMessage):
    """Open the stream. width, height, fps: only the model's own; num_frames: pixel frames, None for no end;
    step_policy, confidence_threshold, min_steps, max_steps: as `types.StreamRequest` has them."""

    type: Literal["session.start"]
    prompt: str
    model: str | None = None
    format: str = "m4s"
    width: int | None = None
    height: int | None = None
    fps: Annotated[float | None, Field(allow_inf_nan=False)] = None
    num_frames: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    step_policy: Annotated[str, Field(max_length=1000)] | None = None
    confidence_threshold: Unit | None = None
    min_steps: Count | None = None
    max_steps: Count | None = None


class Change(ClientMessage):
    """What is to be another from the next chunk on."""

    prompt: str | None = None
    confidence_threshold: Unit | None = None


class Interaction(ClientMessage):
    """transition_chunks: that the change of prompt takes; 0 is at once."""

    event: Change
    event_id: Id | None = None
    transition_chunks: Annotated[int, Field(ge=0, le=1000)] = 0


class InteractionMessage(ClientMessage):
    type: Literal["session.interaction"]
    interaction: Interaction


class Ping(ClientMessage):
    """A sign of the client, so that a stream that waits for it is not taken for left."""

    type: Literal["session.ping"]


class Stop(ClientMessage):
    type: Literal["session.stop"]


TYPES = ("session.start", "session.interaction", "session.ping", "session.stop")
Message = Start | InteractionMessage | Ping | Stop
_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(text: str) -> Message:
    """A client's message. Raises `Invalid` with what was given and what is allowed."""
    try:
        said = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise Invalid("invalid_json", f"not a JSON text: {error}") from None
    try:
        return _MESSAGE.validate_python(said)
    except ValidationError as error:
        if isinstance(said, dict) and said.get("type") not in TYPES:
            words = f"type={abbreviate(said.get('type'))}: must be one of {', '.join(TYPES)}"
            raise Invalid("unknown_type", words, event_id(said)) from None
        raise Invalid("invalid_value", _words(error), event_id(said)) from None


def event_id(said: Any) -> str | None:
    """The event's id in a message that may be wrong in any way."""
    interaction = said.get("interaction") if isinstance(said, dict) else None
    given = interaction.get("event_id") if isinstance(interaction, dict) else None
    return given if isinstance(given, str) and 0 < len(given) <= 128 else None


def check(start: Start, card: Any, longest: int) -> None:
    """What the message's shape does not say: the model's size and pace (`types.ModelCard`), known formats, the length of
    the prompt in characters. Raises `Invalid` with the legal value."""
    if start.format not in FORMATS:
        raise Invalid("invalid_value", f"format={abbreviate(start.format)}: must be one of {', '.join(FORMATS)}")
    own = {"model": card.name, "width": card.width, "height": card.height, "fps": card.fps}
    for name, legal in own.items():
        given = getattr(start, name)
        if given is not None and given != legal:
            code = "model_not_found" if name == "model" else "invalid_value"
            raise Invalid(
                code, f"{name}={abbreviate(given)}: this server's is {abbreviate(legal)}; leave it out or give that"
            )
    check_prompt(start.prompt, longest)


def check_change(interaction: Interaction, longest: int) -> None:
    """As `check`, for what is to change while the stream runs."""
    change, name = interaction.event, interaction.event_id
    if change.prompt is None and change.confidence_threshold is None:
        raise Invalid("invalid_value", "event={}: must hold a prompt, a confidence_threshold or both", name)
    if change.prompt is None and interaction.transition_chunks:
        words = f"transition_chunks={interaction.transition_chunks}: is of a change of prompt; give one, or 0"
        raise Invalid("invalid_value", words, name)
    if change.prompt is not None:
        check_prompt(change.prompt, longest, name)


def check_prompt(prompt: str, longest: int, name: str | None = None) -> None:
    if len(prompt) > longest:
        raise Invalid("invalid_value", f"prompt of {len(prompt)} characters: must be at most {longest}", name)
    if not prompt.strip():
        raise Invalid("invalid_value", f"prompt={abbreviate(prompt)}: must not be empty", name)


def abbreviate(value: Any) -> str:
    """A value as an error repeats it: short, whatever it was."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return f"a whole number of {int(math.log10(2) * value.bit_length()) + 1} digits"
    if isinstance(value, (dict, list)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _words(error: ValidationError) -> str:
    """One line for each thing that is wrong, at most three of them."""
    lines = []
    for e in error.errors(include_url=False, include_context=False)[:3]:
        place = ".".join(str(part)[:MAX_SHOWN] for part in e["loc"][1:]) or "message"
        given = "" if e["type"] == "missing" else f"={abbreviate(e['input'])}"
        lines.append(f"{place}{given}: {e['msg']}")
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


class ServerMessage(BaseModel):
    """What the server says. NaN and infinities, which JSON has not, go out as null."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    def text(self) -> str:
        return self.model_dump_json()


class Queued(ServerMessage):
    """All places are taken. position: 1 is the next to be let in."""

    type: Literal["session.queued"] = "session.queued"
    position: int


class VideoStart(ServerMessage):
    """The stream has its place. config: what is in force, the defaults filled in."""

    type: Literal["video.start"] = "video.start"
    request_id: str
    format: str
    config: dict[str, Any]


class Milliseconds(ServerMessage):
    """Of a chunk: the denoising steps, the forward that writes the one before into the cache where it does not ride
    along with a step, the decoder, and the encoder of the stream's format."""

    denoise: float
    kv: float
    vae: float
    encode: float


class ChunkMetadata(ServerMessage):
    """What the next binary message holds.

    steps, confidence (one value a latent frame), threshold (that the chunk was decided with): None where confidence
    does not count. pts: seconds of the first frame from the clip's start. latency_ms: since the chunk was wanted,
    deadline_ms: when the player runs out, None for the first. bytes_per_frame: of a raw frame, whatever the format;
    payload_lengths: of each frame's part of the binary message, where it has such parts.
    """

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
    bytes_per_frame: int
    payload_lengths: list[int] | None
    is_final_frame_batch: Literal[True] = True  # of its chunk: each is sent as one
    pts: float
    prompt: str | None
    steps: int
    confidence: list[float] | None
    threshold: float | None
    ms: Milliseconds
    latency_ms: float
    deadline_ms: float | None
    late: bool


class InteractionQueued(ServerMessage):
    """The change will be in force from some next chunk on."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    request_id: str
    event_id: str


class InteractionApplied(ServerMessage):
    """The change is in force from chunk `chunk_index` on."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    request_id: str
    event_id: str | None
    chunk_index: int
    prompt: str


class Pong(ServerMessage):
    type: Literal["session.pong"] = "session.pong"


class Done(ServerMessage):
    """No more comes. reason: "done", "stopped", "idle", "lifetime" or "shutdown"; chunks: that were sent."""

    type: Literal["session.done"] = "session.done"
    request_id: str | None
    reason: str
    message: str | None = None
    stopped: bool
    chunks: int


class Error(ServerMessage):
    """Something was not possible. retryable: the same may be possible later; event_id: of the interaction that it
    answers. The stream goes on unless the connection is closed after it."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool = False
    event_id: str | None = None
