"""Requests that are refused, and in which words."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsa_engine.media import image
from dsa_engine.serving.http.schemas import CreateVideo
from tests.support.serving.http_client import FORM, JSON, PICTURE, ask, png, refused

WRONG = [
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": None}, 422, "prompt"),
    ({"prompt": 5}, 422, "prompt"),
    ({"prompt": ["a"]}, 422, "prompt"),
    ({"prompt": "x" * 5000}, 400, "5000 characters: at most 4096"),
    ({"prompt": "impossible"}, 400, "cannot be made; nearest is 'possible'"),
    ({"num_frames": -3}, 422, "greater than or equal to 1"),
    ({"num_frames": 0}, 422, "num_frames"),
    ({"num_frames": 10**30}, 422, "num_frames"),
    ({"num_frames": 7}, 400, "num_frames=7: must come out as whole chunks; nearest is 6"),
    ({"num_frames": 3000}, 400, "num_frames=3000: at most 1998 are possible; nearest is 1998"),
    ({"num_frames": "12"}, 422, "num_frames"),
    ({"num_frames": 12.5}, 422, "num_frames"),
    ({"num_frames": True}, 422, "num_frames"),
    ({"num_frames": 12, "seconds": 1}, 400, "give one or the other"),
    ({"seconds": -1}, 422, "seconds"),
    ({"seconds": "-1"}, 422, "seconds"),
    ({"seconds": "0"}, 400, "seconds=0: must be above 0; nearest is 0.25"),
    ({"seconds": "four"}, 422, "seconds"),
    ({"seconds": 1000}, 400, "at most 166.5 are possible"),
    ({"fps": 16}, 400, "fps=16: the model makes 12 frames per second; nearest is 12"),
    ({"fps": -12}, 422, "fps"),
    ({"size": "832x480"}, 400, "size='832x480': this server makes videos of the model's own size only: '48x32'"),
    ({"size": "48*32"}, 422, "size"),
    ({"size": "-48x32"}, 422, "size"),
    ({"size": "48x32\n"}, 422, "size"),
    ({"size": [48, 32]}, 422, "size"),
    ({"model": "sora"}, 400, "model='sora': this server has one model: 'instant'"),
    ({"seed": -1}, 422, "seed"),
    ({"seed": 2**64}, 422, "seed"),
    ({"seed": 1.5}, 422, "seed"),
    ({"guidance_scale": 7.5}, 400, "guidance built in"),
    ({"negative_prompt": "blur"}, 400, "guidance built in"),
    ({"reference_url": "http://169.254.169.254/"}, 400, "this server fetches nothing"),
    ({"confidence_threshold": 1.5}, 422, "confidence_threshold"),
    ({"confidence_threshold": -0.1}, 422, "confidence_threshold"),
    ({"step_policy": "budget"}, 400, "nearest is 'dsa'"),
    ({"step_policy": "budget:16fps"}, 400, "nearest is 'dsa'"),
    ({"step_policy": "fixed", "confidence_threshold": 0.5}, 400, "fixed"),
    ({"step_policy": "relative", "confidence_threshold": 0.5}, 400, "no confidence_threshold; nearest is 'dsa'"),
    ({"step_policy": "fixed:2", "min_steps": 1}, 400, "fixed"),
    ({"step_policy": "x" * 65}, 422, "step_policy"),
    ({"min_steps": 0}, 422, "min_steps"),
    ({"num_inference_steps": 0}, 422, "num_inference_steps"),
    ({"input_reference": "not base64!"}, 400, "data URL"),
    ({"input_reference": "data:image/png;base64,AAAA"}, 400, "no image that can be read"),
    ({"input_reference": ""}, 400, "no image that can be read"),
    ({"input_reference": {"image_url": "https://a.example/x.png"}}, 400, "data URL"),
    ({"image": "x"}, 400, "Unknown parameter: 'image'."),
    ({"__proto__": {}}, 400, "__proto__"),
]


@pytest.mark.parametrize("body, status, words", WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_in_words(client, body, status, words):
    error = refused(ask(client, **body), status, words)
    assert error["param"] in (None, *body)


@pytest.mark.parametrize("name", ["num_frames", "seconds", "fps", "guidance_scale", "confidence_threshold", "seed"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_no_number_is_not_a_number(client, name, value):
    body = f'{{"prompt": "possible", "{name}": {value}}}'
    refused(client.post("/v1/videos", content=body, headers=JSON), 422, name)
    form = {"prompt": (None, "possible"), name: (None, value)}
    refused(client.post("/v1/videos", files=form), 422, name)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b', "prompt": "x"}',
        b'{"prompt": "x"} {}',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_broken_json_is_refused(client, body):
    refused(client.post("/v1/videos", content=body, headers=JSON), 422)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "\xff"])
def test_other_kinds_of_content_are_refused(client, kind):
    headers = {"content-type": kind.encode("latin-1")} if kind else {}
    refused(client.post("/v1/videos", content=b'{"prompt": "possible"}', headers=headers), 415, "application/json")


@pytest.mark.parametrize(
    "kind, body, status",
    [
        (FORM, b"", 400),
        (f"{FORM}; boundary=", b"--\r\n", 400),
        (f"{FORM}; boundary=x", b"", 400),
        (f"{FORM}; boundary=x", b"--x--\r\n", 422),
        (f"{FORM}; boundary=x", b"nonsense", 400),
        (f"{FORM}; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhalf', 400),
        (
            f"{FORM}; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\npossible\r\n'
            b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n12',  # of 123, say
            400,
        ),
        (f"{FORM}; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--x--\r\n", 400),
        (f"{FORM}; boundary=x", b"--x\r\n\r\nno disposition\r\n--x--\r\n", 400),
    ],
)
def test_broken_multipart_is_refused(client, kind, body, status):
    refused(client.post("/v1/videos", content=body, headers={"content-type": kind}), status)


@pytest.mark.parametrize(
    "parts, status, words",
    [
        ([("prompt", (None, "a")), ("prompt", (None, "b"))], 400, "more than once"),
        ([("prompt", ("p.txt", b"a"))], 400, "must be text"),
        ([("prompt", (None, "a")), ("video", ("v.mp4", b"a"))], 400, "must be text"),
        ([("prompt", (None, "a")), ("nonsense", (None, "1"))], 400, "nonsense"),
        ([("prompt", (None, ""))], 422, "prompt"),
        ([("prompt", (None, "a")), ("num_frames", (None, "-3"))], 422, "num_frames"),
        ([("prompt", (None, "a")), ("num_frames", (None, "7"))], 400, "nearest is 6"),
        ([("prompt", (None, "a")), ("input_reference", ("x", b""))], 400, "no image"),
        ([("prompt", (None, "a"))] + [("input_reference", ("x", png(PICTURE)))] * 2, 400, "files"),
        ([(f"f{i}", (None, "1")) for i in range(80)], 400, "fields"),
    ],
)
def test_wrong_forms_are_refused(client, parts, status, words):
    refused(client.post("/v1/videos", files=parts), status, words)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large, with all of its lines."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(b"\0" * min(height * (1 + (width + 7) // 8), 10**7), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4097, 4096), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_not_unpacked(client, size, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was unpacked"))
    files = {"input_reference": ("x.png", bomb(*size))}
    refused(client.post("/v1/videos", data={"prompt": "possible"}, files=files), 400, "input_reference: ")


@given(data=st.binary(max_size=200), cut=st.integers(0, 5000), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", ""]))
def test_no_bytes_make_the_decoder_fail_otherwise(data, cut, kind):
    whole = png(PICTURE, kind) if kind else b""
    at = cut % (len(whole) + 1)
    try:
        got = image.decode(whole[:at] + data + whole[at + len(data) :], 32, 48)
    except ValueError as error:
        assert str(error).startswith("input_reference: ")
    else:
        assert got.shape == (32, 48, 3) and got.dtype == np.uint8


@settings(max_examples=60)
@given(
    body=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from([*CreateVideo.model_fields, "x"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                max_leaves=4,
            ),
            max_size=6,
        ).map(lambda body: json.dumps({"prompt": "possible"} | body).encode()),
    )
)
def test_no_json_makes_the_server_fail(client, body):
    answer = client.post("/v1/videos", content=body, headers=JSON)
    if answer.status_code != 200:
        refused(answer, answer.status_code)
        assert answer.status_code in (400, 422)
