"""Fitting a head to a frozen student: what it reads, what it is told, and that it learns to rank."""

from __future__ import annotations

import numpy as np
import torch

from dsa_engine import Fixed, Pipeline
from dsa_engine.synthetic import Caption
from dsa_engine.training.calibrate import confidence_by_step
from dsa_engine.training.evaluate import roll
from dsa_engine.training.head import SOFTNESS, TOLERANCE, collect, fit_head, refinement, target

CLIPS = [[Caption("red", "circle", "sideways")] * 3, [Caption("blue", "cross", "jumping", "navy")] * 3] * 4


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


def test_features_and_distances_belong_together(untrained):
    """Recomputed for one frame of one step from what a second rollout shows."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu")
    features, distance = collect(pipe, CLIPS, seed=3)
    chunks, steps, clips, frames = 3, 3, len(CLIPS), 3
    assert features.shape == (chunks * steps * clips * frames, 3 * 64) and distance.shape == features.shape[:1]
    seen = []
    roll(pipe, CLIPS, Fixed(4), 3, on_step=seen.append)
    chunk, step, clip, frame = 1, 2, 5, 0
    first, last = seen[4 * chunk + step], seen[4 * chunk + 3]
    expected = (first.x0[clip, frame] - last.x0[clip, frame]).square().mean()
    row = ((chunk * steps + step) * clips + clip) * frames + frame
    torch.testing.assert_close(distance[row], expected)
    confidence = pipe.engine.head.mlp(features[row]).sigmoid().squeeze()
    torch.testing.assert_close(confidence, first.confidence[clip, frame], rtol=1e-5, atol=1e-6)


def test_a_fitted_head_ranks_the_distances(untrained):
    """Spearman between confidence and true distance: none before, strong after, on the clips it was fitted to."""
    pipe = Pipeline.from_pretrained(untrained, device="cpu")

    def rank_correlation() -> float:
        features, distance = collect(pipe, CLIPS, seed=3)
        logit = pipe.engine.head.mlp(features).squeeze(-1)
        ranks = [torch.argsort(torch.argsort(x)).double() for x in (logit, distance)]
        return torch.corrcoef(torch.stack(ranks))[0, 1].item()

    before = abs(rank_correlation())
    weights = {k: v.clone() for k, v in pipe.engine.dit.state_dict().items()}
    fit_head(pipe, CLIPS, seed=3, iterations=300)
    assert rank_correlation() < -0.8 < -before
    assert all(v.equal(weights[k]) for k, v in pipe.engine.dit.state_dict().items())
    assert not any(p.requires_grad for p in pipe.engine.head.parameters())
    assert confidence_by_step(pipe, CLIPS[:2]).shape == (6, 4)
