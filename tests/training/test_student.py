"""The student's rollouts are the engine's, its losses add up, its stage resumes to the bit, also in two processes."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dsa_engine import PerChunk, Pipeline
from dsa_engine.checkpoints.tensor_io import write_tensors
from dsa_engine.config import PRESETS, ModelConfig, RolloutConfig
from dsa_engine.evaluation.rollouts import held_out
from dsa_engine.models.confidence import HEADS, PooledHead, new_head
from dsa_engine.shapes.codec import PixelCodec
from dsa_engine.training import launch, recipe, stages, student
from dsa_engine.training.attenuation import PAPER, attenuation_weight
from dsa_engine.training.dmd import dmd_gradient, dmd_loss
from dsa_engine.training.student import StudentLosses, self_rollout

ROLLOUT = RolloutConfig(chunk_frames=3, window=9, steps=(1000, 750, 500, 250), shift=3.0)


@pytest.fixture
def parts(pipe):
    """The untrained generator as teacher and, with other weights, as student, with heads that are not at zero."""
    dit = copy.deepcopy(pipe.engine.dit)
    for p in dit.parameters():
        p.data += 0.02 * torch.randn_like(p)
    heads = {name: PooledHead(dit.config) for name in ("refine", "confidence")}
    for head in heads.values():
        nn.init.normal_(head.mlp[2].weight, std=0.5)
    return nn.ModuleDict({"dit": dit.requires_grad_(True), **heads})


def losses_of(pipe, model, **options):
    return StudentLosses(pipe.engine.dit, pipe.engine.text.null(1), model, ROLLOUT, 2, (8, 8), **options)


def tokens(clips=2, chunks=3):
    return torch.randint(0, 4, (clips, chunks, 4), generator=torch.Generator().manual_seed(1)) + torch.tensor(
        [0, 6, 10, 15]
    ).clamp(max=14)


def test_a_self_rollout_is_what_the_pipeline_makes(pipe, close):
    """Same weights, noise and counts: the video is `generate_latents`' (one prompt throughout), x and sigma are those
    of the exit step, and the distances those of the estimates to the exit's."""
    counts = torch.tensor([[4, 1, 3], [2, 4, 1]])
    text = pipe.engine.text.table(tokens()[:, :1]).expand(-1, 3, -1, -1)
    rolled = self_rollout(pipe.engine.dit, ROLLOUT, text, counts, 11, (8, 8), pipe.engine.head)
    for row in range(2):
        seen = []
        rollout = pipe.engine.rollout(
            text[row : row + 1, 0],
            height=8,
            width=8,
            frames=9,
            policy=PerChunk(counts[row].tolist()),
            seeds=[11 + row],
            config=ROLLOUT,
        )
        for chunk in range(3):
            made = []
            result = rollout.denoise(made.append)
            rollout.accept(result.latents)
            close(rolled.video[row, chunk], result.latents[0], 1e-5)
            close(rolled.x[row, chunk], made[-1].x[0], 1e-5)
            assert rolled.sigma[row, chunk].item() == pytest.approx(made[-1].sigma)
            seen += [(step.x0[0] - result.latents[0]).square().mean(dim=(1, 2, 3)) for step in made[:-1]]
        expected = torch.cat(seen)
        mine = rolled.distance[rows_of(counts, row)]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert rolled.features.shape == (3 * int((counts - 1).sum()), 3 * 64)


def rows_of(counts: torch.Tensor, row: int) -> list[int]:
    """Where a clip's frames lie in features and distance: by chunk, step, then the clips that go on."""
    at, mine = 0, []
    for chunk in range(counts.shape[1]):
        for step in range(1, int(counts[:, chunk].max())):
            for clip in range(len(counts)):
                if step < counts[clip, chunk]:
                    mine += range(at, at + 3) if clip == row else []
                    at += 3
    return mine


def test_without_a_confidence_head_the_loss_is_plain_and_with_one_it_is_attenuated(pipe, parts):
    """From the same draws: total = dmd (+ weights) + .02 (heads) + .2 anchor, recomputed from the parts."""
    latents, said = torch.randn(2, 3, 3, 16, 8, 8), pipe.engine.text.table(tokens())
    totals, reports = {}, {}
    for kind in ("student", "joint"):
        model = nn.ModuleDict({k: v for k, v in parts.items() if kind == "joint" or k != "confidence"})
        losses = losses_of(pipe, model)
        generator = torch.Generator().manual_seed(4)
        rolled = losses.rollout(said, generator)
        totals[kind] = losses.student_loss(rolled, latents, generator)
        reports[kind] = losses.report
    assert reports["student"]["dmd"] == reports["joint"]["dmd"]
    plain = reports["student"]
    expected = plain["dmd"] + 0.02 * plain["refine"] + 0.2 * plain["anchor"]
    assert totals["student"].item() == pytest.approx(expected, rel=1e-4)
    assert set(reports["joint"]) - set(plain) == {"joint", "confidence"}


@pytest.mark.parametrize("kind", HEADS)
def test_the_papers_objective_is_dmd_and_the_heads_term_as_they_are(pipe, parts, kind, monkeypatch):
    """dmd + mean(c d - .2 log c) + .2 anchor, d the root mean square between the estimate and the real score's; and the
    head's gradient reaches the head and the generator."""
    head, seen = new_head(pipe.engine.dit.config, kind), {}
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = nn.ModuleDict({"dit": parts["dit"], "confidence": head})
    losses = losses_of(pipe, model, objective=PAPER)

    def gradient(x0, real, fake):
        seen.update(x0=x0.detach(), real=real)
        return dmd_gradient(x0, real, fake)

    monkeypatch.setattr(student, "dmd_gradient", gradient)
    head.register_forward_hook(lambda module, args, logit: seen.update(logit=logit))
    generator = torch.Generator().manual_seed(4)
    rolled = losses.rollout(pipe.engine.text.table(tokens()), generator)
    assert rolled.features is None
    total = losses.student_loss(rolled, torch.randn(2, 3, 3, 16, 8, 8), generator)
    d = (seen["x0"] - seen["real"]).double().square().mean(dim=(2, 3, 4)).sqrt()
    c = seen["logit"].double().sigmoid()
    term = (c * d - 0.2 * c.log()).mean().item()
    said = losses.report
    assert said["joint"] == pytest.approx(term, rel=1e-4) and set(said) == {"dmd", "joint", "confidence", "anchor"}
    assert total.item() == pytest.approx(said["dmd"] + term + 0.2 * said["anchor"], rel=1e-4)
    last = head.out if kind == "token" else head.mlp[2]
    reached = torch.autograd.grad(seen["logit"].sum(), [last.weight, parts["dit"].patch_embedding.weight])
    assert all(gradient.abs().sum() > 0 for gradient in reached)


def test_the_refine_head_does_not_reach_the_generator(pipe, parts):
    losses = losses_of(pipe, nn.ModuleDict({"dit": parts["dit"], "refine": parts["refine"]}))
    rolled = losses.rollout(pipe.engine.text.table(tokens()), torch.Generator().manual_seed(4))
    assert not rolled.features.requires_grad and not rolled.video.requires_grad


def test_attenuation_pulls_where_the_head_is_sure():
    """The gradient of a frame is its DMD gradient times c / mean(c): two frames, c = .8 and .2."""
    x0 = torch.randn(1, 2, 1, 2, 2, requires_grad=True)
    gradient = dmd_gradient(x0, torch.zeros_like(x0), torch.ones_like(x0))
    logit = torch.tensor([[0.8, 0.2]]).logit()
    (attenuation_weight(logit) * dmd_loss(x0, gradient)).sum().backward()
    ratio = (x0.grad[0, 0] / x0.grad[0, 1]) / (gradient[0, 0] / gradient[0, 1])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))


TINY = """
name = "tiny"
pool = 12
[rollout]
chunk_frames = 3
window = 9
shift = 3.0
[codec]
steps = 2
[teacher]
steps = 2
batch = 2
[student]
steps = 2
batch = 2
[head]
kind = "refine"
clips = 4
iterations = 5
calibration_clips = 4
"""
SMALL = ModelConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=8)


@pytest.fixture(scope="module", autouse=True)
def small_stages():
    """A net, clips and contact sheets so small that a step is cheap also where bfloat16 is emulated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "shapes", SMALL)
        patch.setattr(stages, "CHUNKS", 2)
        patch.setattr(stages, "SHOWN", held_out(2, chunks=2))
        patch.setattr(stages, "SHEET_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder with a codec and a teacher of two steps, and the recipe beside it."""
    out = tmp_path_factory.mktemp("runs")
    (out / "tiny.toml").write_text(TINY)
    torch.manual_seed(0)
    write_tensors(out / "codec" / "weights.safetensors", PixelCodec().state_dict())
    run("teacher", out)
    return out


def run(stage: str, out: Path) -> dict:
    return launch.train(stage, out / "tiny.toml", out, compiled=False, device="cpu")


@pytest.mark.parametrize("stage, updates", [("teacher", 1), ("joint", 3)])
def test_a_stage_that_was_killed_goes_on_to_the_same_weights(started, tmp_path, stage, updates, monkeypatch):
    """Killed in step 4 of 5, after the checkpoint of step 2, against a run in one go: the same bits, from 3 more steps.

    updates: of all optimizers in a step.
    """
    whole, parts = (Path(shutil.copytree(started, tmp_path / name)) for name in ("whole", "parts"))
    for folder in (whole, parts):
        shutil.rmtree(folder / stage, ignore_errors=True)
        (folder / "tiny.toml").write_text(TINY.replace("steps = 2\nbatch", "steps = 5\nbatch"))
    monkeypatch.setattr(stages, "SAVE_EVERY", {stage: 2})
    run(stage, whole)
    update, calls, limit = stages.Optimized.update, [], 3 * updates

    def counted(self, *args):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)
        return update(self, *args)

    monkeypatch.setattr(stages.Optimized, "update", counted)
    with pytest.raises(KeyboardInterrupt):
        run(stage, parts)
    assert torch.load(parts / stage / "checkpoint.pt", weights_only=True)["main"]["step"] == 2
    calls.clear()
    limit = None
    run(stage, parts)
    assert len(calls) == 3 * updates, "it must go on at step 2, not begin again"
    a, b = (load_file(folder / stage / "weights.safetensors") for folder in (whole, parts))
    assert all(a[k].equal(b[k]) for k in a)
    one, other = (torch.load(f / stage / "checkpoint.pt", weights_only=True) for f in (whole, parts))
    assert one.keys() == other.keys()
    assert all(v.equal(other["main"]["model"][k]) for k, v in one["main"]["model"].items())
    assert (parts / stage / "sheet.png").read_bytes().startswith(b"\x89PNG")


SCRIPT = f"""
import sys
from dsa_engine import cli, config
config.PRESETS["shapes"] = config.{SMALL}
sys.exit(cli.main())
"""


def test_two_processes_under_torchrun(started, tmp_path):
    """Both finish, one writes, and the weights are those of a run: finite, moved, the same in both processes."""
    out = Path(shutil.copytree(started, tmp_path / "two"))
    (out / "small.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", out / "small.py"]
    command += ["train", "--recipe", "joint", "--config", out / "tiny.toml", "--out", out, "--eager", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*map(str, command), "--device", "cpu"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"recipe": "joint"') == 1
    before = load_file(out / "teacher" / "weights.safetensors")
    after = load_file(out / "joint" / "weights.safetensors")
    assert all(v.isfinite().all() for v in after.values())
    assert any(not after[k].equal(before[k]) for k in before if k.startswith("dit."))


def test_the_whole_recipe_ends_in_a_model_that_runs(tmp_path):
    """Every stage at its smallest, from random weights: the folder loads, has the head that the recipe names, and
    stops early; run again, nothing is trained anew."""
    (tmp_path / "tiny.toml").write_text(TINY)
    facts = run("all", tmp_path)
    assert facts["teacher"]["step"] == facts["joint"]["step"] == 2
    assert set(facts["head"]) == {"joint", "refine", "fitted-pooled", "fitted-token"}
    pipe = Pipeline.from_pretrained(tmp_path / "model")
    assert pipe.config.presets == facts["head"]["refine"]["presets"] and pipe.calibration
    trained = load_file(tmp_path / "joint" / "weights.safetensors")
    stored = pipe.engine.head.state_dict()["mlp.0.weight"]
    torch.testing.assert_close(stored, trained["refine.mlp.0.weight"], rtol=1e-3, atol=1e-6)  # stored as float16
    steps = [pipe("a red cross rests", num_frames=6, confidence_threshold=t).steps_per_chunk for t in (0.0, 1.0)]
    assert steps == [[[1, 1]], [[4, 4]]]
    before = (tmp_path / "joint" / "checkpoint.pt").stat().st_mtime_ns
    run("all", tmp_path)
    assert (tmp_path / "joint" / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_student_of_the_papers_recipe_gets_heads_of_both_forms(started, tmp_path):
    """In folders of their own: the one trained with it, and one fitted of each form; each loads by its file."""
    out = Path(shutil.copytree(started, tmp_path / "paper"))
    (out / "tiny.toml").write_text(TINY + "[paper]\nsteps = 2\nbatch = 2\n")
    launch.train("paper", out / "tiny.toml", out, compiled=False, device="cpu", head="token")
    facts = launch.train("head", out / "tiny.toml", out, device="cpu", student="paper-token")["head"]
    assert set(facts) == {"joint", "fitted-pooled", "fitted-token"}
    trained = load_file(out / "paper-token" / "weights.safetensors")
    for name, kind in {"joint": "token", "fitted-pooled": "pooled", "fitted-token": "token"}.items():
        path = out / "head-paper-token" / f"{name}.safetensors"
        pipe = Pipeline.from_pretrained(out / "model-paper-token", head=path, device="cpu")
        assert pipe.engine.head.kind == kind and pipe.config.presets == facts[name]["presets"] and pipe.calibration
    for name, value in load_file(out / "head-paper-token" / "joint.safetensors").items():
        torch.testing.assert_close(value, trained[f"confidence.{name}"], rtol=1e-3, atol=1e-6)  # rounded to float16
    folder = load_file(out / "model-paper-token" / "model.safetensors")
    for name in (name for name in folder if name.startswith("generator.")):
        torch.testing.assert_close(
            folder[name].float(), trained[name.replace("generator.", "dit.")], rtol=1e-3, atol=1e-6
        )
    with pytest.raises(FileNotFoundError, match="train --recipe paper` writes it"):
        launch.train("head", out / "tiny.toml", out, device="cpu", student="paper")


def test_stages_name_what_they_lack(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    with pytest.raises(FileNotFoundError, match="codec.*train --recipe codec"):
        launch.train("teacher", tmp_path / "tiny.toml", tmp_path, device="cpu")
    with pytest.raises(ValueError, match="recipe 'techer': must be one of codec, teacher"):
        launch.train("techer", out=tmp_path)
    with pytest.raises(ValueError, match="steps and batch belong to one stage"):
        launch.train("all", out=tmp_path, steps=3)


def test_the_same_seed_draws_the_same_clips_and_another_seed_others(tmp_path):
    codec = PixelCodec().eval()

    def first(seed):
        ctx = stages.StageContext(recipe.Recipe("tiny", seed=seed, pool=8, rollout=ROLLOUT), tmp_path)
        return next(stages.training_clips(ctx, codec, 4, 0))[1]

    assert first(0).equal(first(0)) and not first(0).equal(first(1))
