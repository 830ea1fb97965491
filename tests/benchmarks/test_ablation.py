"""The ablation: its rows are the policies it names, compared at equal steps; what it draws and prints is whole."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from benchmarks import ablation
from dsa_engine import Confidence, Pipeline, Relative
from dsa_engine.checkpoints.model_folder import save_head
from dsa_engine.config import RolloutConfig
from dsa_engine.evaluation.rollouts import held_out, roll_out, tabulate
from dsa_engine.models.confidence import HEADS, new_head

CLIPS, CHUNKS = 2, 2


@pytest.fixture(scope="module")
def runs(untrained, tmp_path_factory):
    """A student with a random head of each form, as `--recipe head` leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(untrained, folder / "model")
    config = Pipeline.from_pretrained(untrained, device="cpu").engine.dit.config
    rollout = RolloutConfig(threshold=0.5, presets={"fast": 0.4, "balanced": 0.5, "quality": 0.6})
    torch.manual_seed(3)
    for kind in HEADS:
        head = new_head(config, kind)
        torch.nn.init.normal_((head.mlp[2] if kind == "pooled" else head.out).weight, std=0.5)
        save_head(folder / "head" / f"fitted-{kind}.safetensors", head, config, rollout, [(0.2, 0.5), (0.8, 0.1)])
    return folder


def run(runs, monkeypatch, capsys, *flags):
    monkeypatch.setattr(ablation, "TEACHER_STEPS", 2)
    sizes = ["--clips", str(CLIPS), "--chunks", str(CHUNKS)]
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--runs", str(runs), *sizes, *flags])
    ablation.main()
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize("brief", [False, True])
def test_rows_are_the_policies_that_they_name(runs, monkeypatch, capsys, tmp_path, brief):
    plot = tmp_path / "plot.png"
    found, out = run(runs, monkeypatch, capsys, "--plot", str(plot), *(["--brief"] if brief else []))
    assert list(found["students"]) == ["joint"] and found["brief"] == brief
    part, captions = found["students"]["joint"], held_out(CLIPS, CHUNKS)
    assert set(part["heads"]) == {"fitted-pooled", "fitted-token"}
    for name, head in part["heads"].items():
        assert ("relative:mean" in head["rows"]) != brief and (head["signal"] is None) == brief
        pipe = Pipeline.from_pretrained(runs / "model", head=runs / "head" / f"{name}.safetensors", device="cpu")
        assert head["kind"] == pipe.engine.head.kind
        for row, policy in {"confidence:0.5": Confidence(0.5), "relative:min": Relative()}.items():
            table = tabulate(captions, roll_out(pipe, captions, policy, batch=16))
            said = head["rows"][row]
            assert said["mean_steps"] == pytest.approx(table.steps.mean(), abs=1e-4)
            assert said["valid"] == pytest.approx(table.valid.mean(), abs=1e-4)
            assert said["distance"]["place"] is not None and "fixed" in said["versus"]
        assert "its thresholds" in head["rows"]["relative:min"]["versus"]
        if not brief:
            medians = head["signal"]["median_confidence_by_step"]
            assert head["signal"]["rises"] == bool((np.diff(medians) > 0).all()) and len(medians) == 4
    assert plot.read_bytes().startswith(b"\x89PNG") and "student joint, 2 clips" in out


def test_a_folder_without_heads_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no head.*safetensors of joint, paper, paper-token"):
        run(tmp_path, monkeypatch, capsys)
