"""The page in headless Chromium. As a program it takes the picture of the documentation:

python tests/support/browser.py docs/page.png
"""

from __future__ import annotations

import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

from dsa_engine import Pipeline
from dsa_engine.serving.http.app import create_app
from dsa_engine.serving.settings import Settings, WorkerLimits
from dsa_engine.serving.worker.in_process import LocalBackend
from dsa_engine.serving.worker.worker import Worker

PATIENCE = 30_000  # milliseconds; only what hangs gets there
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = {"width": 1200, "height": 1000}, {"width": 390, "height": 844}


def missing() -> str | None:
    """Why there is no browser, None where there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if program() else "no Chromium is installed"


def program() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program(), args=list(OPTIONS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(pipe: Pipeline, settings: Settings | None = None, **limits):
    """(address, backend) of the whole app, without jobs, around a pipeline."""
    backend = LocalBackend(Worker(pipe, WorkerLimits(**{"max_sessions": 2, "max_jobs": 0, "max_queue": 2} | limits)))
    app = create_app(backend, settings or Settings(), jobs=False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws_per_message_deflate=False))
    thread = threading.Thread(target=server.run, daemon=True)
    backend.start()
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", backend
    finally:
        server.should_exit = True
        thread.join(30)
        backend.worker.stop()


class Page:
    """A page that is open, and all that it complained of."""

    def __init__(self, browser, address: str, size=DESKTOP, script: str | None = None, **options):
        self.context = browser.new_context(viewport=size, **options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if script is not None:
            self.page.add_init_script(script)
        self.page.goto(address)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_) -> None:
        self.context.close()

    def begin(self, prompt: str) -> None:
        self.page.wait_for_selector("#go:enabled")
        self.say(prompt)

    def say(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#go")

    def until(self, expression: str) -> None:
        self.page.wait_for_function(expression)

    def chunks(self, count: int) -> None:
        self.until(f"+document.getElementById('count').textContent >= {count}")

    def slide(self, threshold: float) -> None:
        self.page.evaluate(
            """value => {
                const slider = document.getElementById("threshold");
                slider.value = value;
                for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind));
            }""",
            threshold,
        )

    def text(self, id: str) -> str:
        return self.page.text_content(f"#{id}").strip()


def take_picture(path: Path) -> None:
    """The small model's page after some twenty-five chunks with a change of prompt."""
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained("shapes", device="cpu", max_sessions=2)
    pipe.warmup()
    with served(pipe) as (address, _), chromium() as browser, Page(browser, address) as page:
        page.begin("a red circle moves sideways on navy")
        page.chunks(12)
        page.say("a yellow cross moves diagonally on gray")
        page.chunks(26)
        page.page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
