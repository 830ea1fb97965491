"""The command line as a whole, and as a program."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from dsa_engine import cli
from tests.support.command_line import PROMPT, decoded, program


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", PROMPT, "--frames", "3", "--seconds", "1"],
        ["generate", PROMPT, "--at", "2s"],
    ],
)
def test_a_wrong_command_line_exits_with_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2 and "usage: dsa-engine" in capsys.readouterr().err


def test_the_program_runs(model, tmp_path):
    doctor = program(tmp_path, "doctor", "--json")
    clip = program(tmp_path, "generate", PROMPT, "--model", model, "--steps", "fixed:1", "-o", "c.mp4", "--json")
    out, err = doctor.communicate(timeout=60)
    assert doctor.returncode == 0 and json.loads(out)["ok"], err
    out, err = clip.communicate(timeout=60)
    assert clip.returncode == 0 and json.loads(out.splitlines()[-1])["frames"] == 15, err
    assert len(decoded(tmp_path / "c.mp4")[0]) == 15


def test_ctrl_c_ends_the_program_cleanly(model, tmp_path):
    process = program(tmp_path, "generate", PROMPT, "--model", model, "--frames", 30000, "-o", "c.mp4")
    for _ in range(600):  # until the temporary file is there: the clip is being made
        if os.listdir(tmp_path) or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.rstrip().endswith("dsa-engine: interrupted") and "Traceback" not in err
    assert os.listdir(tmp_path) == []
