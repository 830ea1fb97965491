"""The model that ships: what is in the package, and that its steps follow what the video needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsa_engine import Confidence, Fixed, Pipeline
from dsa_engine.checkpoints.load import ASSETS, shipped_models
from dsa_engine.evaluation.rollouts import held_out, mean_scores, roll_out, tabulate, trace
from dsa_engine.shapes import metrics, world
from dsa_engine.shapes.world import Caption

CHUNKS, SWITCH = 8, 4
OTHER_HEADS = (("shapes", "token"), ("shapes-paper", "fitted"))  # beside those in the models' files
TRAINED_JOINTLY = ("shapes-paper", None)  # not fitted to the error afterwards


@pytest.fixture(scope="module")
def shapes() -> Pipeline:
    return Pipeline.from_pretrained("shapes", device="cpu")


def twenty_prompts() -> list[Caption]:
    rng = np.random.default_rng(20)
    drawn = [Caption(*(rng.choice(words) for words in world.SLOTS.values())) for _ in range(60)]
    return [caption for caption in drawn if caption.motion != "jumping"][:20]


def scripts(switch: bool) -> list[list[Caption]]:
    """Each prompt for a whole clip, or until chunk SWITCH, when another takes over."""
    prompts = twenty_prompts()
    later = prompts[1:] + prompts[:1] if switch else prompts
    return [[a] * SWITCH + [b] * (CHUNKS - SWITCH) for a, b in zip(prompts, later)]


@pytest.fixture(scope="module", params=[False, True], ids=["no switch", "switch"])
def rolled(request, shapes):
    captions = scripts(request.param)
    threshold = Confidence(shapes.config.threshold)
    return request.param, captions, roll_out(shapes, captions, threshold, seed=0)


def test_assets_are_small_and_whole():
    files = [p for p in ASSETS.rglob("*") if p.suffix in (".safetensors", ".json")]
    assert sum(p.stat().st_size for p in files) <= 16 * 2**20
    assert shipped_models() == ["shapes", "shapes-paper", "shapes-teacher"]
    names = {p.relative_to(ASSETS).as_posix() for p in files}
    folders = {f"{m}/{f}" for m in shipped_models() for f in ("config.json", "model.safetensors")}
    assert names == folders | {f"{model}/head-{name}.safetensors" for model, name in OTHER_HEADS}


@pytest.fixture(scope="module", params=[("shapes", None), TRAINED_JOINTLY, *OTHER_HEADS], ids=str)
def shipped(request) -> tuple[str, str | None]:
    """A model and one of its heads."""
    return request.param


@pytest.fixture(scope="module")
def with_head(shipped) -> Pipeline:
    return Pipeline.from_pretrained(shipped[0], device="cpu", head=shipped[1])


def test_a_head_is_light(with_head):
    def size(module):
        return sum(p.numel() for p in module.parameters())

    assert size(with_head.engine.head) < 0.05 * size(with_head.engine.dit)


def test_a_heads_confidence_rises_with_the_steps(with_head, shipped):
    """Over all steps where it was fitted to the error; over those after which it decides where it was only trained with
    the generator. The first head of this project fell: it was told a loss that is small just where a sample is bad."""
    _, seen = trace(with_head, held_out(24))
    medians = np.median(seen.confidence.min(axis=3), axis=(0, 1))
    decides = medians[:-1] if shipped == TRAINED_JOINTLY else medians
    assert (np.diff(decides) > 0).all(), medians


def test_steps_vary_and_rise_where_the_past_says_nothing(rolled):
    """The first chunk and the one after a switch take more steps on average than the quiet ones."""
    switch, _, result = rolled
    steps = result.steps.astype(float)
    assert len(np.unique(result.steps)) >= 2
    eventful = [0, SWITCH] if switch else [0]
    quiet = np.delete(steps, eventful, axis=1).mean()
    for chunk in eventful:
        assert steps[:, chunk].mean() > quiet


def test_the_video_shows_the_prompt(rolled):
    """A floor far below what the model is measured at, to notice a broken file or a broken engine."""
    _, captions, result = rolled
    assert mean_scores(tabulate(captions, result))["valid"] >= 0.8


def test_more_steps_are_better_than_one(shapes):
    captions = scripts(True)[:10]
    one, four = (mean_scores(tabulate(captions, roll_out(shapes, captions, Fixed(n), seed=0)))["valid"] for n in (1, 4))
    assert four > one


def test_the_head_is_calibrated(shapes):
    """Surer means closer, and the presets take more steps the more they ask for."""
    errors = shapes.expected_error([0.1, 0.5, 0.9])
    assert errors[0] > errors[1] > errors[2] > 0
    presets = [shapes.config.presets[name] for name in ("fast", "balanced", "quality")]
    assert presets == sorted(presets) and shapes.config.threshold == presets[1]


def test_the_teacher_that_ships_is_the_one_it_came_from(shapes):
    """Same codec and text encoder, same sizes; many Euler steps show the prompt."""
    from dsa_engine.evaluation.rollouts import roll_out_teacher

    teacher = Pipeline.from_pretrained("shapes-teacher", device="cpu")
    assert teacher.engine.head is None and teacher.engine.dit.config == shapes.engine.dit.config
    for part in ("decoder", "text"):
        mine, theirs = (getattr(pipe.engine, part).state_dict() for pipe in (shapes, teacher))
        assert all(theirs[name].equal(value) for name, value in mine.items())
    captions = [[caption] * 2 for caption in twenty_prompts()[:6]]
    assert mean_scores(tabulate(captions, roll_out_teacher(teacher, captions, steps=12)))["valid"] >= 0.7


def test_the_codec_keeps_every_frame_valid(shapes):
    """Ground truth through the codec scores 1.00: what the metric finds wrong in a video is the generator's."""
    import torch

    clip = world.sample_clip(np.random.default_rng(1), chunks=8)
    pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)[None].float() / 255
    decoded, _ = shapes.engine.decoder.decode(shapes.engine.decoder.encode(pixels))
    frames = decoded[0].permute(0, 2, 3, 1).numpy()
    captions = [caption for caption in clip.captions for _ in range(3)]
    scores = metrics.score(frames, captions)
    assert scores.valid.all() and scores.motion.all()
    assert metrics.psnr(frames, clip.frames / 255) > 35


def test_every_prompt_of_the_grammar_is_encoded_apart(shapes):
    words = world.SLOTS
    prompts = [
        str(Caption(c, s, m, b))
        for c in words["color"]
        for s in words["shape"]
        for m in words["motion"]
        for b in words["background"]
    ]
    embeds = shapes.engine.encode(prompts).flatten(1)
    assert len(embeds.unique(dim=0)) == len(prompts) == 360


def test_the_wheel_takes_the_assets_along():
    """What `pyproject.toml` lists as package data covers every file of the model."""
    import fnmatch
    import re

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    patterns = re.findall(r'"([^"]+)"', re.search(r'"dsa_engine.assets" = \[(.*?)\]', text).group(1))
    for path in ASSETS.rglob("*"):
        name = path.relative_to(ASSETS).as_posix()
        if path.is_file() and path.suffix != ".py" and path.suffix != ".pyc":
            assert any(fnmatch.fnmatch(name, p.replace("**/", "*")) for p in patterns), name
