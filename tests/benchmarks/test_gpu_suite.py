"""The GPU suite's script, with a stub for an interpreter: it writes results, sleeps, hangs or fails as requested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"
PARTS = "build smoke kernels fps vae tests memcheck racecheck".split()
FILES = {"gpu-suite.txt", "gpu-suite.log", "all.tgz"} | {
    f"gpu-{part}.json" for part in ("smoke", "kernels", "fps", "vae")
}

# Stands in for python: `python stub.py benchmarks/fps.py ...`. What each script does is in $STUB: {name: action}.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

argv = sys.argv[1:]
name = "pip" if "pip" in argv else "tests" if "pytest" in argv else Path(argv[0]).stem
name = "check" if "--check" in argv else "vae" if "vae_decode" in argv else argv[1] if name == "smoke" else name
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{name} {os.environ.get('DSA_BUILD_CUDA', '')} {' '.join(argv)}\\n")
action = json.loads(os.environ.get("STUB", "{}")).get(name, "ok")
for option in ("--save", "--to"):
    if option in argv:
        Path(argv[argv.index(option) + 1]).write_text(json.dumps({"of": name, "pid": os.getpid()}))
print(f"{name} speaks")
if action == "clean":  # ends by its own clock
    time.sleep(float(argv[argv.index("--limit") + 1]))
    sys.exit(75)
if action == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if action == "sleep":
    time.sleep(600)
if action == "no csrc" and os.environ.get("DSA_BUILD_CUDA") == "1":
    sys.exit(1)
sys.exit(int(action) if str(action).isdigit() else 0)
"""


class Stage:
    def __init__(self, folder: Path):
        self.out, self.calls, stub = folder / "out", folder / "calls", folder / "stub.py"
        stub.write_text(STUB)
        self.env = {**os.environ, "PYTHON": f"{sys.executable} {stub}", "OUT": str(self.out), "CALLS": str(self.calls)}
        self.env |= {"SANITIZER": ""}

    def start(self, *argv: str, limits: str = "", **actions) -> subprocess.Popen:
        self.calls.write_text("")
        env = self.env | {"STUB": json.dumps(actions), "LIMITS": limits}
        return subprocess.Popen(["bash", SUITE, *argv], env=env, stdout=subprocess.PIPE, text=True)

    def run(self, *argv: str, **given) -> tuple[int, str]:
        made = self.start(*argv, **given)
        out, _ = made.communicate(timeout=120)
        return made.returncode, out

    def called(self) -> list[str]:
        return [line.split()[0] for line in self.calls.read_text().splitlines()]

    def table(self) -> dict[str, str]:
        rows = [line.split(maxsplit=3) for line in (self.out / "gpu-suite.txt").read_text().splitlines()[1:]]
        return {row[0]: row[3] for row in rows}

    def packed(self) -> set[str]:
        with tarfile.open(self.out / "all.tgz") as archive:
            return set(archive.getnames())

    def until(self, name: str) -> None:
        """The script of that name was called."""
        for _ in range(600):
            if name in (self.called() if self.calls.exists() else ()):
                return
            time.sleep(0.05)
        pytest.fail(f"{name} was never called")


def ended(pid: int) -> bool:
    """Within some time; a process that nobody has waited for is still listed, as a zombie."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_the_parts_fit_nine_minutes_and_come_in_order():
    assert subprocess.run(["bash", "-n", SUITE], check=False).returncode == 0
    listed = subprocess.run(["bash", SUITE, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [text.split()[0] for text in listed] == PARTS
    assert sum(int(text.split()[1]) for text in listed) < 540
    wrong = subprocess.run(["bash", SUITE, "build", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no part 'x'" in wrong.stderr and not wrong.stdout


def test_all_parts_leave_at_most_eight_files_and_one_archive_of_them(stage):
    code, out = stage.run()
    assert code == 0 and stage.table() == dict.fromkeys(PARTS, "ok")
    assert {path.name for path in stage.out.iterdir()} == FILES and len(FILES) <= 8
    assert stage.packed() == FILES - {"all.tgz"}
    assert stage.called() == "pip torch triton loop cuda kernels fps vae tests check check".split()
    limits = {
        line.split()[0]: line.split("--limit ")[1].split()[0]
        for line in stage.calls.read_text().splitlines()
        if "--limit" in line
    }
    assert limits["kernels"] == "70" and limits["fps"] == "142" and limits["tests"] == "48"
    assert (
        "fps speaks" in out
        and out.splitlines()[-len(PARTS) :] == ((stage.out / "gpu-suite.txt").read_text().splitlines()[1:])
    )


def test_one_part_that_fails_or_hangs_stops_no_other(stage):
    """By its own clock, killed, failed, its tool absent: each is told apart, and results that exist are kept."""
    stage.env["SANITIZER"] = "no-such-sanitizer"
    code, _ = stage.run(
        "kernels",
        "fps",
        "vae",
        "tests",
        "memcheck",
        limits="kernels=4 fps=2 vae=60",
        kernels="clean",
        fps="hang",
        vae="3",
        tests="5",
    )
    assert code == 1 and stage.table() == {
        "kernels": "unfinished",
        "fps": "out of time",
        "vae": "FAILED, code 3",
        "tests": "absent",
        "memcheck": "absent",
    }
    for name in ("kernels", "fps", "vae"):
        assert (stage.out / f"gpu-{name}.json").exists() and f"gpu-{name}.json" in stage.packed()


def test_a_build_that_fails_falls_back_loudly(stage):
    code, out = stage.run("build", "memcheck", pip="no csrc")
    assert code == 1 and stage.table()["build"] == "ok, but WITHOUT csrc" and "NOT built" in out
    builds = [line.split()[1] for line in stage.calls.read_text().splitlines() if line.startswith("pip")]
    assert builds == ["1", "0"] and stage.calls.read_text().splitlines()[-1].count("--backends triton --limit")
    code, _ = stage.run("build", pip="9")
    assert code == 1 and stage.table()["build"].startswith("FAILED")


def test_a_smoke_that_hangs_or_is_absent(stage):
    code, _ = stage.run("smoke", cuda="77", loop="77")
    assert code == 0 and stage.table() == {"smoke": "ok"}
    assert stage.run("smoke", triton="1")[0] == 1 and stage.called()[-1] == "cuda"  # the others are still tried
    stage.run("smoke", limits="smoke=6", triton="sleep", loop="sleep")
    assert stage.table() == {"smoke": "unfinished"} and stage.called() == ["torch", "triton", "loop"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_and_resumed(stage, how):
    """What was done is kept and not done again; what was under way is, by itself row by row."""
    made = stage.start("kernels", "fps", "vae", fps="sleep")
    stage.until("fps")
    child = None
    for _ in range(600):  # its result is written right after
        if (stage.out / "gpu-fps.json").exists() and (text := (stage.out / "gpu-fps.json").read_text()):
            child = json.loads(text)["pid"]
            break
        time.sleep(0.05)
    made.send_signal(how)
    made.communicate(timeout=60)
    assert stage.table()["kernels"] == "ok" and {"gpu-kernels.json", "gpu-suite.txt"} <= stage.packed()
    if how == signal.SIGTERM:
        assert made.returncode == 143 and stage.table()["fps"] == "stopped" and "gpu-fps.json" in stage.packed()
        assert ended(child)  # with all that it started
    else:
        os.kill(child, signal.SIGKILL)
    assert len(list(stage.out.iterdir())) <= 8
    code, out = stage.run("--resume", "kernels", "fps", "vae")
    assert code == 0 and stage.called() == ["fps", "vae"] and "kernels: done before" in out
    assert stage.table() == dict.fromkeys(("kernels", "fps", "vae"), "ok")


def test_resumed_on_another_machine_with_what_came_back(stage, tmp_path):
    stage.run("kernels", "fps", kernels="75")
    archive = (stage.out / "all.tgz").rename(tmp_path / "all.tgz")
    for path in stage.out.iterdir():
        path.unlink()
    code, _ = stage.run("--from", str(archive), "build", "kernels", "fps")
    assert code == 0 and stage.called() == ["pip", "kernels"]
    assert "--resume" in stage.calls.read_text().splitlines()[-1] and (stage.out / "gpu-fps.json").exists()


def test_results_of_other_sources_are_not_resumed(stage):
    stage.run("kernels")
    state = stage.out / "gpu-suite.txt"
    state.write_text(state.read_text().replace("sources ", "sources other-"))
    code, out = stage.run("--resume", "fps", "kernels")
    assert code == 0 and stage.called() == ["fps", "kernels"] and "of other sources" in out
    assert "--resume" not in stage.calls.read_text()
