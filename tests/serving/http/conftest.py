"""Clients of the HTTP application."""

from __future__ import annotations

import pytest

from dsa_engine import Pipeline
from tests.support.serving.http_client import served


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data"), max_body=300_000) as client:
        yield client


@pytest.fixture
def fresh(tmp_path):
    with served(tmp_path / "data") as client:
        yield client


@pytest.fixture(scope="module")
def pipe(untrained) -> Pipeline:
    return Pipeline.from_pretrained(untrained, device="cpu", deterministic=True, max_sessions=3)
