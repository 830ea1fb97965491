"""The distillation gradient and the confidence objective on cases with known answers."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.training.confidence import attenuation_loss, attenuation_weight
from dsa_engine.training.dmd import LevelNorm, dmd_gradient, dmd_loss, guided


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
    for _ in range(30):
        relative = norm(torch.tensor([[1.0, 3.0], [100.0, 300.0]]), sigma)
    torch.testing.assert_close(relative, torch.tensor([[0.5, 1.5], [0.5, 1.5]]), rtol=1e-4, atol=0)
