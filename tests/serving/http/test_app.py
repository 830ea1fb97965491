"""The HTTP application in this process: what it takes, what it refuses and in which words, and who may ask."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from dsa_engine.engine.session import Chunk
from dsa_engine.media import image
from dsa_engine.media.mp4 import read_mp4, write_mp4
from dsa_engine.media.preprocess import to_video_tensor
from dsa_engine.serving.http import app as module
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.http.schemas import CreateVideo
from dsa_engine.serving.jobs.store import StorageError, Store
from dsa_engine.serving.settings import Settings
from dsa_engine.serving.types import ChunkReady, Closed, Overloaded, StreamRequest
from tests.support.instant import CARD, TIMINGS, Instant, frames_of

ID = "video_" + "0" * 32
JSON = {"content-type": "application/json"}


@contextmanager
def served(folder, jobs=True, card=CARD, **options):
    backend = Instant()
    backend.card = card
    app = create_app(backend, Settings(data=folder, **options), jobs=jobs)
    backend.observers.append(app.state.metrics.observe)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.backend = backend
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data"), max_body=300_000) as client:
        yield client


@pytest.fixture
def fresh(tmp_path):
    with served(tmp_path / "data") as client:
        yield client


def ask(client, **body):
    return client.post("/v1/videos", json={"prompt": "possible", **body})


def finished(client, id: str) -> dict:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        video = client.get(f"/v1/videos/{id}").json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.01)
    raise AssertionError(f"still {video}")


def refused(response, status: int, *words: str) -> dict:
    """The error of an answer that must be a clear refusal."""
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    for word in words:
        assert word in error["message"], error
    assert len(error["message"]) < 2000
    return error


def png(array: np.ndarray, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


PICTURE = np.random.default_rng(1).integers(0, 256, (CARD.height, CARD.width, 3), dtype=np.uint8)


# What it makes.


def test_a_job_from_its_order_to_its_file(fresh, tmp_path):
    video = ask(fresh, seed=5, seconds="1").json()
    assert video["object"] == "video" and video["status"] in ("queued", "in_progress", "completed")
    assert (video["size"], video["seconds"], video["num_frames"], video["seed"]) == ("48x32", "1", 12, 5)
    done = finished(fresh, video["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["steps_per_chunk"] == [2] * 4 and done["confidence"] == [[0.5, 0.25, 0.75]] * 4
    assert done["completed_at"] >= done["created_at"] > 1.7e9
    content = fresh.get(done["url"])
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "got.mp4").write_bytes(content.content)
    write_mp4(tmp_path / "expected.mp4", frames_of(5, 12), CARD.fps)
    assert (read_mp4(tmp_path / "got.mp4")[0] == read_mp4(tmp_path / "expected.mp4")[0]).all()
    part = fresh.get(done["url"], headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    gone = fresh.delete(f"/v1/videos/{video['id']}")
    assert gone.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    for path in ("", "/content"):
        refused(fresh.get(f"/v1/videos/{video['id']}{path}"), 404, video["id"])
    refused(fresh.delete(f"/v1/videos/{video['id']}"), 404, video["id"])


def orders(client):
    """The orders that come to the backend while the block runs."""
    seen = []
    check = client.backend.check

    async def watched(order):
        seen.append(order)
        await check(order)

    client.backend.check = watched
    return seen


@pytest.mark.parametrize(
    "body, expected",
    [
        ({}, {"num_frames": 12, "seed": 0, "steps": None}),
        ({"seconds": 0.01}, {"num_frames": 3}),
        ({"seconds": "1.4"}, {"num_frames": 18}),
        ({"seconds": 2}, {"num_frames": 24}),
        ({"num_frames": 6.0, "seed": 5.0}, {"num_frames": 6, "seed": 5}),
        ({"num_frames": 6, "fps": 12, "size": "48x32", "model": "instant", "guidance_scale": 1}, {"num_frames": 6}),
        ({"num_inference_steps": 3}, {"max_steps": 3}),
        ({"num_inference_steps": 3, "max_steps": 2}, {"max_steps": 2}),
        ({"num_inference_steps": 1, "max_steps": 2}, {"max_steps": 1}),
        (
            {"step_policy": "dsa", "min_steps": 2, "confidence_threshold": 0.25},
            {"steps": "dsa", "min_steps": 2, "threshold": 0.25},
        ),
        ({"step_policy": "fixed", "num_inference_steps": 2}, {"steps": "fixed", "max_steps": 2}),
        ({"seed": 2**64 - 1, "negative_prompt": None}, {"seed": 2**64 - 1}),
    ],
)
def test_what_is_asked_for_is_what_is_ordered(fresh, body, expected):
    seen = orders(fresh)
    assert ask(fresh, **body).status_code == 200
    form = {"prompt": "possible"} | {name: str(value) for name, value in body.items() if value is not None}
    assert fresh.post("/v1/videos", files={name: (None, value) for name, value in form.items()}).status_code == 200
    first, second = seen
    assert first == second
    assert {name: getattr(first, name) for name in expected} == expected
    assert (first.live, first.height, first.width) == (False, 32, 48)


@pytest.mark.parametrize("kind", ["file", "data URL", "base64", "field"])
def test_a_picture_to_begin_with(fresh, kind):
    seen = orders(fresh)
    text = base64.b64encode(png(PICTURE)).decode()
    url = f"data:image/png;base64,{text}"
    if kind == "file":
        files = {"input_reference": ("../../etc/passwd", png(PICTURE), "text/html")}
        answer = fresh.post("/v1/videos", data={"prompt": "possible"}, files=files)
    elif kind == "field":
        answer = fresh.post("/v1/videos", files={"prompt": (None, "possible"), "input_reference": (None, url)})
    else:
        answer = ask(fresh, input_reference=url if kind == "data URL" else text)
    assert answer.status_code == 200, answer.text
    assert (seen[0].image == PICTURE).all() and seen[0].num_frames == answer.json()["num_frames"] == 13
    done = finished(fresh, answer.json()["id"])
    assert done["status"] == "completed" and len(fresh.get(done["url"]).content) > 500


@pytest.mark.parametrize("kind, size", [("PNG", (100, 90)), ("JPEG", (64, 96)), ("WEBP", (20, 30)), ("BMP", (1, 1))])
def test_a_picture_of_another_size_is_scaled_and_cut(kind, size):
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = png(array, kind)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    expected = to_video_tensor("x", decoded, 1, (32, 48))[0, 0].movedim(0, -1).numpy()
    got = image.decode(data, 32, 48)
    assert got.dtype == np.uint8 and got.shape == (32, 48, 3)
    assert np.abs(got / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_a_turned_picture_is_turned_back():
    array = np.zeros((40, 20, 3), np.uint8)
    array[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    got = image.decode(file.getvalue(), 40, 20)
    assert got[:20].max() == 0 and got[20:].min() == 255


def test_pages_of_the_list(fresh):
    ids = [ask(fresh, num_frames=3).json()["id"] for _ in range(5)]
    for id in ids:
        finished(fresh, id)
    first = fresh.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", ids[4], ids[3], True)
    rest = fresh.get("/v1/videos", params={"after": ids[3]}).json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1] and not rest["has_more"]
    rising = fresh.get("/v1/videos", params={"order": "asc", "after": ids[0], "limit": 3}).json()
    assert [video["id"] for video in rising["data"]] == ids[1:4] and rising["has_more"]
    refused(fresh.get("/v1/videos", params={"after": ID}), 404, ID)
    assert fresh.get("/v1/videos", params={"after": ids[0]}).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_the_content_of_what_is_not_there_yet(fresh):
    fresh.backend.go.clear()
    id = ask(fresh).json()["id"]
    refused(fresh.get(f"/v1/videos/{id}/content"), 409, "until it is completed")
    fresh.backend.go.set()
    finished(fresh, id)
    refused(fresh.get(f"/v1/videos/{id}/content", params={"variant": "thumbnail"}), 422, "variant")
    fresh.app.state.service.jobs.store.video(id).unlink()
    refused(fresh.get(f"/v1/videos/{id}/content"), 404, "gone")


def test_a_job_that_failed_says_why(fresh):
    fresh.backend.faults = {(3, 1)}
    video = finished(fresh, ask(fresh, seed=3).json()["id"])
    assert video["status"] == "failed" and video["url"] is None
    assert video["error"] == {"code": "generation_failed", "message": "the engine broke"}


# What it refuses.

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
    ({"negative_prompt": ""}, 400, "guidance built in"),
    ({"reference_url": "http://169.254.169.254/"}, 400, "this server fetches nothing"),
    ({"confidence_threshold": 1.5}, 422, "confidence_threshold"),
    ({"confidence_threshold": -0.1}, 422, "confidence_threshold"),
    ({"step_policy": "budget"}, 400, "nearest is 'dsa'"),
    ({"step_policy": "budget:16fps"}, 400, "nearest is 'dsa'"),
    ({"step_policy": "fixed", "confidence_threshold": 0.5}, 400, "fixed"),
    ({"step_policy": "fixed:2", "min_steps": 1}, 400, "fixed"),
    ({"step_policy": "x" * 65}, 422, "step_policy"),
    ({"min_steps": 0}, 422, "min_steps"),
    ({"num_inference_steps": 0}, 422, "num_inference_steps"),
    ({"input_reference": "not base64!"}, 400, "data URL"),
    ({"input_reference": "data:image/png;base64,AAAA"}, 400, "no image that can be read"),
    ({"input_reference": ""}, 400, "no image that can be read"),
    ({"image": "x"}, 422, "image"),
    ({"__proto__": {}}, 422, "__proto__"),
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


FORM = "multipart/form-data"


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
        ([("prompt", (None, "a")), ("nonsense", (None, "1"))], 422, "nonsense"),
        ([("prompt", (None, "a")), ("seed", (None, ""))], 422, "seed"),
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


# How much it takes.


def pieces(data: bytes):
    """Sent without a Content-Length."""
    for start in range(0, len(data), 50_000):
        yield data[start : start + 50_000]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["application/json", f"{FORM}; boundary=x", "text/plain"])
def test_a_body_that_is_too_large(client, chunked, kind):
    data = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' if "x" in kind[-1:] else b'{"prompt": "'
    data += b"a" * 1_000_000
    content = pieces(data) if chunked else data
    answer = client.post("/v1/videos", content=content, headers={"content-type": kind})
    if kind == "text/plain":  # refused before a byte of it is read
        refused(answer, 415)
    else:
        refused(answer, 413, "larger than 300000 bytes")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_prompt_of_a_megabyte_within_the_limit_of_the_body(tmp_path, chunked):
    with served(tmp_path) as client:
        data = json.dumps({"prompt": "a" * 2**20}).encode()
        answer = client.post("/v1/videos", content=pieces(data) if chunked else data, headers=JSON)
        refused(answer, 400, "prompt of 1048576 characters: at most 4096")


def handed(app, method: str, path: bytes, headers=(), body: bytes = b"", parts: int = 1) -> tuple[int, bytes, int]:
    """What an app answers when it is called as a server calls it, with nothing put right by a client; and how many
    parts of the body it asked for."""
    scope = {
        "type": "http",
        "method": method,
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": b"",
        "headers": list(headers),
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "server": ("localhost", 80),
        "client": ("localhost", 9),
    }
    asked, sent = 0, []

    async def receive():
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": body, "more_body": asked < parts}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), asked


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    app = create_app(Instant(), Settings(data=tmp_path_factory.mktemp("bare"), max_body=1000))
    yield app
    app.state.service.jobs.store.close()


@pytest.mark.parametrize("length, parts", [(b"10", 3), (b"1000", 3), (b"1001", 0), (b"9" * 40, 0), (None, 3)])
def test_a_body_is_not_read_on_whatever_its_length_is_said_to_be(bare, length, parts):
    headers = [(b"content-type", b"application/json")] + ([] if length is None else [(b"content-length", length)])
    status, _, asked = handed(bare, "POST", b"/v1/videos", headers, b"a" * 400, parts=9)
    assert (status, asked) == (413, parts)


TRICKS = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/jobs.sqlite",
    "video_",
    ID[:-1],
    ID.upper(),
    ID + "0",
    ID + "%00",
    ID + "%0a",
    ID + ".mp4",
    "..",
    ".",
    "%",
    "%ff%fe",
    ID + "/../../jobs.sqlite",
    "~",
    "\\..\\..",
]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("end", ["", "/content"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_path_tricks_in_ids(bare, trick, end, method):
    status, body, _ = handed(bare, method, f"/v1/videos/{trick}{end}".encode())
    assert status in (404, 405, 422)
    assert set(json.loads(body)["error"]) == {"message", "type", "code", "param"}


# Who may ask.


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic secret", "secret", "Bearer sécret", "Bearer secret x"]
)
def test_a_token_is_asked_for(tmp_path, header):
    with served(tmp_path, token="secret") as client:
        headers = {} if header is None else {"authorization": header.encode()}
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/videos"),
            ("POST", "/v1/videos"),
            ("GET", f"/v1/videos/{ID}"),
            ("DELETE", f"/v1/videos/{ID}"),
            ("GET", f"/v1/videos/{ID}/content"),
            ("GET", "/metrics"),
        ):
            answer = client.request(method, path, headers=headers)
            refused(answer, 401, "bearer token")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/readyz"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("token", ["secret", "sécret ☃ with spaces"])
def test_the_token_opens(tmp_path, token):
    with served(tmp_path, token=token) as client:
        assert client.get("/v1/models", headers={"authorization": f"Bearer {token}".encode()}).status_code == 200


def test_tokens_are_compared_in_constant_time(tmp_path, monkeypatch):
    compared = []

    def digest(a, b):
        compared.append((a, b))
        return False

    monkeypatch.setattr("hmac.compare_digest", digest)
    with served(tmp_path, token="secret") as client:
        refused(client.get("/v1/models", headers={"authorization": "Bearer secret"}), 401)
    assert compared == [(b"secret", b"secret")]


def test_no_other_page_may_use_it_unless_it_is_named(tmp_path):
    other, named = {"origin": "https://evil.example"}, {"origin": "https://good.example"}
    with served(tmp_path / "a") as client:
        for headers in (other, named, {"origin": "null"}):
            answer = client.post("/v1/videos", files={"prompt": (None, "possible")}, headers=headers)
            refused(answer, 403, "another host")
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert client.options("/v1/videos", headers=headers).status_code == 405
        assert ask(client).status_code == 200  # no browser
        own = {"origin": "http://testserver"}
        assert client.post("/v1/videos", json={"prompt": "possible"}, headers=own).status_code == 200
    with served(tmp_path / "b", origins=("https://good.example",)) as client:
        refused(client.get("/v1/models", headers=other), 403, "evil")
        answer = client.get("/v1/models", headers=named)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        preflight = {**named, "access-control-request-method": "DELETE"}
        assert "DELETE" in client.options("/v1/videos", headers=preflight).headers["access-control-allow-methods"]
        preflight["origin"] = "https://evil.example"
        assert "access-control-allow-origin" not in client.options("/v1/videos", headers=preflight).headers


# What those who run it see.


def metrics(client) -> dict:
    """{(name, labels...): value}."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_metrics_of_jobs(fresh):
    before = metrics(fresh)
    assert before[("dsa_pressure",)] == 0.25 and before[("dsa_jobs", "completed")] == 0
    fresh.backend.faults = {(2, 0)}
    for seed in (1, 2):
        finished(fresh, ask(fresh, seed=seed).json()["id"])
    after = metrics(fresh)
    assert after[("dsa_jobs", "completed")] == after[("dsa_jobs", "failed")] == 1
    assert after[("dsa_frames_total", "job")] == 12 and after[("dsa_fps",)] == pytest.approx(1.2)
    assert after[("dsa_steps_count", "job")] == 4 and after[("dsa_steps_bucket", "job", "1.0")] == 0
    assert after[("dsa_steps_bucket", "job", "2.0")] == 4
    assert after[("dsa_chunk_seconds_sum", "denoise")] == pytest.approx(4 * TIMINGS["denoise"] / 1e3)
    assert after[("dsa_chunk_seconds_sum", "kv")] == pytest.approx(4 * TIMINGS["commit"] / 1e3)
    assert after[("dsa_chunk_seconds_count", "vae")] == 4
    assert after[("dsa_streams_closed_total", "job", "done")] == 1
    assert after[("dsa_streams_closed_total", "job", "failed")] == 1
    assert after[("dsa_chunk_latency_seconds_count",)] == 0


def test_metrics_of_live_streams(fresh):
    class Task:
        request = StreamRequest("possible")

    told = fresh.app.state.metrics
    frames = np.zeros((3, 32, 48, 3), np.uint8)
    for latency, deadline in ((0.2, 0.5), (0.7, 0.5), (9.0, None)):
        told.observe(Task(), ChunkReady(Chunk(0, frames, None, 3, None, 0.0, TIMINGS, None), latency, deadline, 0.375))
    told.observe(Task(), Closed("idle"))
    told.phase("encode", 0.004)
    found = metrics(fresh)
    assert found[("dsa_deadline_misses_total",)] == 1
    assert found[("dsa_chunk_latency_seconds_bucket", "0.2")] == 1
    assert found[("dsa_chunk_latency_seconds_sum",)] == pytest.approx(9.9)
    assert found[("dsa_threshold",)] == 0.375
    assert found[("dsa_streams_closed_total", "live", "idle")] == 1
    assert found[("dsa_chunk_seconds_bucket", "0.005", "encode")] == 1


def test_two_apps_do_not_share_numbers(tmp_path):
    with served(tmp_path / "a") as a, served(tmp_path / "b") as b:
        finished(a, ask(a).json()["id"])
        assert metrics(a)[("dsa_jobs", "completed")] == 1 and metrics(b)[("dsa_jobs", "completed")] == 0
        assert ("dsa_frames_total", "job") not in metrics(b)


def test_models_say_what_can_be_asked_for(tmp_path):
    with served(tmp_path, card=replace(CARD, prompts="a <red|green> <circle>")) as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["size"], model["fps"], model["max_steps"]) == ("instant", "48x32", 12.0, 4)
    assert (model["presets"], model["prompts"]) == ({"fast": 0.3}, "a <red|green> <circle>")


def test_without_jobs_there_are_none(tmp_path):
    with served(tmp_path / "data", jobs=False) as client:
        refused(ask(client), 404)
        assert client.get("/v1/models").status_code == 200 and ("dsa_jobs", "queued") not in metrics(client)
    assert not (tmp_path / "data").exists()


def test_a_stopping_server_says_so(fresh):
    assert fresh.get("/readyz").json() == {"status": "ready"}
    fresh.app.state.service.stopping = True
    fresh.app.state.service.jobs.stop()
    answer = fresh.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "stopping"})
    assert fresh.get("/health").status_code == 200
    answer = ask(fresh)
    assert refused(answer, 503, "stopping")["code"] == "stopping" and answer.headers["retry-after"] == "1"


def test_too_many_jobs_are_told_to_come_again(fresh, monkeypatch):
    async def full(self, order):
        raise Overloaded("7 jobs are queued")

    monkeypatch.setattr("dsa_engine.serving.jobs.queue.Jobs.add", full)
    assert refused(ask(fresh), 429, "7 jobs")["code"] == "busy"


def test_a_full_disk_is_said_without_its_paths(fresh, monkeypatch):
    def full(*_, **__):
        raise StorageError(f"{fresh.app.state.settings.data}: database or disk is full")

    monkeypatch.setattr(Store, "add", full)
    error = refused(ask(fresh), 507, "disk is full")
    assert str(fresh.app.state.settings.data) not in error["message"]


def test_a_mistake_of_the_server_says_nothing_of_its_inside(fresh, monkeypatch):
    for mistake in (KeyError("secret"), ValueError("secret"), OSError("secret")):

        def broken(*_, mistake=mistake):
            raise mistake

        monkeypatch.setattr(Store, "page", broken)
        answer = fresh.get("/v1/videos")
        refused(answer, 500)
        assert "secret" not in answer.text


def test_what_there_is_not_is_not_found_in_our_form(client):
    for path in (
        "/v1",
        "/v1/nothing",
        "/index.php",
        "/..%2fapp.py",
        "/%2e%2e/app.py",
        "/page/",
        "/app.py",
        "/.git/config",
    ):
        refused(client.get(path), 404)
        refused(client.post(path), 404)
    answer = client.put("/v1/videos")
    refused(answer, 405)
    assert answer.headers["allow"] == "GET, POST"
    answer = client.put(f"/v1/videos/{ID}")
    refused(answer, 405)
    assert answer.headers["allow"] == "GET, DELETE"


def test_every_file_of_the_page_has_its_address(tmp_path, monkeypatch):
    folder = tmp_path / "page"
    (folder / "parts").mkdir(parents=True)
    (folder / "index.html").write_text("<title>x</title>")
    (folder / "parts" / "bars.js").write_text("export {}")
    monkeypatch.setattr(module, "PAGE", folder)
    with served(tmp_path / "data", token="secret") as client:  # a page can be read by all; what it does cannot
        for path in ("/", "/index.html"):
            answer = client.get(path)
            assert answer.text == "<title>x</title>" and answer.headers["content-type"].startswith("text/html")
        assert client.get("/parts/bars.js").headers["content-type"].startswith("text/javascript")
        refused(client.get("/parts"), 404)


def test_the_loop_is_left_in_peace_by_a_large_picture(fresh, monkeypatch):
    """Decoding is done elsewhere: a request that comes later is answered before."""
    import threading

    seen = []
    real = image.decode
    monkeypatch.setattr(image, "decode", lambda *args: seen.append(threading.current_thread().name) or real(*args))
    assert ask(fresh, input_reference=base64.b64encode(png(PICTURE)).decode()).status_code == 200
    assert len(seen) == 1 and "asyncio" in seen[0]
