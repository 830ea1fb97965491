"""What OpenAI's and vLLM-Omni's clients send, and what they get."""

from __future__ import annotations

import base64

import pytest

from dsa_engine.serving.http import realtime_schemas
from tests.support.fake_backend import CARD
from tests.support.serving.http_client import FORM, ID, PICTURE, ask, finished, png, refused, served

START = {"type": "session.start", "prompt": "possible"}


def orders(client) -> list:
    seen, check = [], client.backend.check

    async def watched(order):
        seen.append(order)
        await check(order)

    client.backend.check = watched
    return seen


def test_a_remix_is_another_prompt_on_the_same_seed_and_settings(fresh):
    seen = orders(fresh)
    text = base64.b64encode(png(PICTURE)).decode()
    first = ask(fresh, seed=7, num_frames=7, max_steps=3, input_reference=text).json()
    again = fresh.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "another"})
    assert again.status_code == 200 and again.json()["id"] != first["id"]
    assert (again.json()["prompt"], again.json()["seed"], again.json()["num_frames"]) == ("another", 7, 7)
    assert (seen[-1].image == PICTURE).all() and (seen[-1].prompt, seen[-1].max_steps) == ("another", 3)
    assert finished(fresh, again.json()["id"])["status"] == "completed"
    refused(fresh.post(f"/v1/videos/{ID}/remix", json={"prompt": "x"}), 404, ID)
    refused(fresh.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "impossible"}), 400, "nearest is 'possible'")


@pytest.mark.parametrize("form", [False, True])
def test_a_picture_as_the_sdks_send_it(fresh, form):
    seen = orders(fresh)
    text = base64.encodebytes(png(PICTURE)).decode()  # in lines
    assert "\n" in text.strip()
    url = f"data:image/png;base64,{text}"
    if form:
        fields = {"prompt": (None, "possible"), "input_reference[image_url]": (None, url), "seed": (None, "")}
        answer = fresh.post("/v1/videos", files=fields)
    else:
        answer = ask(fresh, input_reference={"image_url": url}, negative_prompt="")
    assert answer.status_code == 200, answer.text
    assert (seen[-1].image == PICTURE).all() and seen[-1].seed == 0


def test_a_quoted_boundary_may_hold_anything(fresh):
    body = b'--a b;c\r\nContent-Disposition: form-data; name="prompt"\r\n\r\npossible\r\n--a b;c--\r\n'
    answer = fresh.post("/v1/videos", content=body, headers={"content-type": f'{FORM}; boundary="a b;c"'})
    assert answer.status_code == 200 and answer.json()["prompt"] == "possible"


def test_a_model_by_its_name(client):
    assert client.get(f"/v1/models/{CARD.name}").json()["id"] == CARD.name
    refused(client.get("/v1/models/sora"), 404, "'sora'", CARD.name)


@pytest.mark.parametrize("id", ["video_1", "x", ID.upper()])
def test_what_is_no_id_is_not_found(client, id):
    refused(client.get(f"/v1/videos/{id}"), 404, id)


def test_an_unknown_parameter_is_said_as_openai_does(client):
    error = refused(ask(client, quality="high"), 400, "Unknown parameter: 'quality'.")
    assert (error["code"], error["param"]) == ("unknown_parameter", "quality")


def test_a_video_has_the_fields_of_openais(fresh):
    assert ask(fresh).json()["expires_at"] is None


def test_one_address_does_not_fill_the_queue(tmp_path):
    with served(tmp_path, max_client_jobs=2) as client:
        client.backend.door.clear()
        client.backend.most = 1
        ids = [ask(client).json()["id"]]
        while client.get(f"/v1/videos/{ids[0]}").json()["status"] == "queued":
            pass
        ids += [ask(client).json()["id"] for _ in range(2)]
        refused(ask(client), 429, "2 jobs of this address")
        assert client.delete(f"/v1/videos/{ids[2]}").status_code == 200
        assert ask(client).status_code == 200
        client.backend.door.set()


@pytest.mark.parametrize(
    "given",
    [
        {"guidance_scale": 1.0, "extra_params": {}, "sampling_params": {}, "negative_prompt": None, "user": "u"},
        {"guidance_scale": 1, "negative_prompt": "", "size": f"{CARD.width}x{CARD.height}", "seed": 0.0},
        {"width": float(CARD.width), "height": None, "seed": None, "format": None, "max_steps": None},
    ],
)
def test_neutral_values_are_as_if_left_out(given):
    import json

    start = realtime_schemas.parse(json.dumps(START | given))
    realtime_schemas.check(start, CARD, 100)
    assert start.to_request() == realtime_schemas.parse(json.dumps(START)).to_request()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"guidance_scale": 7.5}, "guidance_scale=7.5"),
        ({"negative_prompt": "blur"}, "negative_prompt='blur'"),
        ({"extra_params": {"cache": 1}}, "'cache'"),
        ({"size": "1x1"}, f"'{CARD.width}x{CARD.height}'"),
    ],
)
def test_others_are_refused_with_what_is_possible(given, words):
    start = realtime_schemas.Start(**START | given)
    with pytest.raises(realtime_schemas.Invalid, match=words):
        realtime_schemas.check(start, CARD, 100)


def test_steps_by_either_name():
    start = realtime_schemas.Start(**START, num_inference_steps=3.0, max_steps=4)
    assert start.to_request().max_steps == 3
