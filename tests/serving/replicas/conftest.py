"""Two pipelines for two replicas."""

from __future__ import annotations

import pytest

from dsa_engine import Pipeline
from dsa_engine.serving.replicas import replica as replicas


@pytest.fixture(scope="module")
def pipes(untrained):
    return [Pipeline.from_pretrained(untrained, device="cpu", max_sessions=4, deterministic=True) for _ in range(2)]


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(replicas, "POLL_TIMEOUT_S", 0.2)
