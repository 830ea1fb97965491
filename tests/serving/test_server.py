"""`dsa-engine serve` as its own process: how it starts, how it stops, and what is left when it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import httpx
import pytest
import torch
import websockets

from dsa_engine import Pipeline, cli
from dsa_engine.checkpoints.model_folder import save_model_folder
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.media.mp4 import Mp4Writer
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.serving.jobs.store import Store
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder

PROMPTS = ["a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"]
STOPS = 5.0  # seconds in which a server has stopped


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """32x32 pixels, three frames a chunk; random weights, so that confidences and steps differ."""
    torch.manual_seed(3)
    config = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=16)
    dit, head = CausalDiT(config), PooledHead(config)
    for parameter in [*dit.parameters(), *head.mlp[2].parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    modules = {"generator": dit, "confidence": head, "codec": PixelCodec(ch=32), "text": SlotTextEncoder(16)}
    folder = tmp_path_factory.mktemp("tiny")
    rollout = RolloutConfig(window=9, shift=3.0, threshold=0.428)
    save_model_folder(folder, "tiny", modules, rollout, {"height": 32, "width": 32, "frames": 15, "fps": 12.0})
    return folder


def command(model, data, *flags) -> list[str]:
    options = ["--model", str(model), "--data", str(data), "--device", "cpu", "--threads", "1", *map(str, flags)]
    return [sys.executable, "-m", "dsa_engine", "serve", "--json", *options]


def environment(**more) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


class Process:
    """A server that is ready."""

    def __init__(self, model, data, *flags, **env):
        self.data = data
        self.log = open(f"{data}.log", "a+")
        self.process = subprocess.Popen(
            command(model, data, "--port", 0, *flags),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(**env),
        )
        line = self.process.stdout.readline()
        self.log.seek(0)
        assert line, self.log.read()
        self.ready = json.loads(line)
        self.address = self.ready["address"]
        self.http = httpx.Client(base_url=self.address, timeout=30)

    def add(self, **body) -> str:
        answer = self.http.post("/v1/videos", json={"prompt": PROMPTS[0], **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def states(self) -> dict[str, str]:
        return {job["id"]: job["status"] for job in self.http.get("/v1/videos", params={"limit": 100}).json()["data"]}

    def until(self, condition, seconds: float = 60) -> dict[str, str]:
        end = time.monotonic() + seconds
        while not condition(states := list(self.states().values())):
            assert time.monotonic() < end, states
            time.sleep(0.02)
        return self.states()

    def stop(self, sign=signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(sign)
        return self.process.wait(timeout=seconds)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture
def serve(model, tmp_path):
    """serve(*flags): a server that is ready, of the data folder of this test."""
    with contextlib.ExitStack() as stack:

        def start(*flags) -> Process:
            return stack.enter_context(contextlib.closing(Process(model, tmp_path / "data", *flags)))

        yield start


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """One for the tests that leave it as it was."""
    with contextlib.closing(Process(model, tmp_path_factory.mktemp("server") / "data", DSA_TOKEN="secret")) as server:
        yield server


BEARER = {"authorization": "Bearer secret"}


def rows(data) -> dict[str, tuple[str, float | None]]:
    """The jobs as the file has them, read without the program."""
    with contextlib.closing(sqlite3.connect(data / "jobs.sqlite")) as connection:
        return {row[0]: row[1:] for row in connection.execute("SELECT id, status, completed FROM job ORDER BY number")}


def files(data) -> list[str]:
    return sorted(path.name for path in (data / "videos").iterdir())


def alone(model, tmp_path, clips) -> list[bytes]:
    """The files of clips that one session each makes, with nothing beside it."""
    path, made = tmp_path / "alone.mp4", []
    with Pipeline.from_pretrained(model, device="cpu", deterministic=True) as pipe:
        for options in clips:
            with pipe.session(**options) as session, Mp4Writer(path, pipe.fps, threads=1) as video:
                while not session.exhausted:
                    video.write(session.next_chunk().frames)
            made.append(path.read_bytes())
    return made


@pytest.mark.slow
def test_twenty_jobs_outlive_a_kill_with_every_bit(serve, model, tmp_path):
    """SIGKILL in the middle of them; what comes out at last is what each session makes alone."""
    flags = ("--deterministic", "--max-jobs", 4, "--max-sessions", 2)
    first = serve(*flags)
    wanted = {}
    for i in range(20):
        options = {"prompt": PROMPTS[i % 3], "seed": i, "num_frames": 15 + 3 * (i % 4)}
        wanted[first.add(**options)] = options
    first.until(lambda states: states.count("completed") >= 3)
    first.stop(signal.SIGKILL)
    before = {name: (first.data / "videos" / name).read_bytes() for name in files(first.data) if name[0] != "."}
    assert 3 <= len(before) < 20
    second = serve(*flags)
    assert list(second.states())[::-1] == list(wanted)
    second.until(lambda states: set(states) == {"completed"})
    assert second.stop() == -signal.SIGTERM
    assert files(second.data) == sorted(f"{id}.mp4" for id in wanted)
    assert {status for status, _ in rows(second.data).values()} == {"completed"}
    expected = alone(model, tmp_path, wanted.values())
    for id, whole in zip(wanted, expected, strict=True):
        made = (second.data / "videos" / f"{id}.mp4").read_bytes()
        assert made == before.get(f"{id}.mp4", made)
        assert made == whole, wanted[id]
    assert len(set(expected)) == 20


async def talk(address: str, stopped: asyncio.Event) -> list[dict]:
    """A live stream that is watched until its end: its JSON messages."""
    said = []
    url = address.replace("http", "ws") + "/v1/realtime/video"
    async with websockets.connect(url, max_size=None) as socket:
        await socket.send(json.dumps({"type": "session.start", "prompt": PROMPTS[1], "format": "rgb24"}))
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in socket:
                if isinstance(message, str):
                    said.append(json.loads(message))
                if said[-1]["type"] == "video.chunk_metadata":
                    stopped.set()
    return said


@pytest.mark.slow
def test_sigterm_with_jobs_and_streams_running(serve):
    server = serve("--max-jobs", 2, "--max-sessions", 3)
    ids = [server.add(seed=i, num_frames=15 if i < 2 else 1998) for i in range(6)]
    server.until(lambda states: states.count("completed") == 2 and states.count("in_progress") == 2)

    async def run() -> list[list[dict]]:
        running = [asyncio.Event() for _ in range(3)]
        talks = [asyncio.create_task(talk(server.address, event)) for event in running]
        idle = await websockets.connect(server.address.replace("http", "ws") + "/v1/realtime/video")  # says nothing
        for event in running:
            await asyncio.wait_for(event.wait(), 30)
        assert await asyncio.to_thread(server.stop, signal.SIGTERM, STOPS) == -signal.SIGTERM
        await idle.close()
        return await asyncio.gather(*talks)

    for said in asyncio.run(run()):
        assert said[-1]["type"] == "session.done" and said[-1]["reason"] == "shutdown", said[-1]
    found = rows(server.data)
    assert [found[id][0] for id in ids] == ["completed"] * 2 + ["queued"] * 4
    assert [found[id][1] is None for id in ids] == [False] * 2 + [True] * 4
    assert files(server.data) == sorted(f"{id}.mp4" for id in ids[:2])
    assert "Traceback" not in server.said()


@pytest.mark.slow
def test_it_listens_to_this_machine_alone_and_says_where(server):
    host, port = server.address.removeprefix("http://").split(":")
    assert host == "127.0.0.1" and server.process.poll() is None
    found = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as table:
            for line in table.readlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A" and local.endswith(f":{int(port):04X}"):
                    found.append(local)
    assert found == [f"0100007F:{int(port):04X}"]  # 127.0.0.1 in the kernel's order, and no other


@pytest.mark.slow
def test_a_token_from_the_environment(server):
    assert server.http.get("/readyz").status_code == 200
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/v1/models", headers=BEARER).status_code == 200
    assert "secret" not in server.said()


@pytest.mark.slow
def test_large_bodies_over_a_real_connection(server):
    def endless():
        for _ in range(400):
            yield b"a" * 65_536

    headers = {"content-type": "application/json", **BEARER}
    assert server.http.post("/v1/videos", content=endless(), headers=headers).status_code == 413
    assert server.http.post("/v1/videos", content=b"a" * (20 * 2**20), headers=headers).status_code == 413
    answer = server.http.post("/v1/videos", json={"prompt": "a" * 2**20}, headers=BEARER)
    assert answer.status_code == 400 and "at most 4096" in answer.text
    assert server.http.get("/readyz").status_code == 200


@pytest.mark.slow
def test_ctrl_c_stops_it_as_well(server):
    server.http.headers.update(BEARER)
    server.add(num_frames=1998)
    server.until(lambda states: "in_progress" in states)
    assert server.stop(signal.SIGINT) == 130
    assert [status for status, _ in rows(server.data).values()] == ["queued"]
    assert server.said().splitlines()[-1] == "dsa-engine: interrupted"


# In this process: none of these gets as far as serving.


@pytest.fixture
def fails(model, tmp_path, capsys):
    """fails(*flags): the one line that is said."""

    def run(*flags) -> str:
        argv = command(model, tmp_path / "data", "--port", 0, *flags)[3:]
        assert cli.main(argv) == 2
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if line.startswith("dsa-engine: error: ")]
        assert not out and err.splitlines()[-1] == line
        return line

    return run


def test_an_address_that_cannot_be_had(fails):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in fails("--port", port)
    assert "cannot listen at no.such.host.invalid:0" in fails("--host", "no.such.host.invalid")
    assert "port=70000: must be from 0" in fails("--port", 70_000)


def test_a_data_folder_that_cannot_be_used(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in fails("--data", tmp_path / "file")
    assert "cannot be written to" in fails("--data", "/proc/dsa")
    with contextlib.closing(Store(tmp_path / "data")):
        assert "another server uses it" in fails()


def test_limits_that_cannot_be(fails):
    assert "sessions=0: must be a whole number of at least 1" in fails("--max-sessions", 0)
    assert "step_policy='quick': must be one of" in fails("--steps", "quick")
    assert "idle_timeout=-1.0: must be a number of seconds above 0" in fails("--idle-timeout", -1)
    assert "token='': must not be empty" in fails("--token", " ")
