"""The plain PyTorch baseline is the engine's model, and one that is not shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import fps
from benchmarks.e2e.eager_baseline import Baseline, BaselineStream, ShiftedCache, difference, errors, fidelity
from benchmarks.e2e.protocol import (
    Bench,
)
from benchmarks.e2e.timeline import play
from dsa_engine import Fixed, Pipeline

SIZE = (8, 8)
PROMPT = "a red circle jumps"


@pytest.fixture
def embeds(pipe):
    return pipe.engine.encode([PROMPT])


@pytest.mark.parametrize(
    "window, sink", [(9, 0), (8, 0), (3, 0), (9, 3), (8, 1), (-1, 0)], ids=lambda value: str(value)
)
def test_the_baseline_is_the_engine(untrained, window, sink):
    """Every window but the last rolls, by whole chunks and by parts of one; the prompt is padded."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", window=window, sink=sink)
    found = difference(pipe, Baseline(pipe), pipe.engine.encode([PROMPT])[:, :2], SIZE, 6)
    assert found["chunks"] == 6 and found["relative"] < 1e-4 and found["psnr_db"] > 90


@pytest.mark.parametrize("change", ["window", "noise", "commit", "prompt", "level"])
def test_a_baseline_that_does_something_else_shows(pipe, embeds, monkeypatch, change):
    baseline, other = Baseline(pipe), embeds
    if change == "window":
        monkeypatch.setattr(ShiftedCache, "roll", rolled_too_far)
    elif change == "noise":
        baseline.sigmas = (*baseline.sigmas[:-1], baseline.sigmas[-1] * 1.01)
    elif change == "commit":
        real = BaselineStream.forward
        monkeypatch.setattr(BaselineStream, "forward", lambda self, x, sigma: real(self, x, sigma) if sigma else None)
    elif change == "prompt":
        other = embeds[:, :3]
        theirs = baseline.model.text
        monkeypatch.setattr(baseline.model, "text", lambda _: theirs(embeds))
    else:
        monkeypatch.setattr(baseline.model, "_sinusoid", lambda t, real=baseline.model._sinusoid: real(t * 1.01))
    assert difference(pipe, baseline, other, SIZE, 6)["relative"] > 1e-3


def rolled_too_far(self):
    """One frame of the past is lost."""
    evicted = max(0, self.filled + self.frames - self.window)
    for x in (x for kv in self.layers for x in kv):
        x[:] = x.roll(-(evicted + bool(evicted)) * self.tokens, dims=1)
    self.filled += self.frames - evicted


def test_fidelity_is_measured_against_float32(untrained):
    """A bfloat16 model is some way from it, plain PyTorch in bfloat16 about as far; one that is wrong is far away."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu", dtype=torch.bfloat16)
    embeds = pipe.engine.encode([PROMPT])
    found = fidelity(pipe, embeds, SIZE, 2)
    assert pipe.engine.dit.dtype == torch.bfloat16  # as before
    assert 25 < found["psnr_db"] < 80 and abs(found["psnr_db"] - found["eager"]["psnr_db"]) < 10
    ours = pipe.generate_latents

    def off(*args, **options):
        return ours(*args, **options) * 1.05

    pipe.generate_latents = off
    assert fidelity(pipe, embeds, SIZE, 2)["psnr_db"] < found["psnr_db"] - 3


def test_errors():
    found = errors(torch.tensor([4.0, 1.0, -1.0, 0.0]), torch.tensor([4.0, 0.0, 0.0, 0.0]))
    assert (found["max_abs"], found["relative"]) == (1.0, 0.25)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(16 / 0.5))
    assert errors(torch.ones(2), torch.ones(2))["psnr_db"] is None


def test_a_difference_in_float32_ends_the_run(pipe, embeds):
    bench = Bench(pipe, [embeds], lambda scenario, clip: Fixed(2), 0)
    baseline = Baseline(pipe)
    assert fps.compared_chunks(bench, False) == 4 and fps.compared_chunks(bench, True) == 2  # of the model's clips
    assert fps.compared(bench, baseline, 4)["chunks"] == 4
    baseline.sigmas = baseline.sigmas[:-1]
    with pytest.raises(RuntimeError, match="not the baseline's"):
        fps.compared(bench, baseline, 2)


def test_the_baseline_has_no_sink_that_moves(untrained):
    pipe = Pipeline.from_pretrained(untrained, device="cpu", sink=3, rope="relative")
    with pytest.raises(ValueError, match="never moves"):
        Baseline(pipe)


def test_a_baseline_stream_ends_with_no_commit(pipe, embeds):
    stream = BaselineStream(Baseline(pipe), embeds, 9, SIZE, chunks=4)
    chunks = play(lambda: stream, 4).chunks
    assert [c.forwards for c in chunks] == [[3] * 5, [6] * 5, [9] * 5, [9] * 4]
    assert all(list(c.ms) == ["denoise", "commit", "decode", "copy"] and c.frames == 3 for c in chunks)
