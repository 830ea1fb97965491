"""`dsa-engine train`."""

from __future__ import annotations

import json

import pytest

from dsa_engine.checkpoints.model_folder import save_model_folder
from dsa_engine.config import RolloutConfig
from dsa_engine.pipeline import Pipeline
from tests.support.command_line import OTHER, PROMPT, THIRD


def test_a_head_for_a_checkpoint_from_the_command_line(run, model, tmp_path):
    """A model without a head, its prompts in a file: the head file is there, and steps follow its thresholds."""
    pipe = Pipeline.from_pretrained(model)
    parts = {"generator": pipe.engine.dit, "codec": pipe.engine.decoder, "text": pipe.engine.text}
    bare = tmp_path / "bare"
    save_model_folder(
        bare, "bare", parts, RolloutConfig(window=9, shift=3.0), {"height": 32, "width": 32, "frames": 15, "fps": 12.0}
    )
    (tmp_path / "prompts.txt").write_text(f"# for the head\n{PROMPT}\n{OTHER}\n\n{THIRD}\na red cross rests\n")
    options = ["--recipe", "head", "--model", bare, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "head"]
    code, out, err = run("train", *options, "--frames", "6", "--steps", "20", "--seed", "3", "--json")
    assert code == 0, err
    facts = json.loads(out.splitlines()[-1])
    assert set(facts["presets"]) == {"fast", "balanced", "quality"} and facts["seed"] == 3 and facts["chunks"] == 2
    assert json.loads((tmp_path / "head" / "head.json").read_text()) == facts
    given = Pipeline.from_pretrained(bare, head=tmp_path / "head" / "head.safetensors")
    assert given.config.presets == {name: row["threshold"] for name, row in facts["presets"].items()}
    steps = [
        given(PROMPT, num_frames=6, confidence_threshold=t, output_type="latent").steps_per_chunk for t in (0.0, 1.0)
    ]
    assert steps == [[[1, 1]], [[4, 4]]]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--recipe", "teacher", "--model", "x.pt"], "--model: only for --recipe head"),
        (["--recipe", "head", "--prompts", "p.txt"], "--prompts: only for --recipe head with --model"),
        (["--recipe", "head", "--model", "shapes"], "--prompts: what to roll out is needed"),
        (["--recipe", "head", "--model", "m", "--prompts", "p", "--head", "tok"], "head='tok': must be one of pooled"),
        (["--recipe", "joint", "--model", "x.pt", "--prompts", "p.safetensors"], "--teacher: not given"),
        (["--recipe", "joint", "--model", "x.pt", "--teacher", "t.pt"], "--prompts: not given"),
        (["--recipe", "paper", "--teacher", "t.pt"], "--model: not given, and --recipe paper on checkpoints needs it"),
        (["--recipe", "teacher", "--teacher", "t.pt"], "--teacher: only for"),
        (["--recipe", "teacher", "--config", "nothing"], "nothing: neither a shipped recipe"),
        (["--recipe", "teacher", "--steps", "-3"], "steps=-3: must be a whole number of at least 1"),
        (["--recipe", "joint", "--batch", "0"], "batch=0: must be a whole number of at least 1"),
        (["--recipe", "all", "--steps", "3"], "steps and batch belong to one stage"),
        (["--recipe", "teacher", "--seed", "-1"], "seed=-1"),
        (["--recipe", "teacher"], "codec/weights.safetensors is not there yet; `dsa-engine train --recipe codec`"),
        (["--recipe", "student", "--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_what_train_refuses_it_refuses_in_one_line(run, tmp_path, args, said):
    code, out, err = run("train", *args)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert not any(tmp_path.rglob("*.pt")) and not any(tmp_path.rglob("*.safetensors"))
