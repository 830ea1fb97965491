"""The confidence head's joint objectives: learned attenuation of a distance to the teacher, no labels, no extra video.

With d a frame's distance from the teacher and c the head's confidence, the head adds

    c d - penalty log c,    no gradient into d

to the student's loss over its own rollouts: confidence costs where d is large, the log keeps it from going to 0.

`PAPER` is the form of the paper (arXiv 2606.04432), as two independent summaries of its full text give it (one of them
names lambda = 0.2; the PDF itself was not at hand): the distillation loss as it is, d the L2 distance between the
student's estimate and the real score's. It is read here as sqrt(mean((x - x_R)^2)) per frame: with the mean square of
latents of variance 1 nearly every frame would be below lambda, where the best c is 1.

`JOINT` is this project's: d is the difference of the two scores relative to its noise level (`dmd.score_difference`),
and the distillation loss of each frame is weighted with c / mean(c), so that a confident head pulls the generator
harder there.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

CEILING = 10.0


class HeadObjective(NamedTuple):
    """penalty: lambda, a frame of distance d earns the confidence lambda / d; weight: of the head's term in the
    student's loss; attenuates: whether the distillation loss is weighted with the confidence; of_scores: whether d is
    the relative difference of the scores, else the distance to the real score's estimate."""

    penalty: float
    weight: float
    attenuates: bool
    of_scores: bool


JOINT = HeadObjective(penalty=0.3, weight=0.02, attenuates=True, of_scores=True)
PAPER = HeadObjective(penalty=0.2, weight=1.0, attenuates=False, of_scores=False)


def attenuation_loss(logit: Tensor, distance: Tensor, penalty: float = JOINT.penalty) -> Tensor:
    """mean(c d - penalty log c), c = sigmoid(logit); minimal at c = min(1, penalty / d), high where d is low.

    logit, distance [R, F]; no gradient flows into the distance.
    """
    confidence = logit.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    return (confidence * distance.detach().clamp(max=CEILING) - penalty * confidence.log()).mean()


def attenuation_weight(logit: Tensor) -> Tensor:
    """c / mean(c): what the generator's per-frame loss is multiplied with. The mean step size stays as it was."""
    confidence = logit.float().sigmoid().detach()
    return confidence / confidence.mean()
