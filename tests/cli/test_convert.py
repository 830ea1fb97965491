"""`dsa-engine convert`."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

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


def test_an_adapters_scale_is_told_and_its_strength_given(run, model, tmp_path, close):
    """alpha / r = 16 / 4 from the header alone, of which half is merged."""
    dit = Pipeline.from_pretrained(model).engine.dit
    source, lora, name = tmp_path / "w.safetensors", tmp_path / "style.safetensors", "blocks.0.self_attn.q"
    save_file(dit.state_dict(), source)
    (tmp_path / "config.json").write_text(json.dumps(dit.config.to_dict()))
    weight = dit.state_dict()[f"{name}.weight"]
    a, b = torch.randn(4, weight.shape[1]), torch.randn(len(weight), 4)
    pair = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(pair, lora, {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})})
    code, out, err = run("info", lora)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and {"scales 4.0", "scale source its header's lora_alpha"} <= set(lines), out + err
    target = tmp_path / "merged"
    code, _, err = run("convert", source, target, "--lora", lora, "--lora-strength", "0.5", "--dtype", "float32")
    assert code == 0, err
    close(Pipeline.from_pretrained(target).engine.dit.state_dict()[f"{name}.weight"], weight + 2 * b @ a, 1e-5)
    merged = Pipeline.from_pretrained(source, lora=lora, lora_strength=0.5).engine.dit.state_dict()
    close(merged[f"{name}.weight"], weight + 2 * b @ a, 1e-5)
    for command in (("convert", source, tmp_path / "x"), ("generate", "a prompt", "--model", source)):
        code, _, err = run(*command, "--lora-strength", "0.5")
        assert code == 2 and "lora_strength=0.5: there is no adapter to merge" in err
