"""What a server exposes: its names, its token in logs and addresses, connections that send no whole request."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn
from websockets.exceptions import InvalidStatus

from dsa_engine.serving.http import auth, protocol, realtime
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.http.requests import BodyLimit
from dsa_engine.serving.server import SHUTDOWN_TIMEOUT_S
from dsa_engine.serving.settings import Settings
from tests.support.fake_backend import FakeBackend
from tests.support.live_server import PATIENCE, until
from tests.support.serving.http_client import ID, ask, refused, served
from tests.support.serving.realtime_client import Client

TOKEN = "s3cret+ü/ & more"
FOREIGN = {"host": "rebound.example:8000", "origin": "http://rebound.example:8000"}


@contextmanager
def live(folder, **options):
    """host:port of a whole server in a thread, with the protocol and limits of `server.run`."""
    settings = Settings(data=folder, **options)
    app = create_app(FakeBackend(), settings)
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol.limited(settings.header_timeout),
        h11_max_incomplete_event_size=settings.max_header,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        log_config=None,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos"),
        ("DELETE", f"/v1/videos/{ID}"),
        ("GET", f"/v1/videos/{ID}/content"),
        ("GET", "/metrics"),
    ],
)
def test_a_foreign_name_is_refused_without_a_token(client, method, path):
    answer = client.request(method, path, headers=FOREIGN)
    refused(answer, 403, "rebound.example:8000", "--origin http://rebound.example:8000")


def test_a_foreign_name_with_a_token_or_named(tmp_path):
    headers = {**FOREIGN, "authorization": "Bearer secret"}
    with served(tmp_path / "a", token="secret") as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
    with served(tmp_path / "b", origins=("http://rebound.example:8000/",)) as client:
        assert client.get("/v1/models", headers=FOREIGN).status_code == 200
    with served(tmp_path / "c", host="0.0.0.0") as client:
        assert client.get("/v1/models", headers={"host": "192.168.1.5:8000"}).status_code == 200
        refused(client.get("/v1/models", headers=FOREIGN), 403)
        assert client.get("/readyz", headers=FOREIGN).status_code == 200  # a supervisor may use any name


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "video.example:443", "origin": "https://video.example"}, 200),
        ({"host": "Video.example", "origin": "https://VIDEO.example"}, 200),
        ({"host": "127.0.0.1:8000", "x-forwarded-host": "video.example", "origin": "https://video.example"}, 200),
        (
            {"host": "127.0.0.1:8000", "x-forwarded-host": "video.example, inner", "origin": "https://video.example"},
            200,
        ),
        ({"host": "127.0.0.1:8000", "origin": "https://video.example"}, 403),
        ({"host": "video.example", "origin": "https://evil.example"}, 403),
    ],
)
def test_the_own_page_behind_a_proxy(tmp_path, headers, status):
    with served(tmp_path, token="secret") as client:
        answer = client.get("/v1/models", headers={**headers, "authorization": "Bearer secret"})
    if status == 200:
        assert answer.status_code == 200
    else:
        refused(answer, 403, "another host", f"--origin {headers['origin']} would let it in")


@pytest.mark.parametrize(
    "origins", [("https://friend.example/",), ("friend.example",), ("HTTPS://Friend.Example:443",)]
)
def test_an_origin_in_any_spelling_lets_the_page_in(tmp_path, origins):
    with served(tmp_path, origins=origins) as client:
        answer = client.get("/v1/models", headers={"origin": "https://friend.example"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.168.1.5", "box"])
@pytest.mark.parametrize("token", [None, "secret"])
def test_a_server_for_others_without_a_token_warns(tmp_path, caplog, host, token):
    create_app(FakeBackend(), Settings(data=tmp_path, host=host, token=token), jobs=False)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = token is None and host not in ("127.0.0.1", "::1", "localhost")
    assert [f"listening at {host} without a token" in line for line in warned] == [True] * expected


def forms(token: str) -> set[str]:
    data = token.encode()
    return {token, "s3cret%2B", "s3cret+", base64.urlsafe_b64encode(data).decode().rstrip("=")}


@pytest.mark.parametrize("way", ["subprotocol", "query"])
def test_a_stream_begins_with_the_token_and_no_log_has_it(tmp_path, way):
    """uvicorn logs the address of each WebSocket, here at its most talkative."""
    said = io.StringIO()
    handler, root = logging.StreamHandler(said), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    text = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
    sent = {
        "subprotocol": ("", {"subprotocols": [auth.PROTOCOL, auth.TOKEN_PROTOCOL + text]}),
        "query": ("?token=s3cret%2B%C3%BC%2F+%26+more&x=1", {}),
    }
    query, options = sent[way]
    try:
        with auth.redacted_logs(TOKEN), live(tmp_path, token=TOKEN) as host:
            with Client(host, realtime.PATH + query, **options).start("possible", num_frames=3) as client:
                assert client.rest()[1] == 1000
                assert client.socket.subprotocol == (auth.PROTOCOL if way == "subprotocol" else None)
            with pytest.raises(InvalidStatus):
                Client(host, realtime.PATH + "?token=s3cret%2Bguess")
            logging.getLogger("someone.else").warning("GET /?token=%s", TOKEN)
            try:
                raise ValueError(f"{TOKEN} is wrong")
            except ValueError:
                logging.getLogger("someone.else").exception("failed")
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    lines = said.getvalue()
    assert "WebSocket /v1/realtime/video" in lines and "GET /?token=***" in lines and "*** is wrong" in lines
    assert not [form for form in forms(TOKEN) if form in lines], lines


def test_the_record_factory_is_put_back():
    before = logging.getLogRecordFactory()
    with auth.redacted_logs("x"):
        assert logging.getLogRecordFactory() is not before
    assert logging.getLogRecordFactory() is before


def connected(host: str) -> socket.socket:
    name, port = host.split(":")
    return socket.create_connection((name, int(port)), timeout=PATIENCE)


def ends(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    got = b""
    try:
        while data := connection.recv(65536):
            got += data
    except ConnectionResetError:
        pass
    return got


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"GET /hea"])
def test_a_header_that_does_not_come_whole(tmp_path, sent):
    with live(tmp_path, header_timeout=0.3) as host, connected(host) as client:
        client.sendall(sent)
        assert ends(client) == b""
        with connected(host) as other:  # one that does, and then begins a second one
            other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
            other.sendall(sent or b"GET")
            ends(other)


def test_a_header_beyond_all_measure(tmp_path):
    with live(tmp_path, max_header=20_000) as host, connected(host) as client:
        try:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            for _ in range(200):  # 20 MB, of which the server takes no more than a piece
                client.sendall(b"X-A: " + b"a" * 100_000 + b"\r\n")
        except OSError:
            pass
        assert ends(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
        with connected(host) as other:
            other.sendall(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-A: " + b"a" * 9000 + b"\r\n\r\n"
            )
            assert ends(other).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come(tmp_path):
    with live(tmp_path, body_timeout=0.3) as host, connected(host) as client:
        client.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        answer = ends(client)
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer and b"1 bytes" in answer


def test_a_body_that_comes_slowly_but_steadily_is_taken():
    """Time is given for what has come: at the lowest rate, a second for each 4096 bytes."""
    got = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]

    async def receive():
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"a" * 4096, "more_body": len(got) < 9}

    scope = {"type": "http", "headers": []}
    asyncio.run(BodyLimit(app, 10**6, timeout=0.1)(scope, receive, None))
    assert len(got) == 10  # 0.3 s in all, of 10.1 s


def test_one_address_does_not_take_all_live_places(tmp_path):
    forwarded = {"X-Forwarded-For": "203.0.113.7"}
    with live(tmp_path, max_client_streams=2) as host:
        first, second = (Client(host, additional_headers=forwarded) for _ in range(2))
        with pytest.raises(InvalidStatus) as error:
            Client(host, additional_headers=forwarded)
        assert error.value.response.status_code == 429 and b"2 connections" in error.value.response.body
        with (
            Client(host, additional_headers={"X-Forwarded-For": "203.0.113.8"}),
            Client(host),
            Client(host),
            Client(host),
        ):
            pass
        first.socket.close()
        until(lambda: _lets_in(host, forwarded))
        second.socket.close()


def _lets_in(host, headers) -> bool:
    try:
        with Client(host, additional_headers=headers):
            return True
    except InvalidStatus:
        return False


HEADS = ["/health", "/readyz", "/metrics", "/v1/models", "/v1/videos", "/", "/app.js", "/openapi.json"]


def test_head_is_get_without_a_body(fresh):
    id = ask(fresh, num_frames=3).json()["id"]
    until(lambda: fresh.get(f"/v1/videos/{id}").json()["status"] == "completed")
    for path in (*HEADS, f"/v1/videos/{id}", f"/v1/videos/{id}/content", f"/v1/videos/{ID}"):
        got, head = fresh.get(path), fresh.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert path == f"/v1/videos/{ID}" or head.status_code == 200
        for name in ("content-type", "etag", "accept-ranges", "content-disposition"):
            assert head.headers.get(name) == got.headers.get(name)
        if path != "/metrics":
            assert head.headers.get("content-length") == got.headers.get("content-length")


def test_every_answer_has_an_id(fresh, monkeypatch):
    monkeypatch.setattr("dsa_engine.serving.jobs.store.Store.page", lambda *_: 1 / 0)
    ids = [fresh.get(path).headers["x-request-id"] for path in ("/health", "/nothing", "/v1/videos", "/v1/videos/x")]
    assert len(set(ids)) == 4 and all(id.startswith("req_") for id in ids)
    assert fresh.get("/v1/videos", headers={"x-request-id": "a-b.c_1"}).headers["x-request-id"] == "a-b.c_1"
    assert fresh.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")
