"""Jobs over HTTP: from the request to the file."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dsa_engine.media import image
from dsa_engine.media.mp4 import read_mp4, write_mp4
from dsa_engine.media.preprocess import to_video_tensor
from tests.support.fake_backend import CARD, frames_of
from tests.support.serving.http_client import ID, PICTURE, ask, finished, png, refused


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
        ({"step_policy": "relative", "min_steps": 2}, {"steps": "relative", "min_steps": 2, "threshold": None}),
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
    blank, order = seen  # all but the picture is checked first
    assert blank.image.shape == order.image.shape and (order.image == PICTURE).all()
    assert blank.num_frames == order.num_frames == answer.json()["num_frames"] == 13
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


def test_the_loop_is_left_in_peace_by_a_large_picture(fresh, monkeypatch):
    """Decoding is done elsewhere: a request that comes later is answered before."""
    import threading

    seen = []
    real = image.decode
    monkeypatch.setattr(image, "decode", lambda *args: seen.append(threading.current_thread().name) or real(*args))
    assert ask(fresh, input_reference=base64.b64encode(png(PICTURE)).decode()).status_code == 200
    assert len(seen) == 1 and "asyncio" in seen[0]


def test_only_so_many_pictures_are_decoded_at_once(fresh, monkeypatch):
    """Eight requests at a time; a decode ends only when no other can begin any more."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from dsa_engine.serving.jobs.queue import MAX_DECODES

    lock, now, most, full = threading.Lock(), 0, 0, threading.Event()
    real = image.decode

    def counted(*args):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now > MAX_DECODES:
                full.set()
        full.wait(0.2)
        with lock:
            now -= 1
        return real(*args)

    monkeypatch.setattr(image, "decode", counted)
    picture = base64.b64encode(png(PICTURE)).decode()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(fresh, input_reference=picture).status_code, range(8)))
    assert answers == [200] * 8 and most == MAX_DECODES and not full.is_set()


@pytest.mark.parametrize("wrong", [{"prompt": "impossible"}, {"size": "64x64"}, {"num_frames": 12}])
def test_all_else_is_checked_before_a_picture_is_decoded(fresh, monkeypatch, wrong):
    monkeypatch.setattr(image, "decode", lambda *_: pytest.fail("it was decoded"))
    body = {"input_reference": base64.b64encode(png(PICTURE)).decode(), **wrong}
    refused(ask(fresh, **body), 400, next(iter(wrong)))
