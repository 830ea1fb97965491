"""Who may use the HTTP application."""

from __future__ import annotations

import pytest

from tests.support.serving.http_client import ID, ask, refused, served


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
        own = {"origin": "http://127.0.0.1"}
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
