"""A server in a process of its own: started, queried and observed from outside, stopped."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

START = 120.0  # seconds until it answers: a model may have to be loaded
COMMAND = (sys.executable, "-m", "dsa_engine", "serve")
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$", re.MULTILINE)


class ProcessStats(NamedTuple):
    """What a process holds. rss: bytes; files: open descriptors; cpu: seconds of processor time so far."""

    rss: int
    threads: int
    files: int
    cpu: float


class ServerUnderTest:
    """A server that runs at a URL."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """Status and body."""
        with closing(http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, as `name{label="value"}` and, summed over labels, as `name`."""
        status, text = self.get("/metrics")
        if status != 200:
            raise RuntimeError(f"{self.url}/metrics: {status}")
        found: dict[str, float] = {}
        for name, labels, value in re.findall(_SAMPLE, text):
            for key in {name, name + labels}:
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def stats(self) -> ProcessStats | None:
        """None for a server that is not a process of ours."""
        return None


class Server(ServerUnderTest):
    """`dsa-engine serve` with some options, on a free port of this machine, ready when the constructor returns.

    with Server(["--model", "shapes", "--rows", "1"]) as server:
        server.get("/health")
    """

    def __init__(self, options: Sequence[str] = (), command: Sequence[str] = COMMAND):
        self._folder = tempfile.TemporaryDirectory(prefix="dsa-serve-")
        self.log = Path(self._folder.name, "log")
        data = str(Path(self._folder.name, "data"))
        command = [*command, *options, "--port", "0", "--data", data, "--json"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            super().__init__(self._address())
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str:
        """What it prints on stdout once it is ready."""
        found, _, _ = select.select([self.process.stdout], [], [], START)
        line = self.process.stdout.readline() if found else b""
        if not line:
            raise RuntimeError(f"the server is not ready within {START:g} s, or has ended: {self.log_text()[-2000:]}")
        return json.loads(line)["address"]

    def log_text(self) -> str:
        """All that it has written to stderr."""
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stats(self) -> ProcessStats:
        return process_stats(self.process.pid)

    def stop(self, patience: float = 10.0) -> float:
        """Ask it to end (SIGTERM), kill it where it does not; returns the seconds that took."""
        start = time.monotonic()
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self._folder.cleanup()
        return time.monotonic() - start

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def process_stats(pid: int) -> ProcessStats:
    """Of a process on Linux."""
    folder = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in folder.joinpath("status").read_text().splitlines())
    ticks = folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[11:13]  # user and system, after the name
    cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    rss = 1024 * int(status["VmRSS"].split()[0])
    return ProcessStats(rss, int(status["Threads"]), len(list(folder.joinpath("fd").iterdir())), cpu)
