"""The confidence head's joint objective: learned attenuation of the distillation loss, no labels, no extra video.

Only the paper's abstract (arXiv 2606.04432) was at hand; this form is ours. With L the frame's distance from the
teacher (`dmd.score_difference`, relative to its noise level) and c the head's confidence, the student minimises

    w * L_dmd + c L - penalty log c,    w = c / mean(c)

over its own rollouts: a confident head pulls the generator harder there, and confidence costs where L is large.
"""

from __future__ import annotations

from torch import Tensor

PENALTY = 0.3  # lambda: a frame of loss L earns the confidence lambda / L
CEILING = 10.0


def attenuation_loss(logit: Tensor, loss: Tensor, penalty: float = PENALTY) -> Tensor:
    """mean(c L - penalty log c), c = sigmoid(logit); minimal at c = min(1, penalty / L), high where L is low.

    The log keeps the head from the trivial answer c = 0. logit, loss [R, F]; no gradient flows into the loss.
    """
    confidence = logit.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    return (confidence * loss.detach().clamp(max=CEILING) - penalty * confidence.log()).mean()


def attenuation_weight(logit: Tensor) -> Tensor:
    """c / mean(c): what the generator's per-frame loss is multiplied with. The mean step size stays as it was."""
    confidence = logit.float().sigmoid().detach()
    return confidence / confidence.mean()
