"""A model on the stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.engine.cuda_graphs import GraphRunner
from tests.support.cuda_stand_in import Cuda, patch
from tests.support.graph_pools import (
    pool,
    random_model,
)


@pytest.fixture(scope="module")
def stand_in():
    return Cuda()


@pytest.fixture
def cuda(stand_in, monkeypatch):
    return patch(stand_in, monkeypatch)


@pytest.fixture(scope="module")
def model():
    return random_model(dim=64, ffn_dim=96, num_heads=2, text_len=12)


@pytest.fixture(scope="module")
def captured_pools():
    return {}


@pytest.fixture
def captured(cuda, model, captured_pools):
    """captured(rows, loop_rows, window): an engine, and the graphs of a pool of so many slots, all free. One capture
    serves all tests, as it serves all sessions."""

    def get(rows, loop_rows, window=6):
        key = (rows, loop_rows, window)
        if key not in captured_pools:
            engine, inputs = pool(*model, rows, window=window)
            bucket = next(size for size in (1, 2, 4, 8) if size >= rows)
            captured_pools[key] = engine, GraphRunner(inputs, (bucket,), loop_rows=loop_rows)
            captured_pools[key][1].capture()
        return captured_pools[key]

    yield get
    for _, made in captured_pools.values():
        cache = made.inputs.cache
        cache.release(torch.tensor([slot for slot in range(cache.slots) if slot not in cache._free]))
