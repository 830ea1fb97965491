"""What is written is what is read: model folders with their calibration, heads alone; bad files are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsa_engine import Pipeline
from dsa_engine.checkpoints.load import load_components
from dsa_engine.checkpoints.model_folder import load_head, save_head, save_model_folder
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.models.confidence import ConfidenceHead, PooledHead, TokenHead

ROLLOUT = RolloutConfig(threshold=0.4, presets={"fast": 0.3, "balanced": 0.4})
POINTS = ((0.1, 0.5), (0.6, 0.2), (0.9, 0.2))


@pytest.fixture
def head(tiny_config) -> ConfidenceHead:
    head = PooledHead(tiny_config).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_()
    return head


@pytest.fixture
def saved(tmp_path, head, tiny_config):
    path = tmp_path / "new" / "head.safetensors"
    save_head(path, head, tiny_config, ROLLOUT, POINTS)
    return path


def test_a_head_comes_back_with_what_it_was_calibrated_to(saved, head, tiny_config):
    loaded = load_head(saved, tiny_config)
    weights = head.state_dict()
    assert all(value.equal(weights[name]) for name, value in loaded.head.state_dict().items())
    assert (loaded.threshold, loaded.presets, loaded.calibration) == (0.4, ROLLOUT.presets, POINTS)
    assert not any(p.requires_grad for p in loaded.head.parameters()) and not loaded.head.training
    half = load_head(saved, tiny_config, dtype=torch.bfloat16)
    assert {p.dtype for p in half.head.parameters()} == {torch.bfloat16}


def test_a_head_is_one_file_that_says_what_it_is(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["head.safetensors"]
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    assert header["format"] == "dsa_engine.head/1" and header["dim"] == "96"
    assert json.loads(header["presets"]) == ROLLOUT.presets and json.loads(header["threshold"]) == 0.4
    assert json.loads(header["calibration"]) == [list(point) for point in POINTS]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask  # others may read it, as any file


def test_a_heads_path_must_end_as_such_a_file_does(tmp_path, head, tiny_config):
    for call in (save_head, load_head):
        with pytest.raises(ValueError, match="head.pt: must end in .safetensors, as in head.safetensors"):
            call(tmp_path / "head.pt", *([head] if call is save_head else []), tiny_config, ROLLOUT)


def rewritten(path, tensors=None, **changes):
    """The file with other tensors or another header; None drops an entry."""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **changes}
    save_file(tensors or load_file(path), path, {k: v for k, v in header.items() if v is not None})
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": "dsa_engine.head/2"}, "format='dsa_engine.head/2', expected 'dsa_engine.head/1'"),
        ({"format": None}, "format=None, expected 'dsa_engine.head/1'"),
        ({"dim": "1536"}, "a head for models of dim=1536, this one has dim=96"),
        ({"dim": None}, "header does not say .*dim"),
        ({"presets": "{"}, "header does not say"),
        ({"presets": "[1]"}, "header does not say"),
        ({"presets": '{"fast": 1.5}'}, "fast=1.5: must be within"),
        ({"threshold": '"high"'}, "header does not say"),
        ({"calibration": "[[0.5, 0.1], [0.4, 0.05]]"}, "confidences must rise"),
        ({"calibration": "[[0.4, 0.1], [0.5, 0.2]]"}, "errors must not rise"),
        ({"calibration": "[[0.4, NaN]]"}, "must rise"),
        ({"calibration": "[0.4]"}, "must be pairs"),
        ({"tensors": {"mlp.0.weight": torch.zeros(48, 288)}}, "3 missing: mlp.0.bias, mlp.2.bias, mlp.2.weight"),
    ],
)
def test_a_file_that_is_no_head_for_the_model_is_named(saved, tiny_config, changes, words):
    path = rewritten(saved, **changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{words}"):
        load_head(path, tiny_config)


@pytest.mark.parametrize("taps", [None, (0, 2)])
def test_a_token_head_comes_back_from_its_file_and_from_a_folder(tmp_path, tiny_config, tiny_dit, taps):
    head = TokenHead(tiny_config, taps).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_()
    save_head(tmp_path / "head.safetensors", head, tiny_config, ROLLOUT, POINTS)
    video = {"height": 64, "width": 64, "frames": 12, "fps": 12.0}
    save_model_folder(tmp_path, "m", {"generator": tiny_dit, "confidence": head}, ROLLOUT, video, torch.float32)
    for back in (load_head(tmp_path / "head.safetensors", tiny_config).head, load_components(tmp_path).head):
        assert type(back) is TokenHead and back.taps == head.taps
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), head.parameters(), strict=True))


def test_a_folder_or_file_from_before_there_were_two_forms_has_a_pooled_head(saved, untrained, tiny_config):
    with safe_open(rewritten(saved, head=None), "pt") as file:
        assert "head" not in file.metadata()
    assert load_head(saved, tiny_config).head.kind == load_components(untrained).head.kind == "pooled"
    assert "head" not in json.loads((untrained / "config.json").read_text())


@pytest.mark.parametrize("settings", ['{"kind": "tokens"}', '{"kind": "token", "taps": [0]}', '{"depth": 2}', "[1]"])
def test_a_form_that_is_not_known_is_named(saved, tiny_config, settings):
    with pytest.raises(ValueError, match=f"{re.escape(str(saved))}: head="):
        load_head(rewritten(saved, head=settings), tiny_config)


def test_a_head_that_is_missing_or_not_whole_is_named(saved, tiny_config):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        load_head(saved.with_name("absent.safetensors"), tiny_config)
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{re.escape(str(saved))}: not a whole safetensors file"):
        load_head(saved, tiny_config)


def test_a_given_head_replaces_a_models_own(untrained, tmp_path):
    config = ModelConfig.from_dict(json.loads((untrained / "config.json").read_text())["model"])
    path = tmp_path / "head.safetensors"
    save_head(path, PooledHead(config), config, ROLLOUT, POINTS)  # an untrained one says 0.5 of everything
    own, given = (Pipeline.from_pretrained(untrained, head=head, device="cpu") for head in (None, path))
    assert own.config.threshold == 0.5 and given.config.threshold == 0.4
    assert given.config.presets == ROLLOUT.presets and given.config.window == own.config.window == 9
    made = given("a red circle jumps", num_frames=3, output_type="latent")
    assert made.confidence == [[[0.5] * 3]] and made.steps_per_chunk == [[1]]


def test_a_head_by_its_name_is_the_file_in_the_models_folder(untrained, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(untrained, tmp_path / "model"))
    config = ModelConfig.from_dict(json.loads((untrained / "config.json").read_text())["model"])
    save_head(folder / "head-token.safetensors", TokenHead(config), config, ROLLOUT, POINTS)
    pipe = Pipeline.from_pretrained(folder, head="token", device="cpu")
    assert pipe.engine.head.kind == "token" and pipe.config.presets == ROLLOUT.presets
    with pytest.raises(ValueError, match="head='tokens': must be a .safetensors file or one that .* comes with: token"):
        Pipeline.from_pretrained(folder, head="tokens", device="cpu")
    with pytest.raises(ValueError, match="head='token': .* comes with: there are none"):
        Pipeline.from_pretrained(untrained, head="token", device="cpu")
    monkeypatch.chdir(folder)
    assert Pipeline.from_pretrained(".", head="./head-token.safetensors", device="cpu").engine.head.kind == "token"


def test_a_folder_keeps_its_calibration(untrained, tmp_path):
    parts = load_components(untrained)
    assert parts.calibration == ()
    modules = {"generator": parts.dit, "confidence": parts.head}
    video = {"height": 64, "width": 64, "frames": 12, "fps": 12.0}
    save_model_folder(tmp_path, "again", modules, parts.rollout, video, calibration=POINTS)
    assert load_components(tmp_path).calibration == POINTS
    values = json.loads((tmp_path / "config.json").read_text())
    values["calibration"] = [[0.5, -1]]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'config.json'))}: calibration="):
        load_components(tmp_path)
    with pytest.raises(ValueError, match="confidences must rise"):
        save_model_folder(tmp_path, "again", modules, parts.rollout, video, calibration=[(0.5, 0.1), (0.5, 0.1)])


def test_the_expected_error_lies_on_the_calibration(untrained):
    pipe = Pipeline.from_pretrained(untrained, device="cpu")
    pipe.calibration = POINTS
    assert [pipe.expected_error(confidence) for confidence, _ in POINTS] == [error for _, error in POINTS]
    assert pipe.expected_error([0.0, 0.35, 1.0]) == pytest.approx([0.5, 0.35, 0.2])
    with pytest.raises(ValueError, match=r"confidence=1.2: must be within \[0, 1\]; nearest is 1.0"):
        pipe.expected_error(1.2)
