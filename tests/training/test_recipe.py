"""Recipes: what ships loads, and what does not fit is named with what would."""

from __future__ import annotations

import pytest

from dsa_engine.config import RolloutConfig
from dsa_engine.training import recipe


def test_the_shipped_recipe_is_that_of_the_shipped_model():
    from dsa_engine.checkpoints.load import load_components

    plan = recipe.load("shapes")
    shipped = load_components("shapes").rollout
    assert plan.name == "shapes" and "shapes" in recipe.shipped()
    for name in ("chunk_frames", "window", "sink", "steps", "shift"):
        assert getattr(plan.rollout, name) == getattr(shipped, name)


def test_a_file_says_what_differs_from_the_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 7\n[rollout]\nwindow = 6\n[teacher]\nsteps = 12\nrate = 1\n")
    plan = recipe.load(path)
    assert (plan.name, plan.seed, plan.teacher.steps, plan.teacher.rate) == ("mine", 7, 12, 1)
    assert plan.teacher.batch == recipe.TeacherStage().batch
    assert plan.rollout == RolloutConfig(window=6)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[teacher]\nstep = 3", "unknown key 'step'.*nearest is steps"),
        ("[teacher]\nsteps = 0", "steps=0: must be a whole number of at least 1; nearest is"),
        ("[teacher]\nbatch = 2.5", "batch=2.5: must be a whole number"),
        ("[student]\nrate = -1.0", "rate=-1.0: must be a number > 0"),
        ("[student]\nrate = 'fast'", "rate='fast': must be a number"),
        ("seed = -1", "seed=-1: must be a whole number of at least 0"),
        ("steps = 5", "unknown key 'steps'"),
        ("[rollout]\nwindows = 3", "unknown keys windows"),
        ("[teacher\n", "not a TOML file"),
    ],
)
def test_what_a_recipe_cannot_say(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        recipe.load(path)


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="neither a shipped recipe .*shapes.* nor a TOML file"):
        recipe.load("circles")


def test_replace_checks_as_loading_does():
    plan = recipe.load("shapes")
    assert plan.replace("student", steps=3, batch=None).student.steps == 3
    assert plan.replace("student", steps=3).student.batch == plan.student.batch
    with pytest.raises(ValueError, match="steps=-3"):
        plan.replace("teacher", steps=-3)
    with pytest.raises(ValueError, match="seed=-2"):
        recipe.with_seed(plan, -2)
