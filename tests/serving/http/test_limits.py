"""How much of a request is read, and which paths lead nowhere."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import unquote_to_bytes

import pytest

from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.settings import Settings
from tests.support.fake_backend import FakeBackend
from tests.support.serving.http_client import FORM, ID, JSON, refused, served


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
    app = create_app(FakeBackend(), Settings(data=tmp_path_factory.mktemp("bare"), max_body=1000))
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
