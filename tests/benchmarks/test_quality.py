"""The quality benchmark: its figures against plain loops, and one small run of the whole with random weights."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.scoring import policy_rows
from benchmarks.scoring.psnr import psnr_figures
from dsa_engine import Change, Confidence
from dsa_engine.evaluation.rollouts import Table, Trace
from dsa_engine.evaluation.statistics import mean_interval
from dsa_engine.evaluation.summary import compare, distance, figures, head_figures, rounded, versus

CLIPS, CHUNKS, FRAMES = 6, 4, 3


def made_up(seed: int, steps=None, valid=0.8) -> Table:
    rng = np.random.default_rng(seed)
    shape = (CLIPS, CHUNKS, FRAMES)
    kind = np.random.default_rng(99).choice(["cut", "soft", "same"], size=shape[:2])  # the same clips for all
    return Table(
        valid=rng.random(shape) < valid,
        fit=rng.random(shape),
        texture=rng.random(shape),
        leap=rng.random(shape),
        xy=20 * rng.random((*shape, 2)),
        motion=rng.random(shape[:2]) < 0.5,
        steps=rng.integers(1, 5, size=shape[:2]) if steps is None else np.full(shape[:2], steps),
        kind=kind,
        hard=kind == "cut",
    )


def test_figures_of_a_policy():
    table, teacher = made_up(0), made_up(1)
    found = figures(table, 5, teacher)
    assert found["mean_steps"] == table.steps.mean() and found["passes"] == found["mean_steps"] + 1
    assert found["steps_histogram"] == [int((table.steps == n).sum()) for n in (1, 2, 3, 4, 5)]
    assert found["quarters"] == [table.valid[:, n].mean() for n in range(CHUNKS)]
    assert found["ci"][0] <= found["valid"] == table.valid.mean() <= found["ci"][1]
    assert found["ratio"] == pytest.approx(table.steps[table.hard].mean() / table.steps[~table.hard].mean())
    assert found["distance"] == distance(table, teacher) and figures(table, 4)["distance"] is None


def test_distances_see_places_and_moves_apart():
    table = made_up(0)
    still = Table(**{**vars(table), "xy": np.broadcast_to(table.xy[:, :, :1], table.xy.shape)})
    shifted = Table(**{**vars(table), "xy": table.xy + 50})
    assert distance(table, shifted)["place"] > 10 and abs(distance(table, shifted)["move"]) < 2
    assert distance(table, still)["move"] > 2


def test_versus_is_paired_by_clip_and_at_equal_steps():
    table, low, high = made_up(0, steps=2), made_up(1, steps=1, valid=0.5), made_up(2, steps=4, valid=0.9)
    found = versus(table, {"low": low}, {"curve": [high, low], "beyond": [high]})

    def clip(t, b):
        return np.mean(t.valid[b])

    expected = [clip(table, b) - (2 / 3 * clip(low, b) + 1 / 3 * clip(high, b)) for b in range(CLIPS)]
    assert found["curve"]["difference"] == pytest.approx(np.mean(expected))
    assert found["curve"]["ci"] == pytest.approx(mean_interval(np.array(expected))[1:])
    assert found["low"]["difference"] == pytest.approx(table.valid.mean() - low.valid.mean())
    assert found["beyond"] is None


def test_compare_weighs_hard_frames_alike():
    one, other = made_up(0), made_up(1)
    found = compare(one, other)
    assert found["valid"]["difference"] == pytest.approx(other.valid.mean() - one.valid.mean())
    hard = other.valid[one.hard].mean() - one.valid[one.hard].mean()
    assert found["valid_hard"]["difference"] == pytest.approx(hard)
    assert compare(one, one)["valid_hard"] == {"difference": 0, "ci": [0, 0]}


def test_a_head_that_knows_everything_has_perfect_figures():
    table = made_up(0)
    rng = np.random.default_rng(5)
    distance = rng.random((CLIPS, CHUNKS, 3, FRAMES)) + 9 * table.hard[:, :, None, None]
    confidence = np.concatenate((np.exp(-distance), np.ones((CLIPS, CHUNKS, 1, FRAMES))), axis=2)
    exits = [(np.exp(-t.fit), t) for t in (table, made_up(1))]
    found = head_figures(Trace(confidence, distance, distance), exits, table)
    assert found["auc_hard"] == 1
    ranks = [found["spearman"], *found["spearman_by_step"], found["correlation"], *found["correlation_by_step"]]
    assert ranks == pytest.approx([1] * 7)
    assert found["steps_quiet"] == table.steps[table.kind == "same"].mean()
    assert found["steps_event"] == table.steps[table.kind == "cut"].mean()
    assert sum(sum(k["histogram"]) for k in found["steps_by_kind"].values()) == CLIPS * CHUNKS
    assert math.isnan(found["steps_by_kind"]["jumping"]["mean"])


def test_rounded_is_plain_json():
    value = {"a": np.float64(1 / 3), 2: [float("nan"), np.int64(4), np.bool_(True), "x", None, (1.0,)]}
    assert json.loads(json.dumps(rounded(value))) == {"a": 0.33333, "2": [None, 4, True, "x", None, [1.0]]}


def test_random_exits_are_geometric_and_blind():
    clips = policy_rows.Clips(500, 4, seed=0)
    counts = np.array([policy.counts for policy in policy_rows.random_exits(0.45, clips, 4)])
    share = [(counts == n).mean() for n in (1, 2, 3, 4)]
    assert share == pytest.approx([0.45, 0.55 * 0.45, 0.55**2 * 0.45, 0.55**3], abs=0.04)
    assert (counts == [policy.counts for policy in policy_rows.random_exits(0.45, clips, 4)]).all()


def test_thresholds_cover_the_steps_and_hold_the_named_ones():
    rng = np.random.default_rng(0)
    confidence, change = np.sort(rng.random((200, 4, 4, 3)), axis=2), rng.random((200, 4, 3, 3))
    jobs = policy_rows.chosen_jobs(policy_rows.Source("m"), Trace(confidence, change, change), [0.501, 0.9])
    policies = [job.policy for job in jobs.values()]
    sure = [p.threshold for p in policies if isinstance(p, Confidence)]
    calm = [p.threshold for p in policies if isinstance(p, Change)]
    assert {0.501, 0.9} <= set(sure) and len(sure) >= 10 and len(calm) == 5 and min(calm) > 0
    least = confidence.min(axis=3).reshape(-1, 4)
    means = [np.mean([next((k for k in (1, 2, 3) if r[k - 1] >= t), 4) for r in least]) for t in sure]
    assert min(means) < 1.2 and max(means) > 3.4


@pytest.fixture
def few(monkeypatch):
    """Two points a curve, so that the whole takes seconds."""
    points = {"EXITS": (0.6, 0.45), "BY_INDEX": ([4, 1], [4, 2, 1]), "SPREAD": (1.5, 3.0), "SPREAD_CHANGE": (2.5, 3.0)}
    for name, values in points.items():
        monkeypatch.setattr(policy_rows, name, values)
    monkeypatch.setattr("dsa_engine.evaluation.statistics.RESAMPLES", 50)


def test_the_whole_benchmark(untrained, few, tmp_path, monkeypatch, capsys):
    """Two clips are enough to see every key, the files, and that equal models differ by nothing."""
    target = tmp_path / "made" / "q.json"
    argv = ["quality.py", "--model", untrained, "--teacher", untrained, "--compare", untrained, "--clips", 2]
    argv += ["--teacher-steps", 2, "--save", target, "--plot", tmp_path / "q.png", "--json"]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    quality.main()
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(target.read_text()) and (tmp_path / "q.png").stat().st_size > 10_000
    assert list(found["fixed"]) == ["1", "2", "3", "4"] and len(found["confidence"]) >= 3
    rows = [*found["fixed"].values(), *found["confidence"]]
    assert all({"mean_steps", "valid", "valid_hard", "ci", "all_valid", "motion", "mse"} <= set(row) for row in rows)
    assert all({"threshold", "steps_histogram", "versus"} <= set(row) for row in found["confidence"])
    assert [row["mean_steps"] for row in found["fixed"].values()] == [1, 2, 3, 4]
    assert list(found["relative"]) == ["min", "mean", "max"]
    assert all({"mean_steps", "valid", "steps_histogram", "versus"} <= set(row) for row in found["relative"].values())
    assert list(found["baselines"]) == ["random", "by_index", "x0_change"] and all(found["baselines"].values())
    assert {"auc_hard", "spearman", "steps_event", "steps_quiet", "clips", "commit", "machine"} <= set(found)
    assert all(sum(row["steps_histogram"]) == 8 and len(row["steps_histogram"]) == 4 for row in rows)
    assert found["clips"] == 2 and found["teacher"]["mean_steps"] == 2
    assert all(row["valid"]["difference"] == 0 for row in found["compare"]["rows"].values())
    assert found["ground_truth"]["distance"]["place"] is not None
    for name in ("fixed:4", "random:0.45", "by_index:4,2,1", "x0_change:", "relative:min", "teacher", "ground_truth"):
        assert f"\n{name}" in out


def test_the_same_model_run_another_way(untrained, monkeypatch, capsys):
    """This model's rows stay as they are; of the others, the first chunk has no past that a commit could change."""
    monkeypatch.setattr("dsa_engine.evaluation.statistics.RESAMPLES", 50)
    argv = ["quality.py", "--model", str(untrained), "--brief", "--clips", "3", "--chunks", "2", "--json"]
    found = {}
    for way in ((), ("--quantization", "fp8-cache"), ("--commit", "exit_step")):
        monkeypatch.setattr(sys, "argv", [*argv, *way])
        quality.main()
        out = capsys.readouterr().out
        found[way[-1:]] = json.loads(out.splitlines()[-1])
    plain, fp8, exit_step = found.values()
    assert plain["compare"] is None and plain["fixed"]["4"]["mse"] == fp8["fixed"]["4"]["mse"]
    assert (fp8["compare"]["label"], exit_step["compare"]["commit"]) == (f"{untrained}, fp8-cache", "exit_step")
    assert f"{untrained}, commit exit_step minus untrained, paired by clip" in out and "psnr, bfloat16" in out
    for part in ("latents", "frames"):
        assert all(30 < fp8["compare"]["psnr"][way][part]["first"] < 100 for way in ("as compared", "bfloat16"))
    assert exit_step["compare"]["psnr"]["as compared"]["latents"]["first"] is None
    assert exit_step["compare"]["psnr"]["as compared"]["latents"]["median"] is not None
    for row in (*fp8["compare"]["rows"].values(), *exit_step["compare"]["rows"].values()):
        one, other = row["valid_of"]
        assert row["valid"]["difference"] == pytest.approx(other - one, abs=1e-4)


def test_psnr_of_clips():
    squares = np.zeros((3, 4, 2))
    squares[0], squares[1, 2:] = 1.0, 0.02
    found = psnr_figures(squares, 10.0, chunks=2)
    assert found["all"] == pytest.approx(10 * math.log10(100 / (1.01 / 3)))
    assert found["median"] == pytest.approx(40.0) and math.isnan(found["first"])


def test_without_a_teacher_it_says_so(untrained, few, monkeypatch, capsys):
    argv = ["quality.py", "--model", str(untrained), "--clips", "1", "--chunks", "8"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(quality, "TEACHER", "no-such-teacher")
    quality.main()
    out = capsys.readouterr().out
    assert "no teacher: none ships" in out and "quarters" in out


@pytest.mark.parametrize("flag, value", [("--save", "q.txt"), ("--plot", "q.jpg")])
def test_a_bad_target_is_an_error_before_the_work(monkeypatch, flag, value):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--model", "no-such-model", flag, value])
    with pytest.raises(ValueError, match="must end in"):
        quality.main()
