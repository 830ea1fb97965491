"""The step policy of a stream: from its order, and changed while it runs."""

from __future__ import annotations

from dataclasses import replace

from dsa_engine import pipeline_inputs
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import Budget, Confidence, Policy
from dsa_engine.serving.types import Order

THRESHOLD_OF = {Confidence: "threshold", Budget: "ceiling"}  # the policies whose threshold can be changed, and its name


def policy_of(pipe: Pipeline, order: Order, own: str | None) -> Policy:
    """The policy that an order means; own: the server's steps, for orders that do not say (`Limits.steps`).

    Raises ValueError for steps that the model does not know or cannot take.
    """
    engine = pipe.engine
    own = own or (None if engine.head is None else "budget")
    if own == "budget" and not order.live:
        own = None  # a job has no deadline, and what comes of it must not depend on the load
    steps = order.steps or own
    if steps != "budget":
        return pipeline_inputs.policy(engine, steps, order.max_steps, order.min_steps, order.max_steps, order.threshold)
    if engine.head is None:
        raise ValueError("steps='budget': needs a confidence head and this model has none; use 'fixed'")
    ceiling = pipeline_inputs.default_threshold(engine) if order.threshold is None else order.threshold
    policy = Budget(pipe.fps, ceiling, 1 if order.min_steps is None else order.min_steps, order.max_steps)
    policy.check(pipe.max_steps)
    return policy


def with_threshold(policy: Policy, threshold: float, limit: int) -> Policy:
    """The policy with another threshold, for a schedule of `limit` steps.

    Raises ValueError for a policy that confidence does not steer and for a threshold outside [0, 1].
    """
    if type(policy) not in THRESHOLD_OF:
        raise ValueError(
            f"threshold={threshold}: this stream's steps are {policy}, which confidence does not count for; "
            "only streams begun with 'dsa', 'budget' or a preset can change it"
        )
    policy = replace(policy, **{THRESHOLD_OF[type(policy)]: threshold})
    policy.check(limit)
    return policy
