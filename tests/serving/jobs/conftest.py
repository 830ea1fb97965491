"""Jobs are retried without delay."""

from __future__ import annotations

import pytest

from dsa_engine.serving.jobs import queue as module


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.01)
