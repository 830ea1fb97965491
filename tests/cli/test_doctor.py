"""`dsa-engine doctor`."""

from __future__ import annotations

import json
import sys

import av
import numpy as np
import pytest
import torch

from dsa_engine.checkpoints.load import shipped_models
from dsa_engine.cli import doctor
from dsa_engine.ops import dispatch
from tests.support.command_line import ROOT


def test_doctor_says_whether_fp8_runs(facts, monkeypatch):
    assert facts("doctor")["fp8"] == ("in hardware" if torch.cuda.is_available() else "only its values, on a CPU")
    monkeypatch.setattr("dsa_engine.cli.doctor.unavailable", lambda device: "compute capability 8.0: e4m3 needs 8.9")
    assert facts("doctor")["fp8"] == "compute capability 8.0: e4m3 needs 8.9"


def test_doctor_finds_this_machine_fit(facts):
    said = facts("doctor")
    assert said["ok"] and said["fails"] == {} and {"video", "engine"} <= said["works"].keys()
    assert said["versions"]["torch"] == torch.__version__ and said["versions"]["av"] == av.__version__
    assert said["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["device"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert set(said["ops"]) == set(dispatch.GROUP_OF)
    assert all(why.startswith("torch: the tensors are on a CPU") for why in said["ops"].values())
    assert said["models"] == shipped_models()


@pytest.mark.parametrize("broken", ["media.mp4.write_mp4", "pipeline.Pipeline.generate_latents"])
def test_doctor_exits_with_1_where_something_does_not_run(run, monkeypatch, broken):
    def fails(*_, **__):
        raise OSError("libx264\nis missing")

    monkeypatch.setattr(f"dsa_engine.{broken}", fails)
    code, out, _ = run("doctor")
    assert code == 1 and "OSError: libx264 is missing" in out and "does not run here" in out
    code, out, _ = run("doctor", "--json")
    assert code == 1 and json.loads(out)["ok"] is False


def test_doctor_sees_an_encoder_that_returns_rubbish_and_a_model_that_gives_nan(run, monkeypatch):
    monkeypatch.setattr("dsa_engine.media.mp4.read_mp4", lambda path: (np.zeros((2, 16, 16, 3), np.uint8), 2.0))
    monkeypatch.setattr("dsa_engine.pipeline.Pipeline.generate_latents", lambda *a, **k: torch.tensor(float("nan")))
    code, out, _ = run("doctor", "--json")
    assert code == 1 and json.loads(out)["fails"].keys() == {"video", "engine"}


@pytest.mark.parametrize(
    "torch_version, cudnn, known",
    [
        ("2.9.0+cu128", 91002, True),
        ("2.9.1", 91400, True),
        ("2.9.1", 91500, False),
        ("2.9.1", 91900, False),
        ("2.9.1+cpu", None, False),
        ("2.8.0", 91002, False),
        ("2.11.0", 91002, False),
        ("2.90.0", 91002, False),
    ],
)
def test_the_known_bad_pair_of_torch_and_cudnn(torch_version, cudnn, known):
    assert len(doctor.known_problems(torch_version, cudnn)) == known


def test_doctor_names_the_extra_that_brings_a_missing_package():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, names in doctor.EXTRAS.items():
        assert [line.replace("[", ">").split(">")[0] for line in extras[extra]] == list(names)
    assert set(extras) - set(doctor.EXTRAS) == {"dev", "test"}


def test_doctor_probes_flash_attn_without_importing_it(facts, monkeypatch, tmp_path):
    assert facts("doctor")["optional"]["flash-attn"] == "missing; it comes with dsa-engine[flash]"
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts("doctor")["optional"]["flash-attn"] == "2.8.3"
