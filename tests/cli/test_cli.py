"""The command line: real files from a tiny untrained model, and every error in one line with nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsa_engine import cli, doctor
from dsa_engine.checkpoints import load
from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine.session import Session
from dsa_engine.media import mp4
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.ops import dispatch
from dsa_engine.pipeline import Pipeline
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.shapes.text_encoder import SlotTextEncoder

ROOT = Path(__file__).parents[2]
PROMPT, OTHER, THIRD = "a red circle jumps", "a blue square moves sideways on navy", "a green cross rests"
FILES = ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Two layers; 32x32 pixels at 12 fps, 15 frames in 5 chunks; random weights, so that confidences differ."""
    torch.manual_seed(0)
    config = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=4, freq_dim=16)
    dit, head = CausalDiT(config), ConfidenceHead(config)
    for parameter in [*dit.parameters(), *head.mlp[2].parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    modules = {"generator": dit, "confidence": head, "codec": PixelCodec(ch=32), "text": SlotTextEncoder(16)}
    folder = tmp_path_factory.mktemp("tiny")
    rollout = RolloutConfig(window=9, shift=3.0, threshold=0.428, presets={"fast": 0.4})
    load.save(folder, "tiny", modules, rollout, {"height": 32, "width": 32, "frames": 15, "fps": 12.0})
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """run("generate", ...) in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *args: object) -> tuple[int, str, str]:
        extra = ["--model", str(model)] if command == "generate" and "--model" not in args else []
        code = cli.main([command, *map(str, args), *extra])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def facts(run):
    """The JSON of a run that must succeed."""

    def call(*args: object) -> dict:
        code, out, err = run(*args, "--json")
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    return call


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_rgb().to_ndarray() for f in container.decode(stream)]), float(stream.average_rate)


def by_hand(model: Path, switches: dict[int, str] | None = None, recache: bool = True, **options):
    """What the command should have made, through the session API alone."""
    chunks = []
    with Pipeline.from_pretrained(model) as pipe, pipe.session(PROMPT, **options) as session:
        while not session.exhausted:
            if session.index in (switches or {}):
                session.update(switches[session.index], recache=recache)
            chunks.append(session.next_chunk())
    return chunks


def least(chunks) -> list[float]:
    return [min(c.confidence) for c in chunks]


# generate


def test_the_file_holds_what_the_session_makes(facts, model, tmp_path):
    said = facts("generate", PROMPT, "-o", "new/clip.mp4", "--seed", 3, "--steps", "per-chunk:4,2,1,3")
    chunks = by_hand(model, seed=3, step_policy="per-chunk:4,2,1,3", num_frames=15)
    frames = np.concatenate([c.frames for c in chunks])
    file, rate = decoded(tmp_path / "new" / "clip.mp4")
    expected = np.kron(frames, np.ones((1, 8, 8, 1), dtype=np.uint8))
    assert file.shape == (15, 256, 256, 3) == expected.shape and rate == 12
    assert 10 * np.log10(255**2 / ((file.astype(float) - expected) ** 2).mean()) > 35
    assert os.listdir(tmp_path / "new") == ["clip.mp4"]
    assert said["steps_per_chunk"] == [4, 2, 1, 3, 3] == [c.steps for c in chunks]
    assert said["confidence"] == pytest.approx(least(chunks), abs=1e-4)
    assert len(set(said["confidence"])) == 5, "the tiny model's confidences must differ for this to mean anything"


def test_json_says_everything_and_agrees_with_itself(facts, model):
    flags = ("--frames", 9, "--seed", 5, "--steps", "fixed:2", "--report", "r.png", "-o", "c.mp4")
    said = facts("generate", PROMPT, *flags)
    assert said["frames"] == 9 and said["seconds"] == pytest.approx(9 / 12) and said["clip_fps"] == 12
    assert said["mean_steps"] == pytest.approx(sum(said["steps_per_chunk"]) / len(said["steps_per_chunk"]))
    assert said["steps_per_chunk"] == [2, 2, 2] and len(said["confidence"]) == 3
    assert (said["size"], said["scale"], said["seed"], said["policy"]) == ("32x32", 8, 5, "fixed:2")
    assert (said["output"], said["report"], said["model"]) == ("c.mp4", "r.png", str(model))
    assert said["prompts"] == [{"chunk": 0, "seconds": 0.0, "prompt": PROMPT}]
    assert said["device"] == "cpu" and said["backend"] == "torch" and said["threads"] == 1
    assert 0 < said["first_frame_ms"] < 1e3 * 9 / said["fps"] and said["warmup_ms"] > 0


@pytest.mark.parametrize("flags, graphs", [((), True), (("--no-graphs",), False)])
def test_graphs_are_captured_for_a_clip_unless_told_not_to(run, monkeypatch, flags, graphs):
    """Capturing takes longer than they save in one short clip."""
    asked = []
    monkeypatch.setattr(Pipeline, "warmup", lambda pipe, progress, graphs: asked.append(graphs) or 0.5)
    code, _, _ = run("generate", PROMPT, "--json", "--frames", 3, *flags)
    assert code == 0 and asked == [graphs]


def test_a_server_that_nobody_told_how_many_makes_room_for_what_fits(model, monkeypatch):
    """Then, and only then, are places bounded by the memory there is."""
    asked, served = [], []
    load = Pipeline.from_pretrained
    monkeypatch.setattr(
        Pipeline,
        "from_pretrained",
        lambda *args, **options: asked.append(options["max_sessions"]) or load(*args, **options),
    )
    monkeypatch.setattr(Pipeline, "make_room", lambda pipe, wanted: setattr(pipe.engine, "max_sessions", 9) or 9)
    monkeypatch.setattr("dsa_engine.serving.server.run", lambda pipe, limits, *_: served.append(limits))
    for flags in ((), ("--max-jobs", 2)):
        assert cli.main(["serve", "--model", str(model), "--device", "cpu", "--port", "0", *map(str, flags)]) == 0
    assert asked == [None, 34]
    assert [(limits.sessions, limits.jobs) for limits in served] == [(8, 1), (32, 2)]


def test_the_clock_counts_the_engine_not_the_file(facts, monkeypatch):
    """On a clock of our own, a session takes 1/4 s to open, an update 1/8 s, a chunk 1/2 s, a write 7 s."""
    clock = [100.0]

    def costs(owner, name, seconds):
        original = getattr(owner, name)

        def timed(*args, **options):
            clock[0] += seconds
            return original(*args, **options)

        monkeypatch.setattr(owner, name, timed)

    monkeypatch.setattr(cli, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    costs(Pipeline, "session", 1 / 4)
    costs(Session, "update", 1 / 8)
    costs(Session, "next_chunk", 1 / 2)
    costs(mp4.Mp4Writer, "write", 7)
    said = facts("generate", PROMPT, "-o", "c.mp4", "--steps", "fixed:1", "--at", "6f", OTHER)
    assert said["fps"] == pytest.approx(15 / (1 / 4 + 1 / 8 + 5 / 2), abs=1e-3)
    assert said["first_frame_ms"] == 750


def test_the_default_policy_is_the_models_and_is_named_truly(facts, model):
    default = facts("generate", PROMPT)
    chunks = by_hand(model, num_frames=15)
    assert default["steps_per_chunk"] == [c.steps for c in chunks]
    assert default["confidence"] == pytest.approx(least(chunks), abs=1e-4)
    named = facts("generate", PROMPT, "--steps", default["policy"])
    assert named["policy"] == "confidence:0.428"
    assert (named["steps_per_chunk"], named["confidence"]) == (default["steps_per_chunk"], default["confidence"])
    assert len(set(default["steps_per_chunk"])) > 1, "a policy that never decides would pass unseen"


def test_switches_take_effect_at_the_nearest_chunk(facts, model):
    """Chunks start at 0, 3, 6, 9, 12 of 15 frames: 0.4 s is frame 4.8, nearer to 6 than to 3; 11 is nearer to 12."""
    at = ("--at", "0.4s", OTHER, "--at", "11f", THIRD)
    said = facts("generate", PROMPT, *at)
    assert said["prompts"] == [
        {"chunk": 0, "seconds": 0.0, "prompt": PROMPT},
        {"chunk": 2, "seconds": 0.5, "prompt": OTHER},
        {"chunk": 4, "seconds": 1.0, "prompt": THIRD},
    ]
    chunks = by_hand(model, {2: OTHER, 4: THIRD}, num_frames=15)
    assert said["confidence"] == pytest.approx(least(chunks), abs=1e-4)
    assert said["confidence"] != pytest.approx(least(by_hand(model, {3: OTHER, 4: THIRD}, num_frames=15)), abs=1e-4)
    kept = facts("generate", PROMPT, *at, "--no-recache")
    assert kept["confidence"] == pytest.approx(
        least(by_hand(model, {2: OTHER, 4: THIRD}, False, num_frames=15)), abs=1e-4
    )
    assert kept["confidence"] != said["confidence"]


def test_the_log_says_where_a_switch_lands(run):
    _, _, err = run("generate", PROMPT, "--at", "0.4s", OTHER, "--steps", "fixed:1")
    assert f"from 0.5 s (frame 6, chunk 2): {OTHER}" in err


@pytest.mark.parametrize(
    "flags, options",
    [
        (("--window", 6), {"window": 6}),
        (("--window", -1), {"window": -1}),
        (("--sink", 3), {"sink": 3}),
        (("--commit", "exit_step"), {"commit": "exit_step"}),
        (("--height", 48, "--width", 16), {"height": 48, "width": 16}),
    ],
)
def test_flags_reach_the_session(facts, model, flags, options):
    said = facts("generate", PROMPT, "--steps", "fixed:2", *flags)
    chunks = by_hand(model, step_policy="fixed:2", num_frames=15, **options)
    assert said["confidence"] == pytest.approx(least(chunks), abs=1e-4)
    assert said["size"] == "{1}x{0}".format(*chunks[0].frames.shape[1:3])
    plain = least(by_hand(model, step_policy="fixed:2", num_frames=15))
    assert said["confidence"] != pytest.approx(plain, abs=1e-4), "the flag must change something"


@pytest.mark.parametrize("seconds, frames", [(0.5, 6), (0.6, 6), (0.65, 9), (0.01, 3)])
def test_seconds_round_to_whole_chunks(facts, seconds, frames):
    assert facts("generate", PROMPT, "--seconds", seconds, "--steps", "fixed:1")["frames"] == frames


def test_without_json_a_summary_and_out_mp4(run, tmp_path):
    code, out, err = run("generate", PROMPT, "--steps", "per-chunk:4,1", "--scale", 2)
    assert code == 0 and os.listdir(tmp_path) == ["out.mp4"]
    assert decoded("out.mp4")[0].shape == (15, 64, 64, 3)
    assert "15 frames in 5 chunks, 1.60 steps a chunk (per-chunk:4,1)" in out and "wrote out.mp4" in out
    assert "steps=4, confidence=0." in err and "5/5" in err, "the progress bar tells of each chunk"


def test_json_alone_writes_no_file(facts, tmp_path):
    said = facts("generate", PROMPT, "--steps", "fixed:1")
    assert said["output"] is None and said["report"] is None and os.listdir(tmp_path) == []


def test_the_report_gets_the_clips_data(run, monkeypatch, model, tmp_path):
    seen, figure = {}, mp4.report_figure

    def spy(chunks, **options):
        seen.update(options, chunks=chunks)
        return figure(chunks, **options)

    monkeypatch.setattr(mp4, "report_figure", spy)
    code, _, err = run("generate", PROMPT, "--report", "r.png", "--at", "9f", OTHER)
    assert code == 0 and os.listdir(tmp_path) == ["r.png"], err
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    chunks = by_hand(model, {3: OTHER}, num_frames=15)
    assert (seen["threshold"], seen["max_steps"]) == (0.428, 4)
    assert [c.steps for c in seen["chunks"]] == [c.steps for c in chunks]
    assert [c.prompt for c in seen["chunks"]] == [PROMPT] * 3 + [OTHER] * 2
    for shown, made in zip(seen["chunks"], chunks, strict=True):
        assert np.array_equal(shown.frames, made.frames)  # a chunk of three frames: first, middle, last are all


NOT_A_PROMPT = "a purple circle jumps"


@pytest.mark.parametrize(
    "args, messages",
    [
        ([NOT_A_PROMPT], ["'a purple circle jumps' must read: a <red|", "the nearest is: a "]),
        ([" "], ["empty"]),
        ([PROMPT, "--at", "6f", NOT_A_PROMPT], ["'a purple circle jumps' must read: a <red|", "the nearest is: a "]),
        ([PROMPT, "--at", "6f", OTHER, "--at", "9f", ""], ["empty"]),
        ([PROMPT, "--at", "2", OTHER], ["--at 2:", "2s, 1.5s or 24f"]),
        ([PROMPT, "--at", "1e1f", OTHER], ["--at 1e1f:"]),
        ([PROMPT, "--at", "5s", OTHER], ["--at 5s:", "end at 15f (1.25s)", "nearest possible is 12f"]),
        ([PROMPT, "--at", "15f", OTHER], ["--at 15f:", "nearest possible is 12f"]),
        ([PROMPT, "--at", "14f", OTHER], ["--at 14f:", "nearest possible is 12f"]),
        ([PROMPT, "--at", "0s", OTHER], ["--at 0s:", "start", "nearest possible is 3f"]),
        ([PROMPT, "--at", "0.1s", OTHER, "--frames", "3"], ["--at 0.1s:", "nothing can switch"]),
        ([PROMPT, "--at", "9f", OTHER, "--at", "6f", THIRD], ["--at 6f:", "must rise"]),
        ([PROMPT, "--at", "6f", OTHER, "--at", "0.5s", THIRD], ["--at 0.5s:", "must rise"]),
        ([PROMPT, "--at", "6f", OTHER, "--at", "7f", THIRD], ["--at 7f:", "takes effect at 6f, as the one before"]),
        ([PROMPT, "--frames", "10"], ["--frames 10:", "nearest is 9"]),
        ([PROMPT, "--frames", "0"], ["--frames 0:", "nearest is 3"]),
        ([PROMPT, "--seconds", "0"], ["--seconds 0.0:"]),
        ([PROMPT, "--seconds", "nan"], ["--seconds nan:"]),
        ([PROMPT, "--steps", "fixed:9"], ["must be from 1 to 4", "nearest is 4"]),
        ([PROMPT, "--steps", "slowest"], ["'slowest'", "dsa, fixed, fast", "fixed:4"]),
        ([PROMPT, "--steps", "confidence:1.5"], ["threshold=1.5", "nearest is 1.0"]),
        ([PROMPT, "--height", "40"], ["multiples of 16"]),
        ([PROMPT, "--window", "2"], ["window=2"]),
        ([PROMPT, "--seed", "-1"], ["seed=-1"]),
        ([PROMPT, "--scale", "0"], ["scale=0"]),
        ([PROMPT, "-o", "clip.avi"], ["clip.avi: must end in .mp4"]),
        ([PROMPT, "--report", "r.jpg"], ["r.jpg: must end in .png"]),
        ([PROMPT, "--model", "nowhere"], ["nowhere: neither a shipped model"]),
        ([PROMPT, "--device", "banana"], ["banana"]),
    ],
)
def test_errors_are_one_line_before_anything_is_made(run, monkeypatch, tmp_path, args, messages):
    def never(*_, **__):
        raise AssertionError("something was made")

    monkeypatch.setattr(Session, "next_chunk", never)
    monkeypatch.setattr(Pipeline, "warmup", never)
    given = [] if "-o" in args or "--report" in args else ["-o", "new/out.mp4"]
    code, out, err = run("generate", *args, *given)
    assert (code, out) == (2, "")
    assert err.startswith("dsa-engine: error: ") and err.count("\n") == 1 and "Traceback" not in err
    for message in messages:
        assert message in err
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_said(run):
    code, _, err = run("generate", PROMPT, "--device", "cuda")
    assert code == 2 and "device='cuda'" in err and "device='cpu'" in err


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


@pytest.mark.parametrize("failure, code", [(RuntimeError("out of\nmemory"), 2), (KeyboardInterrupt(), 130)])
def test_a_failure_on_the_way_keeps_the_old_files(run, monkeypatch, tmp_path, failure, code):
    (tmp_path / "c.mp4").write_bytes(b"old clip")
    (tmp_path / "r.png").write_bytes(b"old report")
    make = Session.next_chunk

    def fails_late(session):
        if session.index == 3:
            raise failure
        return make(session)

    monkeypatch.setattr(Session, "next_chunk", fails_late)
    got, out, err = run("generate", PROMPT, "-o", "c.mp4", "--report", "r.png", "--json")
    assert (got, out) == (code, "") and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last == ("dsa-engine: interrupted" if code == 130 else "dsa-engine: error: out of memory")
    assert sorted(os.listdir(tmp_path)) == ["c.mp4", "r.png"]
    assert (tmp_path / "c.mp4").read_bytes() == b"old clip" and (tmp_path / "r.png").read_bytes() == b"old report"


def test_a_model_without_decoder_makes_no_video(run, tmp_path):
    """A bare checkpoint of the Wan family: it says so, instead of failing on a missing part."""
    config = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=1, text_dim=16, text_len=4, freq_dim=16)
    save_file(CausalDiT(config).state_dict(), tmp_path / "wan.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code, _, err = run("generate", PROMPT, "--model", "wan.safetensors")
    assert code == 2 and "wan.safetensors: has no decoder" in err


# info


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
    assert "<red|green" in said["prompts"]


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


def test_generate_in_fp8(facts, model):
    said = facts("generate", PROMPT, "--model", model, "--frames", "3", "--quantization", "fp8")
    assert said["quantization"] == "fp8" and said["frames"] == 3


def test_info_of_a_checkpoint_says_what_memory_it_would_take(facts, model, tmp_path):
    dit = Pipeline.from_pretrained(model).engine.dit
    save_file(dit.state_dict(), tmp_path / "longlive.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dit.config.to_dict()))
    said = facts("info", tmp_path / "longlive.safetensors")
    assert "a window of 12 latent frames" in said["memory"]["for"] and "umT5" in said["memory"]["for"]
    assert said["memory"]["held"]["generator"] == 2 * said["parameters"]
    torch.save(PixelCodec().state_dict(), tmp_path / "codec.pt")
    assert "memory" not in facts("info", tmp_path / "codec.pt")


# doctor


def test_doctor_says_whether_fp8_runs(facts, monkeypatch):
    assert facts("doctor")["fp8"] == ("in hardware" if torch.cuda.is_available() else "only its numbers, on a CPU")
    monkeypatch.setattr("dsa_engine.doctor.unavailable", lambda device: "compute capability 8.0: e4m3 needs 8.9")
    assert facts("doctor")["fp8"] == "compute capability 8.0: e4m3 needs 8.9"


def test_doctor_finds_this_machine_fit(facts):
    said = facts("doctor")
    assert said["ok"] and said["fails"] == {} and {"video", "engine"} <= said["works"].keys()
    assert said["versions"]["torch"] == torch.__version__ and said["versions"]["av"] == av.__version__
    assert said["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["device"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert set(said["ops"]) == set(dispatch.STEM_OF)
    assert all(why.startswith("torch: the tensors are on a CPU") for why in said["ops"].values())
    assert said["models"] == load.shipped()


@pytest.mark.parametrize("broken", ["video.write_mp4", "Pipeline.generate_latents"])
def test_doctor_exits_with_1_where_something_does_not_run(run, monkeypatch, broken):
    def fails(*_, **__):
        raise OSError("libx264\nis missing")

    monkeypatch.setattr(f"dsa_engine.cli.{broken}", fails)
    code, out, _ = run("doctor")
    assert code == 1 and "OSError: libx264 is missing" in out and "does not run here" in out
    code, out, _ = run("doctor", "--json")
    assert code == 1 and json.loads(out)["ok"] is False


def test_doctor_sees_an_encoder_that_returns_rubbish_and_a_model_that_gives_nan(run, monkeypatch):
    monkeypatch.setattr("dsa_engine.media.mp4.read_mp4", lambda path: (np.zeros((2, 16, 16, 3), np.uint8), 2.0))
    monkeypatch.setattr("dsa_engine.cli.Pipeline.generate_latents", lambda *a, **k: torch.tensor(float("nan")))
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
    assert set(extras) - set(doctor.EXTRAS) == {"test"}


def test_doctor_probes_flash_attn_without_importing_it(facts, monkeypatch, tmp_path):
    assert facts("doctor")["optional"]["flash-attn"] == "missing; it comes with dsa-engine[flash]"
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts("doctor")["optional"]["flash-attn"] == "2.8.3"


# As a program


def program(folder: Path, *args: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dsa_engine", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


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


def test_a_head_for_a_checkpoint_from_the_command_line(run, model, tmp_path):
    """A model without a head, its prompts in a file: the head file is there, and steps follow its thresholds."""
    pipe = Pipeline.from_pretrained(model)
    parts = {"generator": pipe.engine.dit, "codec": pipe.engine.decoder, "text": pipe.engine.text}
    bare = tmp_path / "bare"
    load.save(
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


@pytest.mark.parametrize(
    "args, said",
    [
        (["--recipe", "teacher", "--model", "x.pt"], "--model: only for --recipe head"),
        (["--recipe", "head", "--prompts", "p.txt"], "--prompts: only for --recipe head with --model"),
        (["--recipe", "head", "--model", "shapes"], "--prompts: what to roll out is needed"),
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
