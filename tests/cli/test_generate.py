"""`dsa-engine generate`: real files from a tiny untrained model, and every error in one line with nothing written."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsa_engine import Relative
from dsa_engine.cli import generate
from dsa_engine.config import ModelConfig
from dsa_engine.engine.session import Session
from dsa_engine.media import mp4, report
from dsa_engine.models.dit import CausalDiT
from dsa_engine.pipeline import Pipeline
from tests.support.command_line import OTHER, PROMPT, THIRD, by_hand, decoded, min_confidences

NOT_A_PROMPT = "a purple circle jumps"


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
    assert said["confidence"] == pytest.approx(min_confidences(chunks), abs=1e-4)
    assert len(set(said["confidence"])) == 5, "the tiny model's confidences must differ for this to mean anything"


def test_steps_relative_to_the_chunk_before(facts, model):
    said = facts("generate", PROMPT, "--seed", 3, "--steps", "relative:mean")
    chunks = by_hand(model, seed=3, step_policy=Relative(frame_reduce="mean"), num_frames=15)
    assert said["policy"] == "relative:mean" and said["steps_per_chunk"] == [c.steps for c in chunks]
    before = [1.0, *(np.mean(chunk.confidence) for chunk in chunks)]
    for chunk, least in zip(chunks, before):
        assert chunk.steps == 4 or np.mean(chunk.confidence) >= least - 1e-6


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


def test_the_clock_counts_the_engine_not_the_file(facts, monkeypatch):
    """On a clock of our own, a session takes 1/4 s to open, an update 1/8 s, a chunk 1/2 s, a write 7 s."""
    clock = [100.0]

    def costs(owner, name, seconds):
        original = getattr(owner, name)

        def timed(*args, **options):
            clock[0] += seconds
            return original(*args, **options)

        monkeypatch.setattr(owner, name, timed)

    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
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
    assert default["confidence"] == pytest.approx(min_confidences(chunks), abs=1e-4)
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
    assert said["confidence"] == pytest.approx(min_confidences(chunks), abs=1e-4)
    assert said["confidence"] != pytest.approx(
        min_confidences(by_hand(model, {3: OTHER, 4: THIRD}, num_frames=15)), abs=1e-4
    )
    kept = facts("generate", PROMPT, *at, "--no-recache")
    assert kept["confidence"] == pytest.approx(
        min_confidences(by_hand(model, {2: OTHER, 4: THIRD}, False, num_frames=15)), abs=1e-4
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
    assert said["confidence"] == pytest.approx(min_confidences(chunks), abs=1e-4)
    assert said["size"] == "{1}x{0}".format(*chunks[0].frames.shape[1:3])
    plain = min_confidences(by_hand(model, step_policy="fixed:2", num_frames=15))
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
    seen, figure = {}, report.report_figure

    def spy(chunks, **options):
        seen.update(options, chunks=chunks)
        return figure(chunks, **options)

    monkeypatch.setattr(report, "report_figure", spy)
    code, _, err = run("generate", PROMPT, "--report", "r.png", "--at", "9f", OTHER)
    assert code == 0 and os.listdir(tmp_path) == ["r.png"], err
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    chunks = by_hand(model, {3: OTHER}, num_frames=15)
    assert (seen["threshold"], seen["max_steps"]) == (0.428, 4)
    assert [c.steps for c in seen["chunks"]] == [c.steps for c in chunks]
    assert [c.prompt for c in seen["chunks"]] == [PROMPT] * 3 + [OTHER] * 2
    for shown, made in zip(seen["chunks"], chunks, strict=True):
        assert np.array_equal(shown.frames, made.frames)  # a chunk of three frames: first, middle, last are all


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
        ([PROMPT, "--at", "6f", OTHER, "--at", "7f", THIRD], ["--at 7f:", "takes effect at 6f, as the previous"]),
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


def test_generate_in_fp8(facts, model):
    said = facts("generate", PROMPT, "--model", model, "--frames", "3", "--quantization", "fp8")
    assert said["quantization"] == "fp8" and said["frames"] == 3
