"""The distillation gradient and the confidence objective on cases with known answers."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.training.attenuation import attenuation_loss, attenuation_weight
from dsa_engine.training.dmd import LevelNorm, dmd_gradient, dmd_loss, guided, score_difference, weight_motion
from dsa_engine.training.flow import weighted_error


def gaussian_x0(noisy, sigma, mean, deviation):
    """E[x0 | noisy] for x0 ~ N(mean, deviation^2), noisy = (1 - sigma) x0 + sigma eps: closed form."""
    signal = (1 - sigma) * deviation
    gain = (1 - sigma) * deviation**2 / (signal**2 + sigma**2)
    return mean + gain * (noisy - (1 - sigma) * mean)


def test_descending_the_gradient_turns_one_gaussian_into_another():
    """Student x0 = m + d z; with the exact scores of both Gaussians the fixed point is the teacher's (2, 0.5)."""
    generator = torch.Generator().manual_seed(0)
    m, d = torch.tensor(0.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.SGD([m, d], lr=0.05)
    for _ in range(600):
        z = torch.randn(256, 1, 1, 4, 4, generator=generator)
        x0 = m + d * z
        sigma = torch.rand(256, 1, 1, 1, 1, generator=generator).clamp(0.05, 0.95)
        noisy = (1 - sigma) * x0.detach() + sigma * torch.randn(x0.shape, generator=generator)
        real = gaussian_x0(noisy, sigma, 2.0, 0.5)
        fake = gaussian_x0(noisy, sigma, m.detach(), d.detach())
        loss = dmd_loss(x0, dmd_gradient(x0, real, fake)).mean() * x0[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert m.item() == pytest.approx(2.0, abs=0.05)
    assert d.item() == pytest.approx(0.5, abs=0.05)


def test_no_gradient_where_the_scores_agree():
    x0, real = torch.randn(2, 3, 2, 4, 4, 4).unbind(0)
    assert dmd_gradient(x0, real, real).abs().max() == 0


def test_the_losses_derivative_is_the_gradient():
    x0 = torch.randn(3, 2, 4, 5, 5, requires_grad=True)
    gradient = torch.randn(3, 2, 4, 5, 5)
    loss = dmd_loss(x0, gradient)
    assert loss.shape == (3, 2)
    (loss * 4 * 5 * 5).sum().backward()
    torch.testing.assert_close(x0.grad, gradient)


def test_guidance_is_a_line_through_both_predictions():
    c, u = torch.randn(2, 4).unbind(0)
    assert guided(c, u, 1.0).equal(c) or torch.allclose(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 0.0), u)
    torch.testing.assert_close(guided(c, u, 3.0) - c, 2 * (c - u))


@pytest.mark.parametrize("loss, best", [(3.0, 0.1), (1.0, 0.3), (0.6, 0.5)])
def test_the_head_learns_penalty_over_loss(loss, best):
    logit = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        attenuation_loss(logit, torch.tensor([[loss]]), penalty=0.3).backward()
        optimizer.step()
    assert logit.sigmoid().item() == pytest.approx(best, abs=0.01)


def test_attenuation_keeps_the_mean_step_and_trusts_the_confident():
    weight = attenuation_weight(torch.tensor([[2.0, -1.0], [0.0, 1.0]]))
    assert weight.mean().item() == pytest.approx(1.0)
    assert weight[0, 0] > weight[1, 1] > weight[1, 0] > weight[0, 1]


def test_level_norm_compares_frames_with_their_own_noise_level():
    norm = LevelNorm(levels=2, decay=0.5)
    sigma = torch.tensor([0.1, 0.9])
    loss = torch.tensor([[1.0, 3.0], [100.0, 300.0]])
    torch.testing.assert_close(norm(loss, sigma), torch.tensor([[0.5, 1.5], [0.5, 1.5]]))  # the first is its own mean
    torch.testing.assert_close(norm(3 * loss, sigma), torch.tensor([[0.75, 2.25], [0.75, 2.25]]))  # (2 + 6) / 2 = 4


def test_level_norm_forgets_by_its_decay_and_only_where_it_saw_something():
    norm, history = LevelNorm(levels=4, decay=0.9), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sigma = torch.rand(3, generator=generator)
        loss = torch.rand(3, 2, generator=generator)
        history.append((sigma, loss))
        norm(loss, sigma)
    for level in range(4):
        mean = None
        for sigma, loss in history:
            here = [row.mean().item() for s, row in zip(sigma.tolist(), loss) if level <= 4 * s < level + 1]
            if here:
                now = sum(here) / len(here)
                mean = now if mean is None else 0.9 * mean + 0.1 * now
        assert norm.mean[level].item() == pytest.approx(mean, rel=1e-5)


def test_what_the_head_is_told_falls_as_a_sample_gets_better():
    """A student that misses the teacher's Gaussian by 2, by 1, by half of 1: the difference of the exact scores'
    denoisers falls with the square, while the loss of DMD, divided by |x0 - real|, hardly does."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor(0.7)
    told, dmd = [], []
    for miss in (2.0, 1.0, 0.5):
        x0 = miss + 0.3 * torch.randn(512, 1, 1, 4, 4, generator=generator)
        noisy = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)
        real, fake = gaussian_x0(noisy, sigma, 0.0, 0.3), gaussian_x0(noisy, sigma, miss, 0.3)
        told.append(score_difference(real, fake).mean().item())
        dmd.append(dmd_loss(x0, dmd_gradient(x0, real, fake)).mean().item())
    assert told[0] / told[1] == pytest.approx(4, rel=0.01) and told[1] / told[2] == pytest.approx(4, rel=0.01)
    assert dmd[0] / dmd[2] < 4 < told[0] / told[2]


def test_stressed_motion_is_the_gradient_of_the_weighted_norm():
    """I + w D'D by automatic differentiation of |g|^2 / 2 + w |D g|^2 / 2; a common shift is left alone."""
    g = torch.randn(2, 5, 3, 2, 2, requires_grad=True)
    (0.5 * g.square().sum() + 0.7 * 0.5 * g.diff(dim=1).square().sum()).backward()
    torch.testing.assert_close(weight_motion(g.detach(), 0.7), g.grad)
    shift = torch.randn(2, 1, 3, 2, 2).expand(-1, 5, -1, -1, -1)
    torch.testing.assert_close(weight_motion(shift, 3.0), shift)


def test_the_weighted_error_has_the_same_minimum():
    """Least squares with and without the weight on motion: the same solution."""
    x = torch.randn(400, 6, dtype=torch.float64)
    y = (x @ torch.randn(6, 4, dtype=torch.float64) + torch.randn(400, 4, dtype=torch.float64)).view(400, 1, 4, 1, 1, 1)
    solutions = []
    for weight in (0.0, 2.0):
        w = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-14, tolerance_change=0.0)

        def loss(w=w, weight=weight, optimizer=optimizer):
            optimizer.zero_grad()
            value = weighted_error((x @ w).view_as(y) - y, weight).mean()
            value.backward()
            return value

        optimizer.step(loss)
        solutions.append(w.detach())
    torch.testing.assert_close(solutions[0], solutions[1], rtol=1e-5, atol=1e-6)
