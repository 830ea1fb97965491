"""The HTTP application in this process, and what its answers say."""

from __future__ import annotations

import io
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.settings import Settings
from tests.support.fake_backend import CARD, FakeBackend

ID = "video_" + "0" * 32


JSON = {"content-type": "application/json"}


@contextmanager
def served(folder, jobs=True, card=CARD, **options):
    backend = FakeBackend(card)
    app = create_app(backend, Settings(data=folder, **options), jobs=jobs)
    backend.observers.append(app.state.metrics.observe)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        client.backend = backend
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


FORM = "multipart/form-data"


def metrics(client) -> dict:
    """{(name, labels...): value}."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found
