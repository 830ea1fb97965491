"""`dsa-engine info`."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsa_engine.pipeline import Pipeline
from dsa_engine.shapes.codec import PixelCodec
from tests.support.command_line import PROMPT


def test_info_of_a_folder(facts, model):
    said = facts("info", model)
    with safe_open(model / "model.safetensors", "pt") as file:  # running statistics of the codec are no parameters
        names = [n for n in file.keys() if "running_" not in n and "num_batches" not in n]  # noqa: SIM118
        sizes = {n: prod(file.get_slice(n).get_shape()) for n in names}
    for part in ("generator", "confidence", "codec", "text"):
        assert said["parameters"][part] == sum(size for n, size in sizes.items() if n.startswith(part + ".")) > 0
    share = said["parameters"]["confidence"] / said["parameters"]["generator"]
    assert said["confidence_percent"] == pytest.approx(100 * share, rel=1e-2)
    # K and V, 2 layers, 9 frames and a chunk more of 2x2 tokens (4x4 latents, patch 2), 48 channels, 4 bytes
    assert said["cache_bytes"] == 2 * 2 * (9 + 3) * 4 * 48 * 4 and said["dtype"] == "float32"
    assert said["sigmas"] == [1.0, 0.9, 0.75, 0.5]  # 3 s / (1 + 2 s)
    assert (said["name"], said["weights"]) == ("tiny", str(model))
    assert (said["window"], said["sink"], said["chunk_frames"], said["shift"]) == (9, 0, 3, 3.0)
    assert (said["threshold"], said["presets"], said["steps"]) == (0.428, {"fast": 0.4}, [1000, 750, 500, 250])
    assert (said["size"], said["frames"], said["fps"]) == ("32x32", 15, 12.0)
    assert "<red|green" in said["prompts"] and said["head"] == {"kind": "pooled"}


def test_the_cache_bytes_are_what_a_session_takes(facts, model):
    with Pipeline.from_pretrained(model, max_sessions=1) as pipe, pipe.session(PROMPT):
        (inputs,) = pipe.engine._pools.values()
        assert facts("info", model)["cache_bytes"] == inputs.cache.nbytes == pipe.engine.cache_bytes - inputs.nbytes
        held = facts("info", model)["memory"]["held"]
        assert held["prompt_kv"] + held["inputs"] >= inputs.nbytes - 500  # counters and levels are not worth counting


@pytest.mark.parametrize(
    "name, billions, cache",
    [  # K and V, layers, 21 latent frames of 30 x 52 tokens, dim, 2 bytes
        ("wan2.1-t2v-1.3b", 1.42, 2 * 30 * 21 * 1560 * 1536 * 2),
        ("wan2.1-t2v-14b", 14.29, 2 * 40 * 21 * 1560 * 5120 * 2),
    ],
)
def test_info_of_a_preset_needs_no_weights(facts, name, billions, cache):
    said = facts("info", name)
    assert said["parameters"]["generator"] / 1e9 == pytest.approx(billions, abs=0.005)
    assert (said["cache_bytes"], said["dtype"], said["weights"]) == (cache, "bfloat16", None)
    assert said["sigmas"] == [1.0, 0.9375, 0.8333, 0.625] and said["window"] is None


def test_info_for_people_and_for_an_unknown_model(run, model):
    code, out, _ = run("info", model)
    lines = dict(line.split(None, 1) for line in out.splitlines() if line.startswith(("  codec", "shift", "sigmas")))
    assert code == 0 and lines == {"codec": "151,100", "shift": "3.0", "sigmas": "1.0, 0.9, 0.75, 0.5"}
    code, out, err = run("info", "nowhere")
    assert (code, out) == (2, "") and err.startswith("dsa-engine: error: nowhere: neither a shipped model")


def test_info_says_what_memory_a_model_takes(facts, model, run):
    said = facts("info", "wan2.1-t2v-1.3b")["memory"]
    assert said["fits"]["12 GB"] == "offload text,vae" and said["peak"]["offload text,vae"] < 12e9
    assert (said["held"]["generator"], said["held"]["text"]) == (2 * 1_418_996_800, 2 * 5_680_910_336)
    assert "measured" not in said and "latents of 104x60, a window of 21 latent frames, bfloat16" in said["for"]
    code, out, _ = run("info", "wan2.1-t2v-1.3b")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and {"12 GB offload text,vae", "kv cache 6.04 GB", "8 GB none"} <= set(lines)
    mine = facts("info", model)
    weights = {part: sum(places.values()) for part, places in mine["memory"]["measured"]["weights"].items()}
    assert {part: count // 4 for part, count in weights.items() if part != "vae"} == {
        part: count for part, count in mine["parameters"].items() if part != "codec"
    }
    held = mine["memory"]["held"]
    assert held["kv_cache"] == mine["cache_bytes"] and held["vae"] == weights["vae"] > 4 * mine["parameters"]["codec"]
    assert mine["memory"]["measured"]["process_peak"] >= mine["memory"]["measured"]["process"] > 10**7


@pytest.mark.parametrize(
    "name, linear, cache", [("fp8", True, True), ("fp8-linear", True, False), ("fp8-cache", False, True)]
)
def test_info_in_fp8(facts, name, linear, cache):
    """Half the cache, and the blocks' weights in a byte each: 2.84 GB become 1.59."""
    plain, said = facts("info", "wan2.1-t2v-1.3b"), facts("info", "wan2.1-t2v-1.3b", "--quantization", name)
    assert (plain["quantization"], said["quantization"]) == (None, name)
    assert said["memory"]["held"]["generator"] / 1e9 == pytest.approx(1.59 if linear else 2.84, abs=0.005)
    assert said["cache_bytes"] / plain["cache_bytes"] == pytest.approx(0.5 if cache else 1.0, abs=1e-4)
    assert ("linear in FP8" in said["memory"]["for"], "cache in FP8" in said["memory"]["for"]) == (linear, cache)
    table = said["memory"]["sessions"]["80 GB, window 12"]
    assert table["float8_e4m3fn"] > table["bfloat16"] >= 8


def test_info_of_a_checkpoint_says_what_memory_it_would_take(facts, model, tmp_path):
    dit = Pipeline.from_pretrained(model).engine.dit
    save_file(dit.state_dict(), tmp_path / "longlive.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dit.config.to_dict()))
    said = facts("info", tmp_path / "longlive.safetensors")
    assert "a window of 12 latent frames" in said["memory"]["for"] and "umT5" in said["memory"]["for"]
    assert said["memory"]["held"]["generator"] == 2 * said["parameters"]
    torch.save(PixelCodec().state_dict(), tmp_path / "codec.pt")
    assert "memory" not in facts("info", tmp_path / "codec.pt")
