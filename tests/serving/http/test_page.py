"""The page, end to end: a browser, the whole server, a model with random weights."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from dsa_engine import Pipeline, Relative
from dsa_engine.serving.settings import Settings
from tests.support.browser import DESKTOP, PHONE, Page, chromium, missing, served

FIRST, SECOND = "a red circle jumps on navy", "a blue square moves sideways on black"
NO_MSE = "delete window.MediaSource; delete window.ManagedMediaSource;"

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the page needs a browser: {missing()}")


@pytest.fixture(scope="module")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", max_sessions=2)


@pytest.fixture(scope="module")
def server(pipe):
    with served(pipe) as (address, backend):
        yield address, backend


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


def bars(page):
    return page.page.locator("rect.bar").count()


def test_a_stream_from_prompt_to_download(server, browser, tmp_path):
    address, backend = server
    with Page(browser, address) as page:
        page.begin(FIRST)
        page.until("document.getElementById('video').currentTime > 0.3")
        page.chunks(5)
        then = page.page.evaluate("document.getElementById('video').currentTime")
        page.until(f"document.getElementById('video').currentTime > {then + 0.5}")
        assert page.page.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames") > 6
        assert page.page.evaluate("[video.videoWidth, video.videoHeight]") == [64, 64]

        page.say(SECOND)
        page.until("document.getElementById('change').textContent.includes('in force from chunk')")
        k = int(page.text("change").split()[-1])
        page.chunks(k + 3)
        assert page.page.locator("line.switch").count() == 1
        assert SECOND.startswith(page.page.locator("text.prompt").text_content().rstrip("…"))
        (stream,) = backend.worker._live
        assert stream.session.prompt == SECOND

        page.slide(0.93)
        page.until("document.getElementById('lowered').textContent.includes('in force from chunk')")
        assert stream.policy.ceiling == 0.93 and page.text("threshold-value") == "0.93"
        page.until("document.getElementById('fps').textContent !== '–'")
        assert 0 < float(page.text("fps")) < 30 and page.text("first").endswith("s")

        page.page.click("#stop")
        page.until("document.body.dataset.state === 'idle'")
        count = int(page.text("count"))
        assert bars(page) == count == len(page.page.locator("#chart circle").all())
        lines = [float(line.get_attribute("y1")) for line in page.page.locator("line.grid").all()]
        unit = (lines[0] - lines[-1]) / 4  # pixels a step
        for group in page.page.locator("#chart g").all():
            steps = int(group.locator("title").text_content().split(" · ")[1].split()[0])
            assert float(group.locator("rect").get_attribute("height")) == pytest.approx(steps * unit)
        assert not backend.worker._live and not page.page.is_visible("#problem")

        with page.page.expect_download() as download:
            page.page.click("#download")
        download.value.save_as(tmp_path / "seen.mp4")
        assert download.value.suggested_filename == "a-blue-square-moves-sideways-on-black.mp4"
        with av.open(str(tmp_path / "seen.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 3 * count
        assert page.complaints == []
        assert all(url.startswith((address, "blob:", "data:")) for url in page.requests)


def test_a_second_stream_begins_anew(server, browser):
    with Page(browser, server[0]) as page:
        page.begin(FIRST)
        page.chunks(6)
        page.page.click("#stop")
        page.until("document.body.dataset.state === 'idle'")
        page.page.fill("#seed", "7")
        page.say(SECOND)
        page.until("+document.getElementById('count').textContent < 6")
        page.chunks(3)
        page.until("document.getElementById('video').currentTime > 0.2")
        assert bars(page) == int(page.text("count")) and page.complaints == []


def test_chunks_that_are_compared_with_the_one_before(server, browser):
    """Chosen before a stream starts; there is no threshold to move, and none that load lowers."""
    address, backend = server
    with Page(browser, address) as page:
        page.page.wait_for_selector("#go:enabled")
        page.page.select_option("#policy", "relative")
        assert not page.page.is_visible("#threshold")
        page.say(FIRST)
        page.chunks(6)
        assert page.page.is_disabled("#policy") and "under load" not in page.text("lowered")
        (stream,) = backend.worker._live
        assert isinstance(stream.session.policy, Relative)
        page.page.click("#stop")
        page.until("document.body.dataset.state === 'idle'")
        page.page.select_option("#policy", "")
        assert page.page.is_visible("#threshold") and page.complaints == []


@pytest.mark.parametrize("size", [PHONE, {"width": 320, "height": 568}, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits(server, browser, size, scheme):
    options = {"color_scheme": scheme, "has_touch": size is not DESKTOP, "is_mobile": size is not DESKTOP}
    with Page(browser, server[0], size, **options) as page:
        page.begin(FIRST)
        page.chunks(3)
        width = page.page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"]
        for id in (
            "video",
            "prompt",
            "words",
            "go",
            "stop",
            "policy",
            "threshold",
            "chart",
            "fps",
            "behind",
            "download",
            "seed",
        ):
            box = page.page.locator(f"#{id}").bounding_box()
            assert box and box["width"] > 0 and box["x"] >= 0 and box["x"] + box["width"] <= size["width"], id
        assert page.page.locator("#video").bounding_box()["width"] >= min(280, size["width"] - 40)
        unnamed = page.page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button, video, canvas, svg")]
                .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
                .map((e) => e.id)"""
        )
        assert unnamed == [] and page.complaints == []


def test_words_to_tap_make_a_prompt_that_the_model_knows(server, browser):
    with Page(browser, server[0], PHONE, has_touch=True, is_mobile=True) as page:
        page.page.wait_for_selector("#go:enabled")
        for word in ("cyan", "triangle", "moves up and down", "gray"):
            page.page.locator("#words button", has_text=word).tap()
        assert page.page.input_value("#prompt") == "a cyan triangle moves up and down on gray"
        pressed = page.page.locator("#words button[aria-pressed=true]").all_text_contents()
        assert pressed == ["cyan", "triangle", "moves up and down", "gray"]
        page.page.fill("#prompt", "the red circle rests")
        assert page.page.locator("#words button[aria-pressed=true]").all_text_contents() == ["red", "circle", "rests"]
        page.page.tap("#go")
        page.chunks(1)
        assert not page.page.is_visible("#problem")


def test_without_media_source_extensions_pictures_are_shown_and_it_says_so(server, browser):
    with Page(browser, server[0], PHONE, NO_MSE) as page:
        page.begin(FIRST)
        page.chunks(4)
        assert page.page.is_visible("#fallback") and page.page.is_visible("#canvas")
        assert not page.page.is_visible("#video") and not page.page.is_visible("#veil")
        shown = page.page.evaluate("[...canvas.getContext('2d').getImageData(0, 0, 64, 64).data]")
        pixels = np.array(shown).reshape(64, 64, 4)
        assert pixels[..., 3].min() == 255 and pixels[..., :3].std() > 1
        assert page.page.is_disabled("#download") and page.complaints == []


def test_errors_in_words_and_a_way_back(server, browser):
    address, backend = server
    with Page(browser, address) as page:
        page.begin("a dog")
        page.page.wait_for_selector("#problem:not([hidden])")
        assert "a dog" in page.text("problem-words") and not page.page.is_visible("#reconnect")
        page.say(FIRST)
        page.chunks(2)
        assert not page.page.is_visible("#problem")
        page.say("a dog again")
        page.page.wait_for_selector("#problem:not([hidden])")
        assert "refused" in page.text("change")
        before = int(page.text("count"))
        page.chunks(before + 2)  # the stream goes on

        (stream,) = backend.worker._live
        stream.close("lifetime")
        page.page.wait_for_selector("#reconnect:not([hidden])")
        assert "as long as" in page.text("problem-words")
        page.page.fill("#prompt", FIRST)
        page.page.click("#reconnect")
        page.chunks(1)
        assert not page.page.is_visible("#problem") and page.complaints == []


def test_the_place_in_the_queue(pipe, browser):
    with (
        served(pipe, max_sessions=1, max_queue=1) as (address, _),
        Page(browser, address) as first,
        Page(browser, address) as second,
        Page(browser, address) as third,
    ):
        first.begin(FIRST)
        first.chunks(1)
        second.begin(SECOND)
        second.until("document.getElementById('veil').textContent.includes('number 1 in the queue')")
        third.begin(SECOND)
        third.page.wait_for_selector("#reconnect:not([hidden])")
        assert "try again" in third.text("problem-words")
        first.page.click("#stop")
        second.chunks(2)
        assert not second.page.is_visible("#veil") and second.complaints == []


def test_a_token_is_asked_for(pipe, browser):
    with served(pipe, Settings(token="s3cret & more")) as (address, _):
        with Page(browser, address) as page:
            page.page.wait_for_selector("#token-form:not([hidden])")
            page.page.fill("#token", "wrong")
            page.page.click("#token-form button")
            page.page.wait_for_selector("#problem:not([hidden])")
            page.page.fill("#token", "s3cret & more")
            page.page.click("#token-form button")
            page.begin(FIRST)
            page.chunks(2)
            assert not page.page.is_visible("#token-form") and not page.page.is_visible("#problem")
        with Page(browser, address + "?token=s3cret%20%26%20more") as page:
            page.begin(FIRST)
            page.chunks(1)
            assert page.complaints == []


def test_codec_string_and_a_header_without_it(server, browser):
    """The page's own parser, on headers that it did not write."""
    from dsa_engine.media.stream_encoders import encoder

    frames = np.zeros((1, 48, 80, 3), dtype=np.uint8)
    header = encoder("m4s", 16, 80, 48).encode(frames).data
    with av.open(io.BytesIO(header)) as container:
        extra = bytes(container.streams.video[0].codec_context.extradata)
    with Page(browser, server[0]) as page:
        script = "async (bytes) => (await import('/player.js')).codec(new Uint8Array(bytes))"
        assert page.page.evaluate(script, list(header)) == "avc1." + extra[1:4].hex()
        for broken in (header[:40], header[28:100], b"", bytes(100)):
            caught = f"async (bytes) => ({script})(bytes).then(() => 'read', (error) => error.message)"
            assert page.page.evaluate(caught, list(broken)) != "read"
