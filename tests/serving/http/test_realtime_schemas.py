"""Messages of the realtime WebSocket: what is understood, and in which words the rest is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_engine.serving.http import realtime_schemas
from dsa_engine.serving.http.realtime_schemas import InteractionMessage, Invalid, Ping, Start, Stop
from dsa_engine.serving.types import ModelCard

CARD = ModelCard("shapes", 64, 48, 12.0, 48, 4, 0.5, {}, None)


def start(**fields) -> str:
    return json.dumps({"type": "session.start", "prompt": "a red circle rests"} | fields)


def interaction(event, **fields) -> str:
    return json.dumps({"type": "session.interaction", "interaction": {"event": event} | fields})


def checked(text: str) -> None:
    """Parse and check, as the server does."""
    message = realtime_schemas.parse(text)
    if isinstance(message, Start):
        realtime_schemas.check(message, CARD, 100)
    elif isinstance(message, InteractionMessage):
        realtime_schemas.check_interaction(message.interaction, 100)


def test_every_message_is_understood():
    everything = start(
        model="shapes",
        format="jpeg",
        width=48,
        height=64,
        fps=12,
        num_frames=9,
        seed=2**64 - 1,
        step_policy="dsa",
        confidence_threshold=1,
        min_steps=1,
        max_steps=4,
    )
    checked(everything)
    said = realtime_schemas.parse(everything)
    assert isinstance(said, Start)
    assert (said.width, said.height, said.fps, said.seed, said.confidence_threshold) == (48, 64, 12.0, 2**64 - 1, 1.0)
    plain = realtime_schemas.parse(start())
    assert (plain.format, plain.seed, plain.num_frames, plain.step_policy) == ("m4s", 0, None, None)
    change = realtime_schemas.parse(interaction({"prompt": "b"}, event_id="e", transition_chunks=0))
    assert isinstance(change, InteractionMessage) and change.interaction.event.prompt == "b"
    assert isinstance(realtime_schemas.parse('{"type": "session.ping"}'), Ping)
    assert isinstance(realtime_schemas.parse('{"type": "session.stop"}'), Stop)


@pytest.mark.parametrize(
    "text, code, words",
    [
        ("", "invalid_json", "JSON"),
        ('{"type": "session.start", "prom', "invalid_json", "JSON"),
        ("[" * 100_000, "invalid_json", "recursion"),
        ('{"type": "session.start", "prompt": "a", "fps": NaN}', "invalid_json", "JSON"),
        ('{"type": "session.start", "prompt": "\\ud800"}', "invalid_json", "JSON"),
        ("[]", "invalid_value", "object"),
        ("3", "invalid_value", "object"),
        ("{}", "unknown_type", "type=None: must be one of session.start, session.interaction"),
        ('{"type": "sessions.start"}', "unknown_type", "'sessions.start'"),
        ('{"type": ["session.start"]}', "unknown_type", "list of 1"),
        ('{"type": "session.start"}', "invalid_value", "prompt: Field required"),
        (start(prompt=None), "invalid_value", "prompt=None"),
        (start(prompt="  "), "invalid_value", "empty"),
        (start(prompt="x" * 101), "invalid_value", "101 characters: must be at most 100"),
        (start(steps=3), "invalid_value", "steps=3"),
        (start(model="wan"), "model_not_found", "model='wan': this server's is 'shapes'"),
        (start(format="gif"), "invalid_value", "format='gif': must be one of m4s, jpeg, rgb24"),
        (start(fps=24), "invalid_value", "fps=24.0: this server's is 12.0"),
        (start(fps="12"), "invalid_value", "fps='12'"),
        ('{"type": "session.start", "prompt": "a", "fps": 1e999}', "invalid_value", "finite"),
        (start(width=64), "invalid_value", "width=64: this server's is 48"),
        (start(height=-64), "invalid_value", "height=-64: this server's is 64"),
        (start(num_frames=0), "invalid_value", "num_frames=0"),
        (start(num_frames=10**300), "invalid_value", "301 digits"),
        (start(num_frames=True), "invalid_value", "num_frames=True"),
        (start(seed=-1), "invalid_value", "seed=-1"),
        (start(seed=2**64), "invalid_value", "seed=18446744073709551616"),
        (start(confidence_threshold=-0.1), "invalid_value", "confidence_threshold=-0.1"),
        (start(confidence_threshold=1.5), "invalid_value", "confidence_threshold=1.5"),
        (start(min_steps=0), "invalid_value", "min_steps=0"),
        (interaction({}), "invalid_value", "must hold a prompt"),
        (interaction({"prompt": ""}), "invalid_value", "empty"),
        (interaction({"prompt": "a"}, transition_chunks=-1), "invalid_value", "greater than or equal to 0"),
        (interaction({"prompt": "a"}, transition_chunks=1001), "invalid_value", "transition_chunks=1001"),
        (interaction({"confidence_threshold": 0.5}, transition_chunks=3), "invalid_value", "give one, or 0"),
        (interaction({"prompt": "a"}, event_id=""), "invalid_value", "event_id=''"),
        (interaction({"confidence_threshold": 2}), "invalid_value", "confidence_threshold=2"),
        (interaction("a"), "invalid_value", "interaction.event='a'"),
    ],
)
def test_what_cannot_be_had_is_refused_in_words(text, code, words):
    with pytest.raises(Invalid) as refused:
        checked(text)
    assert refused.value.code == code and words in str(refused.value)


def test_an_error_names_the_interaction_that_it_answers():
    for wrong in ({"confidence_threshold": 7}, {"prompt": " "}, {}):
        with pytest.raises(Invalid) as refused:
            checked(interaction(wrong, event_id="e7"))
        assert refused.value.event_id == "e7"
    with pytest.raises(Invalid) as refused:
        checked(interaction({"prompt": "a"}, event_id="e" * 129))
    assert refused.value.event_id is None


def test_an_error_is_short_whatever_was_said():
    for huge in ("x" * 10_000, 10**4000, ["x" * 1000] * 1000, {"a" * 5000: 1}):
        for field in ("prompt", "seed", "unknown" * 200):
            with pytest.raises(Invalid) as refused:
                checked(start(**{field: huge}))
            assert len(str(refused.value)) < 400


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(realtime_schemas.TYPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*Start.model_fields, "interaction", "event", "event_id", "transition_chunks"])


@given(st.dictionaries(fields, values, max_size=5) | values | st.text())
def test_anything_is_either_understood_or_refused(said):
    text = said if isinstance(said, str) else json.dumps(said)
    try:
        checked(text)
    except Invalid as refused:
        json.dumps({"code": refused.code, "message": str(refused), "event_id": refused.event_id}).encode()


def test_what_the_server_says_has_no_nan():
    said = realtime_schemas.Milliseconds(denoise=float("nan"), kv=float("inf"), vae=1.0, encode=0.0)
    assert json.loads(said.text()) == {"denoise": None, "kv": None, "vae": 1.0, "encode": 0.0}
