"""The HTTP application: models, readiness, errors, the files of the page."""

from __future__ import annotations

from dataclasses import replace

from dsa_engine.serving.http import app as module
from dsa_engine.serving.jobs.store import StorageError, Store
from dsa_engine.serving.types import Overloaded
from tests.support.fake_backend import CARD
from tests.support.serving.http_client import ID, ask, metrics, refused, served


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
    async def full(self, order, *_):
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
    assert answer.headers["allow"] == "GET, HEAD, POST"
    answer = client.put(f"/v1/videos/{ID}")
    refused(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD, DELETE"


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
