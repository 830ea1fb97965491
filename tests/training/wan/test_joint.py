"""Joint training of checkpoints: every stage at a small width, killed and resumed to the same bits; what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsa_engine import Pipeline
from dsa_engine.config import RolloutConfig
from dsa_engine.training import launch
from dsa_engine.training.wan.inputs import check_rollout
from dsa_engine.training.wan.joint import JointRun
from tests.support.joint_training import LAYERS, make_inputs, sizes, weights

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.joint_training", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_killed_run_of_two_processes_ends_with_the_same_bits(trained):
    """SIGKILL of both processes in the second step, after the checkpoint of the first: every tensor is the same."""
    codes = json.loads((trained / "codes.json").read_text())
    assert codes == {"whole": [0, 0], "killed": [-signal.SIGKILL] * 2, "step": 1, "resumed": [0, 0]}
    whole, parts = (torch.load(trained / x / "checkpoint.pt", weights_only=True) for x in ("whole", "parts"))
    assert whole["main"]["step"] == parts["main"]["step"] == 2
    a, b = flat(whole), flat(parts)
    assert a.keys() == b.keys() and len(a) > 250
    assert [name for name, value in a.items() if not value.equal(b[name])] == []
    for file in ("student-joint/model.safetensors", "head.safetensors"):
        one, other = (load_file(trained / x / file.replace("student", "self-forcing")) for x in ("whole", "parts"))
        assert all(value.equal(other[name]) for name, value in one.items())


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for name, value in state.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state} if isinstance(state, torch.Tensor) else {}


def test_all_that_is_trained_moves_and_the_log_says_it(trained):
    state = torch.load(trained / "whole" / "checkpoint.pt", weights_only=True)
    began = {f"dit.{name}": value for name, value in weights(sizes(LAYERS), 0).items()}
    for now, start in ((state["main"]["model"], began), (state["critic"]["model"], weights(sizes(LAYERS), 1))):
        assert all(value.isfinite().all() for value in now.values())
        still = [name for name in start if now[name].equal(start[name])]
        assert still == [], "every weight of the student and the critic has a gradient"
    with (trained / "whole" / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {"step", "loss", "seconds", "dmd", "joint", "confidence", "critic"} == set(row) and row["step"] == "2"
    assert not {"ema"} & state["critic"].keys()


def test_the_student_has_the_names_that_it_came_with_and_goes_on_to_a_fitted_head(trained, tmp_path):
    """joint -> head -> Pipeline: the averaged weights in the input's names; a head fitted and calibrated; a clip."""
    folder, head = trained / "whole" / "self-forcing-joint", trained / "whole" / "head.safetensors"
    given = torch.load(trained / "student" / "self_forcing.pt", weights_only=True)["generator_ema"]
    made = load_file(folder / "model.safetensors")
    assert made.keys() == given.keys() and {v.dtype for v in made.values()} == {torch.float32}
    average = torch.load(trained / "whole" / "checkpoint.pt", weights_only=True)["main"]["ema"]
    assert all(value.equal(average[name.replace("model.", "dit.", 1)]) for name, value in made.items())
    pipe = Pipeline.from_pretrained(folder, head=head, device="cpu")
    assert pipe.found.family == "self-forcing" and pipe.engine.head.kind == "token" and pipe.config.chunk_frames == 3
    options = {"frames": 21, "height": 32, "width": 32, "iterations": 5, "device": "cpu"}
    report = launch.train_head_of(folder, tmp_path / "head", trained / "prompts.safetensors", **options)
    assert set(report["presets"]) == {"fast", "balanced", "quality"}
    fitted = Pipeline.from_pretrained(folder, head=tmp_path / "head" / "head.safetensors", device="cpu")
    embeds = load_file(trained / "prompts.safetensors")["prompt_embeds"][:1]
    clip = fitted.generate_latents(torch.randn(1, 6, 16, 4, 4), embeds, step_policy="dsa")
    assert clip.shape == (1, 6, 16, 4, 4) and clip.isfinite().all()


@pytest.fixture
def inputs(tmp_path) -> Path:
    make_inputs(tmp_path, sizes(1))
    return tmp_path


def run(folder: Path, steps: int = 1, batch: int = 1, **changes):
    options = {
        "model": folder / "student" / "self_forcing.pt",
        "teacher": folder / "teacher",
        "prompts": folder / "prompts.safetensors",
        "out": folder / "out",
        "frames": 9,
        "height": 16,
        "width": 16,
        **changes,
    }
    return launch.train_joint_of(JointRun(**options), folder / "small.toml", steps=steps, batch=batch, device="cpu")


def test_one_process_the_papers_objective_and_a_causal_teacher(inputs):
    facts = run(inputs, objective="paper", score="causal", critic=inputs / "student" / "self_forcing.pt")
    assert facts["paper"]["step"] == 1 and Path(facts["paper"]["student"]).name == "self-forcing-paper"
    assert Pipeline.from_pretrained(facts["paper"]["student"], head=facts["paper"]["head"], device="cpu").engine.head


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head": "tokens"}, "head='tokens': must be one of pooled, token; nearest is token"),
        ({"score": "both"}, "score='both': must be one of bidirectional, causal; nearest is"),
        ({"save_every": 0}, "save_every=0: must be a whole number of at least 1; nearest is 1"),
        ({"height": 20}, "size 20x16: height and width must be multiples of 16; nearest is 16x16"),
        ({"window": 4, "frames": 21}, "window=4: must be a multiple of the chunk's 3 frames .*; nearest is 3"),
        ({"frames": 21, "window": 4, "sink": 1}, "window=4"),
    ],
)
def test_values_that_do_not_fit_are_named_with_the_nearest(inputs, changes, words):
    with pytest.raises(ValueError, match=words):
        run(inputs, **changes)


def test_files_that_do_not_fit_are_named_with_what_would(inputs):
    wide = sizes(1).__class__(**{**sizes(1).__dict__, "text_dim": 40})
    make_inputs(inputs / "wide", wide)
    with pytest.raises(ValueError, match=r"teacher=.*wide/teacher: text_dim=40: must be .*; nearest is text_dim=32"):
        run(inputs, teacher=inputs / "wide" / "teacher")
    with pytest.raises(ValueError, match=r"critic=.*: text_dim=40: must be"):
        run(inputs, critic=inputs / "wide" / "teacher")
    with pytest.raises(ValueError, match=r"prompts=.*\[6, 8, 40\]: must be \[P, L, 32\].*nearest is \[6, 8, 32\]"):
        run(inputs, prompts=inputs / "wide" / "prompts.safetensors")
    with pytest.raises(ValueError, match="null_prompt=.*nearest is"):
        run(inputs, null=inputs / "wide" / "prompts.safetensors")
    (inputs / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="prompts.txt: holds 1 texts; must be a .safetensors file with prompt_embeds"):
        run(inputs, prompts=inputs / "prompts.txt")
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        run(inputs, prompts=inputs / "absent.safetensors")
    assert not (inputs / "out").exists()


def test_a_sink_is_refused_where_the_gradient_would_not_see_it():
    check_rollout(RolloutConfig(window=12, sink=3), chunks=4)  # the clip never outgrows the window
    with pytest.raises(ValueError, match="sink=3 with window=12: .*nearest is sink=0, or window=15"):
        check_rollout(RolloutConfig(window=12, sink=3), chunks=5)
    with pytest.raises(ValueError, match="commit='exit_step'"):
        check_rollout(RolloutConfig(commit="exit_step"), chunks=1)
