"""`dsa-engine convert`."""

from __future__ import annotations

import json

import torch

from dsa_engine.pipeline import Pipeline


def test_a_checkpoint_is_told_converted_and_loaded_again(run, model, tmp_path):
    """A Self-Forcing-style `.pt` -> our folder -> diffusers' layout: info knows each, the weights stay the same."""
    dit = Pipeline.from_pretrained(model).engine.dit
    source = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator_ema": {f"model.{name}": value for name, value in dit.state_dict().items()}}, source)
    (tmp_path / "config.json").write_text(json.dumps(dit.config.to_dict()))
    code, out, err = run("info", source, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["family"] == "self-forcing" and found["tensors"] == len(dit.state_dict())
    assert found["parameters"] == sum(p.numel() for p in dit.parameters()) and found["key"] == "generator_ema"
    code, out, err = run("convert", source, tmp_path / "ours", "--dtype", "float32", "--json")
    assert code == 0 and json.loads(out)["wrote"] == str(tmp_path / "ours"), err
    code, out, err = run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers")
    assert code == 0, err
    for folder in ("ours", "theirs"):
        loaded = Pipeline.from_pretrained(tmp_path / folder).engine.dit
        assert all(value.equal(dit.state_dict()[name]) for name, value in loaded.state_dict().items())
    code, out, err = run("convert", source, tmp_path / "ours")
    assert code == 2 and "is there already" in err
