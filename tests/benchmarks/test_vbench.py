"""The VBench benchmark: file layout, resuming and scores with a small model and a package that stands in for vbench."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from benchmarks import vbench
from benchmarks.scoring import vbench_scores
from dsa_engine.media.mp4 import Mp4Writer, read_mp4

RED, BLUE = "a red circle jumps", "a blue square moves sideways on navy"
NAMES = [f"{prompt}-{i}.mp4" for prompt in (BLUE, RED) for i in (0, 1)]  # sorted


@pytest.fixture(autouse=True)
def absent(request, monkeypatch):
    """No vbench, even on a machine that has it, except in tests of the `package`."""
    if "package" not in request.fixturenames:
        monkeypatch.setattr(vbench, "installed", lambda python: None)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{RED}\n{BLUE}\n")
    return path


@pytest.fixture
def run(untrained, tmp_path, prompts, monkeypatch, capsys):
    """run("--flag ...") -> the JSON object and all of stdout. Six frames in two chunks, two samples."""

    def call(more: str = "", out: str = "out", policy: str = "--policy fixed:2") -> tuple[dict, str]:
        argv = f"vbench.py --model {untrained} --out {tmp_path / out} --samples 2 --frames 6 --json {policy} {more}"
        argv += "" if "--prompts" in more or "--no-prompts" in more else f" --prompts {prompts}"
        monkeypatch.setattr(sys, "argv", shlex.split(argv.replace("--no-prompts", "")))
        vbench.main()
        text = capsys.readouterr().out
        return json.loads(text.splitlines()[-1]), text

    return call


def videos(tmp_path, policy="fixed-2", out="out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tmp_path / out / policy / "videos").iterdir())}


@pytest.fixture
def shown(monkeypatch):
    """shown(path) -> the frames that were last written to it. From the same frames x264 makes now and then another
    file: its macroblock tree, with B-frames, does not repeat itself to the bit."""
    write, written = Mp4Writer.write, []

    def record(self, frames):
        written.append((self, frames))
        write(self, frames)

    def last(path: Path) -> np.ndarray:
        writer = [w for w, _ in written if w.path == path][-1]
        return np.concatenate([frames for w, frames in written if w is writer])

    monkeypatch.setattr(Mp4Writer, "write", record)
    return last


def test_files_are_named_as_vbench_looks_for_them(run, tmp_path):
    found, text = run(policy="--policy fixed:2 --policy confidence:0.5")
    for policy in ("fixed-2", "confidence-0.5"):
        assert list(videos(tmp_path, policy)) == NAMES
        assert len(set(videos(tmp_path, policy).values())) == 4  # every sample is another video
    frames, fps = read_mp4(tmp_path / "out/fixed-2/videos" / NAMES[0])
    assert frames.shape == (6, 64, 64, 3) and fps == 12
    fixed, confidence = found["policies"]["fixed:2"], found["policies"]["confidence:0.5"]
    assert fixed["videos"] == 4 and fixed["mean_steps"] == 2 and fixed["fps"] > 0 and fixed["scores"] is None
    records = [json.loads(line) for line in (tmp_path / "out/confidence-0.5/manifest.jsonl").read_text().splitlines()]
    assert confidence["mean_steps"] == pytest.approx(np.mean([r["steps"] for r in records]), rel=1e-4)
    assert confidence["fps"] == pytest.approx(4 * 6 / sum(r["seconds"] for r in records), rel=1e-4)
    assert {"benchmark", "model", "papers", "machine", "commit", "date"} <= set(found) and found["prompts"] == 2
    assert found["papers"]["DSA (arXiv 2606.04432)"]["fps"] == 22.63 and "DSA (arXiv 2606.04432)" in text


def test_a_video_is_the_pipelines_own_for_its_seed(run, tmp_path, pipe, shown):
    run("--limit 1 --scale 2")
    assert list(videos(tmp_path)) == [f"{RED}-0.mp4", f"{RED}-1.mp4"]
    seed = json.loads((tmp_path / "out/fixed-2/manifest.jsonl").read_text().splitlines()[1])["seed"]
    assert seed == vbench.clip_seed(0, RED, 1) != vbench.clip_seed(1, RED, 1)
    clip = pipe(RED, seed=seed, num_frames=6, step_policy="fixed:2", output_type="pil").frames[0]
    path = tmp_path / "out/fixed-2/videos" / f"{RED}-1.mp4"
    np.testing.assert_array_equal(shown(path), np.stack([np.asarray(frame) for frame in clip]))
    assert read_mp4(path)[0].shape == (6, 128, 128, 3)


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(run, tmp_path, monkeypatch, shown):
    def same() -> bool:
        paths = [(tmp_path / out / "fixed-2/videos" / name for out in ("out", "whole")) for name in NAMES]
        return list(videos(tmp_path)) == NAMES and all(np.array_equal(*map(shown, pair)) for pair in paths)

    whole, _ = run(out="whole")
    write, written = Mp4Writer.write, []

    def breaks(self, frames):
        written.append(self.path.name)
        if len(written) == 4:  # the second chunk of the second video
            raise OSError("no space left")
        write(self, frames)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Mp4Writer, "write", breaks)
        run()
    first = tmp_path / "out/fixed-2/videos" / f"{RED}-0.mp4"
    assert list(videos(tmp_path)) == [first.name]  # nothing half made
    (first.parent / f".{NAMES[0]}.1.part").touch()  # a killed process could not take its own away
    with (tmp_path / "out/fixed-2/manifest.jsonl").open("a") as manifest:
        manifest.write('{"file": "a red cir')  # nor end its line
    before = first.stat().st_mtime_ns
    found, _ = run()
    assert first.stat().st_mtime_ns == before and same()
    assert len((tmp_path / "out/fixed-2/manifest.jsonl").read_text().splitlines()) == 4
    assert found["policies"]["fixed:2"]["videos"] == 4 == whole["policies"]["fixed:2"]["videos"]
    (tmp_path / "out/fixed-2/videos" / NAMES[2]).unlink()
    assert run()[0]["policies"]["fixed:2"]["mean_steps"] == 2 and same()


def test_videos_of_other_settings_are_not_taken_for_these(run, capsys):
    run("--limit 1")
    with pytest.raises(SystemExit):
        run("--limit 1 --seed 1")
    assert "made with seed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_extended_texts_go_to_the_model_and_short_names_to_the_files(run, tmp_path, prompts, kind):
    prompts.write_text("a ball.\na façade (not cat)\n")
    longer = tmp_path / f"longer.{kind}"
    pairs = {"a ball.": RED, "a façade (not cat)": BLUE}
    longer.write_text(json.dumps(pairs) if kind == "json" else "".join(text + "\n" for text in pairs.values()))
    found, _ = run(f"--extended {longer}")
    assert list(videos(tmp_path)) == [f"{prompt}-{i}.mp4" for prompt in pairs for i in (0, 1)]
    records = [json.loads(line) for line in (tmp_path / "out/fixed-2/manifest.jsonl").read_text().splitlines()]
    assert [r["text"] for r in records] == [RED, RED, BLUE, BLUE] and found["extended"] is True


def test_the_score_is_that_of_vbench():
    """A row of VBench's public leaderboard: Kling (2024-07), 81.85 total, 83.39 quality, 75.68 semantic, in percent."""
    percent = {
        "subject_consistency": 98.33,
        "background_consistency": 97.60,
        "temporal_flickering": 99.30,
        "motion_smoothness": 99.40,
        "dynamic_degree": 46.94,
        "aesthetic_quality": 61.21,
        "imaging_quality": 65.62,
        "object_class": 87.24,
        "multiple_objects": 68.05,
        "human_action": 93.40,
        "color": 89.90,
        "spatial_relationship": 73.03,
        "scene": 50.86,
        "appearance_style": 19.62,
        "temporal_style": 24.17,
        "overall_consistency": 26.42,
    }
    found = vbench_scores.combine({name: value / 100 for name, value in percent.items()})
    assert found == pytest.approx({"total": 81.85, "quality": 83.39, "semantic": 75.68}, abs=0.01)


def test_the_score_by_hand_and_without_a_dimension():
    low = {name: scale[0] for name, scale in vbench_scores.DIMENSIONS.items()}
    assert vbench_scores.combine(low) == {"total": 0, "quality": 0, "semantic": 0}
    some = low | {"dynamic_degree": 0.8, "temporal_flickering": (0.6293 + 1) / 2, "scene": 0.8222, "color": 0.5}
    quality, semantic = 100 * (0.5 * 0.8 + 0.5) / 6.5, 100 * 1.5 / 9
    expected = {"total": 0.8 * quality + 0.2 * semantic, "quality": quality, "semantic": semantic}
    assert vbench_scores.combine(some) == pytest.approx(expected)
    del some["scene"]
    assert vbench_scores.combine(some) == {"total": None, "quality": pytest.approx(quality), "semantic": None}


FAKE = """
    import json, os
    from pathlib import Path

    class VBench:
        '''Looks for videos and writes results as vbench 0.1.5 does; a dimension scores what the test says.'''

        def __init__(self, device, full_info_dir, output_path):
            self.info, self.out = json.loads(Path(full_info_dir).read_text()), Path(output_path)
            assert device == "cuda"

        def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None):
            here, (dimension,) = Path(__file__).parent, dimension_list
            with (here / "calls").open("a") as calls:
                calls.write(dimension + "\\n")
            names, seen = os.listdir(videos_path), []
            suffix = Path(names[0]).suffix
            for entry in self.info:
                if dimension in entry["dimension"]:
                    seen += [n for i in range(5) if (n := f"{entry['prompt_en']}-{i}{suffix}") in names]
            score = json.loads((here / "scores.json").read_text())[dimension]
            result = {dimension: [score, [{"video_path": n, "video_results": score} for n in seen]]}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(result))
"""
STATIC_FILTER = """
    import argparse, shutil
    from pathlib import Path

    def main():
        '''Every second video is still; they are copied and numbered anew.'''
        parser = argparse.ArgumentParser()
        parser.add_argument("command", choices=["static_filter"])
        parser.add_argument("--videos_path")
        parser.add_argument("--result_path")
        args = parser.parse_args()
        target = Path(args.result_path) / "filtered_videos"
        target.mkdir(parents=True)
        for i, path in enumerate(sorted(Path(args.videos_path).glob("a red*.mp4"))[::2]):
            shutil.copy(path, target / f"a red circle jumps-{i}.mp4")
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of vbench's names, that the subprocesses import: two prompts, all dimensions."""
    folder = tmp_path / "packages" / "vbench"
    (folder / "cli").mkdir(parents=True)
    red = ["temporal_flickering"]
    blue = [d for d in vbench_scores.DIMENSIONS if d not in red]
    suite = [{"prompt_en": RED, "dimension": red}, {"prompt_en": BLUE, "dimension": blue, "auxiliary_info": {}}]
    files = {
        "../torch.py": "device = str",
        "__init__.py": FAKE,
        "utils.py": "def init_submodules(dimensions): pass",
        "cli/__init__.py": "",
        "cli/vbench.py": STATIC_FILTER,
        "VBench_full_info.json": json.dumps(suite),
        "scores.json": json.dumps(dict.fromkeys(vbench_scores.DIMENSIONS, 0.7)),
    }
    for name, text in files.items():
        (folder / name).write_text(dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    return folder


def test_scores_are_read_and_kept(run, tmp_path, package, monkeypatch, capsys):
    monkeypatch.chdir(Path(vbench.__file__).parent)  # where `import vbench` would be the benchmark itself
    assert vbench.installed(sys.executable) == package
    found, text = run("--no-prompts --static-samples 3")
    scores, calls = found["policies"]["fixed:2"]["scores"], (package / "calls").read_text().split()
    assert calls == list(vbench_scores.DIMENSIONS) == list(scores["dimensions"])
    assert list(videos(tmp_path)) == [*NAMES, f"{RED}-2.mp4"] and found["policies"]["fixed:2"]["videos"] == 5
    ends = [(scale[0], scale[1], scale[2]) for scale in vbench_scores.QUALITY.values()]
    expected = 100 * sum(w * (0.7 - low) / (high - low) for low, high, w in ends) / 6.5
    assert scores["quality"] == pytest.approx(expected, rel=1e-4) and f"{scores['total']:.2f}" in text
    out = tmp_path / "out/fixed-2/scores"
    seen = {d: json.loads((out / f"{d}_eval_results.json").read_text())[d][1] for d in vbench_scores.DIMENSIONS}
    assert [v["video_path"] for v in seen["temporal_flickering"]] == [f"{RED}-0.mp4", f"{RED}-1.mp4"]  # of three, two
    assert [v["video_path"] for v in seen["scene"]] == NAMES[:2]

    run("--no-prompts --static-samples 3")
    assert (package / "calls").read_text().split() == calls  # nothing has changed, nothing is scored again

    values = dict.fromkeys(vbench_scores.DIMENSIONS, 0.7) | {"color": float("nan")}
    del values["scene"]
    (package / "scores.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit, match=r"(?s)fixed:2, color: the score is nan.*fixed:2, scene: KeyError: 'scene'"):
        run("--no-prompts --static-samples 3 --samples 3")  # more videos: all is scored again
    last = json.loads(capsys.readouterr().out.splitlines()[-1])["policies"]["fixed:2"]
    assert set(last["scores"]["failed"]) == {"color", "scene"} and last["scores"]["semantic"] is None
    assert last["scores"]["quality"] == scores["quality"] and last["videos"] == 6


def test_some_dimensions(run, tmp_path, package):
    found, text = run("--no-prompts --dimensions scene color --no-evaluate")
    assert list(videos(tmp_path)) == NAMES[:2] and found["dimensions"] == ["color", "scene"]
    assert "not scored: --no-evaluate" in text and "1 of the 2 prompts" in text


def test_without_vbench_it_says_how_to_get_it(run, tmp_path):
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps([{"prompt_en": RED, "dimension": ["temporal_flickering"]}]))
    found, text = run(f"--prompts {info} --static-samples 1")
    assert found["policies"]["fixed:2"]["scores"] is None
    assert f"{sys.executable} has no vbench" in text and 'pip install torch torchvision "vbench' in text
    assert f"--prompts {info}" in text and "--vbench-python vbench-env/bin/python" in text
    assert "says no dimensions" in run("--limit 1", out="text")[1]


@pytest.mark.parametrize(
    "more, message",
    [
        ("--dimensions colour", "--dimensions colour: must be some of subject_consistency"),
        ("--dimensions color", "prompts.txt: holds no prompt of --dimensions color"),
        ("--no-prompts", "no prompts: .* has no vbench package .* give --prompts FILE"),
        ("--prompts no-such.txt", "no-such.txt"),
        ("--prompts {0}/bad.json", "bad.json: is not JSON"),
        ("--prompts {0}/two.json", "two.json: entry 0 is .*Camera_Motion.*must have a prompt_en"),
        ("--prompts {0}/slash.txt", "prompt 'either/or': .*must have no /"),
        ("--prompts {0}/long.txt", "at most 2[0-9]+ bytes"),
        ("--extended {0}/slash.txt", "1 lines for a suite of 2 entries"),
        ("--extended {0}/some.json", "has no text for 'a blue square"),
        ("--policy fixed:9", "n=9: must be from 1 to 4"),
        ("--policy often", "step_policy='often': must be one of"),
        ("--frames 7", "num_frames=7: .*nearest is 6"),
    ],
)
def test_bad_arguments_are_one_error_before_any_work(run, tmp_path, capsys, more, message):
    files = {
        "bad.json": "{",
        "slash.txt": "either/or",
        "long.txt": "a" * 250,
        "some.json": json.dumps({RED: RED}),
        "two.json": json.dumps([{"prompt_en": RED, "dimension": ["Camera_Motion"]}]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run(more.format(tmp_path))
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("vbench.py: error: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_no_such_python(package):
    with pytest.raises(ValueError, match="no such program"):
        vbench.installed("no-such-python")


def test_seeds_do_not_depend_on_the_order():
    seeds = {vbench.clip_seed(s, p, i) for s in (0, 1) for p in (RED, BLUE) for i in range(25)}
    assert len(seeds) == 100 and all(0 <= seed < 2**64 for seed in seeds)
    assert vbench.clip_seed(0, RED, 3) == 16238204993572600020  # sha256 of '0 3 a red circle jumps', its first 8 bytes
