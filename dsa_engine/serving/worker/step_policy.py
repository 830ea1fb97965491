"""The step policy that a request names."""

from __future__ import annotations

from dsa_engine import pipeline_inputs
from dsa_engine.pipeline import Pipeline
from dsa_engine.sampling.policy import Budget, Policy
from dsa_engine.serving.types import StreamRequest


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
