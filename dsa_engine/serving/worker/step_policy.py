"""The step policy of a stream: resolved from its request, and with another threshold while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from dsa_engine import pipeline_inputs
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import Budget, Confidence, Policy
from dsa_engine.serving.types import StreamRequest

THRESHOLD_FIELD = {Confidence: "threshold", Budget: "ceiling"}  # policies whose threshold can change, and its field


def resolve_policy(pipe: Pipeline, request: StreamRequest, default: str | None) -> Policy:
    """The policy of a request; `default` where it names none (`WorkerLimits.steps`).

    Raises ValueError for steps that the model does not know or cannot take.
    """
    engine = pipe.engine
    default = default or (None if engine.head is None else "budget")
    if default == "budget" and not request.live:
        default = None  # a job has no deadline, and its result must not depend on the load
    steps, low, high = request.steps or default, request.min_steps, request.max_steps
    if steps != "budget":
        return pipeline_inputs.resolve_policy(engine, steps, high, low, high, request.threshold)
    if engine.head is None:
        raise ValueError("steps='budget': needs a confidence head and this model has none; use 'fixed'")
    ceiling = pipeline_inputs.default_threshold(engine) if request.threshold is None else request.threshold
    policy = Budget(pipe.fps, ceiling, 1 if low is None else low, high)
    policy.check(pipe.max_steps)
    return policy


def with_threshold(policy: Policy, threshold: float, max_steps: int) -> Policy:
    """The policy with another threshold, for a schedule of `max_steps`.

    Raises ValueError for a policy that does not use confidence and for a threshold outside [0, 1].
    """
    if type(policy) not in THRESHOLD_FIELD:
        raise ValueError(
            f"threshold={threshold}: this stream's steps are {policy}, which do not depend on confidence; "
            "only streams started with 'dsa', 'budget' or a preset can change it"
        )
    changed: Any = replace(cast(Any, policy), **{THRESHOLD_FIELD[type(policy)]: threshold})
    changed.check(max_steps)
    return changed
