"""Fitting a head to a frozen generator: what it reads, what it is told, that it learns to rank, and what is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsa_engine import Confidence, Fixed, Pipeline
from dsa_engine.shapes.world import Caption
from dsa_engine.training import head_dataset
from dsa_engine.training.calibrate import logits
from dsa_engine.training.head import SOFTNESS, TOLERANCE, fit_head, refine_loss, split, target, train_head
from dsa_engine.training.head_dataset import collect, num_chunks, refinement
from dsa_engine.training.prompts import read_prompts

RED, BLUE = Caption("red", "circle", "sideways"), Caption("blue", "cross", "jumping", "navy")
CLIPS = [[RED, RED, BLUE], [BLUE, BLUE, BLUE], [BLUE, RED, RED], [RED, RED, RED], [RED, RED, BLUE]]
STEPS = 4


def test_refinement_is_the_distance_to_the_last_estimate():
    estimates = torch.randn(4, 2, 3, 5, 6, 7)
    distance = refinement(estimates)
    assert distance.shape == (3, 2, 3)
    for k in range(3):
        for b in range(2):
            for f in range(3):
                expected = np.mean((estimates[k, b, f].numpy() - estimates[3, b, f].numpy()) ** 2)
                np.testing.assert_allclose(distance[k, b, f].item(), expected, rtol=1e-5)


def test_half_sure_at_the_tolerance_and_surer_below():
    distance = TOLERANCE * torch.tensor([0.0, 0.1, 1.0, 10.0])
    confidence = target(distance)
    assert confidence[2].item() == 0.5
    assert confidence.tolist() == sorted(confidence.tolist(), reverse=True)
    torch.testing.assert_close(confidence.logit()[1] - confidence.logit()[3], torch.tensor(100.0).log() / SOFTNESS)


def test_the_loss_is_the_cross_entropy_of_the_two_outcomes_and_least_at_the_target():
    logit, distance = torch.randn(50), torch.rand(50)
    c, t = logit.double().sigmoid().numpy(), target(distance).double().numpy()
    assert refine_loss(logit, distance).item() == pytest.approx(-np.mean(t * np.log(c) + (1 - t) * np.log(1 - c)))
    best = target(distance).logit().requires_grad_(True)
    refine_loss(best, distance).backward()
    assert best.grad.abs().max() < 1e-6


@pytest.fixture(scope="module")
def collected(pipe):
    return collect(pipe, CLIPS, seed=3)


def test_rollouts_are_those_of_sessions(pipe, collected):
    """Clip by clip, step by step what a live session with the same seed and prompts shows: estimates, confidence."""
    assert collected.features.shape == (5, 3, STEPS, 3, 3 * 64) and collected.distance.shape == (5, 3, STEPS - 1, 3)
    confidence = logits(pipe.engine.head, collected).sigmoid()
    for i, clip in enumerate(CLIPS):
        with pipe.session(str(clip[0]), seed=3 + i, step_policy=Fixed(STEPS)) as session:
            for n, caption in enumerate(clip):
                if str(caption) != session.prompt:
                    session.update(str(caption))
                steps = []
                session.next_chunk(on_step=steps.append)
                for k, step in enumerate(steps):
                    torch.testing.assert_close(confidence[i, n, k], step.confidence[0], rtol=1e-3, atol=1e-4)
                    far = (step.x0 - steps[-1].x0).square().mean(dim=(0, 2, 3, 4))
                    if k < STEPS - 1:
                        torch.testing.assert_close(collected.distance[i, n, k], far, rtol=1e-3, atol=1e-4)


def test_embeddings_texts_and_batches_make_no_difference(pipe, collected):
    texts = [[str(caption) for caption in clip] for clip in CLIPS]
    embeds = torch.stack([pipe.engine.encode(clip) for clip in texts])
    for prompts in (texts, embeds):
        made = collect(pipe, prompts, seed=3, batch=2)
        torch.testing.assert_close(made.features, collected.features, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(made.distance, collected.distance, rtol=1e-3, atol=1e-4)
    held = collect(pipe, [RED], chunks=3, seed=6)
    torch.testing.assert_close(held.features, collected[3:4].features, rtol=1e-3, atol=1e-4)
    again = collect(pipe, embeds[:, 0], chunks=2, order=[0, 0], seed=3)
    torch.testing.assert_close(again[:1].distance, collected[:1].distance[:, :2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(again.distance[0], again.distance[1])


def test_a_rollout_is_as_long_as_the_model_makes_clips(pipe, checkpoint):
    assert num_chunks(pipe) == 4 and len(collect(pipe, [RED]).features[0]) == 4
    assert num_chunks(Pipeline.from_pretrained(checkpoint, device="cpu")) == 7  # 81 frames, 21 latents
    with pytest.raises(ValueError, match="frames=1: 1 latent frames, but a chunk has 3"):
        num_chunks(pipe, 1)


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "none given"),
        ([[RED], [RED, RED]], {}, "prompts for 1, 2 chunks"),
        ([[RED, RED]], {"chunks": 3}, "prompts for 2, 3 chunks"),
        ([[]], {}, "prompts for 0 chunks"),
        ([RED], {"chunks": 0}, "chunks=0"),
        ([RED], {"batch": 0}, "batch=0"),
        ([RED], {"size": (3, 4)}, "nearest is 4x4"),
        (["a dog"], {}, "must read"),
        (torch.zeros(4, 16), {}, re.escape("[P, L, text_dim]")),
        (torch.zeros(1, 4, 17), {}, re.escape("[B, L, 16]")),
    ],
)
def test_prompts_and_sizes_that_do_not_fit_are_refused(pipe, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        collect(pipe, prompts, **options)


def test_one_step_leaves_nothing_to_learn(untrained):
    with pytest.raises(ValueError, match="at least 2 steps"):
        collect(Pipeline.from_pretrained(untrained, device="cpu", steps=[1000]), [RED])


def test_values_that_are_not_finite_are_not_learned_from(pipe, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        collect(pipe, torch.full((1, 4, 16), torch.nan), chunks=1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_with_the_same_bits(pipe, tmp_path, monkeypatch):
    """Killed in the second of three batches; what is there afterwards is not rolled out again."""
    options, record_batch, calls = dict(seed=3, batch=2), head_dataset.record_batch, []

    def killed(*args):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(args)
        return record_batch(*args)

    prompts = [RED, BLUE, RED, RED, BLUE]
    monkeypatch.setattr(head_dataset, "record_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(pipe, prompts, folder=tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["features-00000.safetensors"]
    monkeypatch.setattr(head_dataset, "record_batch", lambda *args: calls.append(args) or record_batch(*args))
    resumed = collect(pipe, prompts, folder=tmp_path, **options)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3
    whole = collect(pipe, prompts, **options)
    assert resumed.features.equal(whole.features) and resumed.distance.equal(whole.distance)


def test_rollouts_of_another_run_are_refused(pipe, untrained, tmp_path):
    made = dict(chunks=1, folder=tmp_path)
    collect(pipe, [RED], **made)
    other = Pipeline.from_pretrained(untrained, device="cpu")
    other.engine.dit.patch_embedding.bias += 1
    for wrong, who, prompts, options in (
        ("seeds", pipe, [RED], {"seed": 1}),
        ("prompts", pipe, [BLUE], {}),
        ("chunks", pipe, [RED], {"chunks": 2}),
        ("size", pipe, [RED], {"size": (4, 4)}),
        ("rollout", Pipeline.from_pretrained(untrained, device="cpu", shift=5.0), [RED], {}),
        ("model", other, [RED], {}),
    ):
        with pytest.raises(ValueError, match=f"features-00000.safetensors: made with {wrong} .*, expected is"):
            collect(who, prompts, **{**made, **options})


def test_a_fitted_head_ranks_the_distances(untrained):
    """Of clips that it has not seen; the generator stays as it was, and the head is frozen again."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu")
    made = collect(pipe, [RED, BLUE] * 8, chunks=2, seed=3)
    weights = {k: v.clone() for k, v in pipe.engine.dit.state_dict().items()}
    before = refine_loss(logits(pipe.engine.head, made[12:])[:, :, :-1], made[12:].distance).item()
    fit = fit_head(pipe, made[:12], made[12:], iterations=200)
    assert fit.spearman > 0.8 and len(fit.spearman_by_step) == STEPS - 1
    assert fit.held_out_loss < before
    after = logits(pipe.engine.head, made[12:])[:, :, :-1]
    assert refine_loss(after, made[12:].distance).item() == pytest.approx(fit.held_out_loss)
    ranks = [x.flatten().argsort().argsort().double() for x in (after, -made[12:].distance)]
    assert fit.spearman == pytest.approx(torch.corrcoef(torch.stack(ranks))[0, 1].item(), abs=1e-3)
    assert all(v.equal(weights[k]) for k, v in pipe.engine.dit.state_dict().items())
    assert not any(p.requires_grad for p in pipe.engine.head.parameters())


def test_a_constant_distance_has_no_rank_correlation(untrained):
    pipe = Pipeline.from_pretrained(untrained, device="cpu")
    made = collect(pipe, [RED, BLUE], chunks=1)
    fit = fit_head(pipe, made, replace(made, distance=torch.ones_like(made.distance)), iterations=1)
    assert fit.spearman is None and fit.spearman_by_step == [None] * (STEPS - 1)


SIZE = (4, 6)


@pytest.fixture
def checkpoint(tmp_path, tiny_dit, tiny_config):
    """A Self-Forcing style file: no text encoder, no decoder, no head."""
    path = tmp_path / "model" / "self_forcing_dmd.pt"
    path.parent.mkdir()
    (path.parent / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    torch.save({"generator_ema": {f"model.{k}": v.clone() for k, v in tiny_dit.state_dict().items()}}, path)
    return path


def test_any_checkpoint_gets_a_head(checkpoint, tmp_path, tiny_config):
    """From a bare checkpoint and embeddings to a file with which its steps follow the threshold."""
    embeds, out = 2 * torch.randn(6, 12, tiny_config.text_dim), tmp_path / "out"
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu")
    options = dict(chunks=2, size=SIZE, clips=12, batch=3, iterations=150)
    report = train_head(pipe, embeds, out, **options)
    assert report == json.loads((out / "head.json").read_text())
    assert report["clips"] == {"fitted": 8, "held_out": 4} and report["chunks"] == 2
    assert sum(row["count"] for row in report["calibration"]) == 4 * 2 * (STEPS - 1) * 3
    assert list(report["presets"]) == ["fast", "balanced", "quality"]
    assert (out / "head.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "rollouts").iterdir())) == 4

    loaded = Pipeline.from_pretrained(checkpoint, head=out / "head.safetensors", device="cpu")
    assert loaded.config == pipe.config and loaded.calibration == pipe.calibration != ()
    assert loaded.config.threshold == report["presets"]["balanced"]["threshold"]
    noise = torch.randn(4, 6, 16, *SIZE)

    def mean(policy) -> float:
        made = loaded(latents=noise, prompt_embeds=embeds[:4], output_type="latent", step_policy=policy)
        return np.mean(made.steps_per_chunk)

    counts = [mean(Confidence(threshold)) for threshold in (0.0, loaded.config.threshold, 1.0)]
    assert counts[0] == 1 and counts[2] == STEPS and 1 < counts[1] < STEPS
    assert mean("dsa") == counts[1] and mean("fast") <= counts[1] <= mean("quality")
    again = train_head(Pipeline.from_pretrained(checkpoint, device="cpu"), embeds, out, **options)
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_held_out_prompts_are_never_fitted_to():
    """Also where clips go round the prompts more than once; every prompt is shown."""
    order, held = split(prompts=5, clips=13, share=0.4, seed=0)
    shown = [{row for row, h in zip(order, held) if h == side} for side in (True, False)]
    assert len(order) == len(held) == 13 and (len(shown[0]), len(shown[1])) == (2, 3)
    assert shown[0] | shown[1] == set(range(5)) and order != sorted(order)
    assert split(5, None, 0.4, 0)[0] == order[:5] != split(5, None, 0.4, 1)[0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"held_out": 0.0}, "held_out=0.0 of 4 prompts is 0: .*; nearest is 0.25"),
        ({"held_out": 1.0}, "nearest is 0.75"),
        ({"clips": 3}, "clips=3: must be at least one per prompt; nearest is 4"),
    ],
)
def test_a_split_that_leaves_nothing_is_refused(checkpoint, tmp_path, tiny_config, options, words):
    pipe, embeds = Pipeline.from_pretrained(checkpoint, device="cpu"), torch.zeros(4, 1, tiny_config.text_dim)
    with pytest.raises(ValueError, match=words):
        train_head(pipe, embeds, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="give at least 2 prompts"):
        train_head(pipe, embeds[:1], tmp_path / "out")


def test_a_bfloat16_model_gets_a_head_that_was_fitted_in_float32(checkpoint, tiny_config):
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.bfloat16)
    made = collect(pipe, torch.randn(2, 1, tiny_config.text_dim), chunks=1, size=SIZE)
    assert made.features.dtype == made.distance.dtype == torch.float32
    fit = fit_head(pipe, made, made, iterations=20)
    assert {p.dtype for p in pipe.engine.head.parameters()} == {torch.bfloat16} and np.isfinite(fit.loss)


def test_without_a_head_the_error_says_how_to_get_one(checkpoint, tiny_config):
    pipe = Pipeline.from_pretrained(checkpoint, device="cpu")
    noise, embeds = torch.randn(1, 3, 16, *SIZE), torch.randn(1, 12, tiny_config.text_dim)
    assert pipe.generate_latents(noise, embeds).shape == noise.shape
    with pytest.raises(ValueError, match="dsa-engine train --recipe head --model FILE --prompts FILE"):
        pipe.generate_latents(noise, embeds, step_policy="dsa")
    with pytest.raises(ValueError, match="has no calibration"):
        pipe.expected_error(0.5)


def test_prompts_are_read_from_lines_and_from_tensors(tmp_path):
    text, tensor = tmp_path / "prompts.txt", tmp_path / "prompts.safetensors"
    text.write_text("\ufeff# two prompts\na cat\n\n  a dog on a \u00e9toile \n", encoding="utf-8")
    assert read_prompts(text) == ["a cat", "a dog on a \u00e9toile"]
    embeds = torch.randn(2, 3, 4).bfloat16()
    save_file({"prompt_embeds": embeds}, tensor)
    assert read_prompts(tensor).equal(embeds)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("absent.txt", None, "no such file"),
        ("prompts.csv", "a cat", "ends in .csv"),
        ("prompts.txt", "# nothing\n\n", "holds no prompt"),
        ("prompts.txt", b"\xff\xfe\x00", "UTF-8"),
        ("prompts.safetensors", "a cat", "not a whole safetensors file"),
        ("prompts.safetensors", {"embeds": torch.zeros(1, 2, 3)}, "holds embeds; expected is a tensor prompt_embeds"),
        ("prompts.safetensors", {"prompt_embeds": torch.zeros(2, 3)}, re.escape("[2, 3]; must be")),
        ("prompts.safetensors", {"prompt_embeds": torch.zeros(0, 2, 3)}, "at least one prompt"),
        ("prompts.safetensors", {"prompt_embeds": torch.zeros(1, 2, 3, dtype=torch.int64)}, "int64"),
    ],
)
def test_a_bad_file_of_prompts_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=f"{re.escape(str(path))}.*{words}"):
        read_prompts(path)
