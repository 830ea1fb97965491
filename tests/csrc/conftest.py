"""`cuda`: `dsa_engine.ops.cuda_backend` with its kernels on the host, and NaN in memory not yet written."""

from __future__ import annotations

import pytest
import torch

from dsa_engine.ops import cuda_backend as ops_cuda
from tests.support.csrc import emulated


@pytest.fixture
def cuda(monkeypatch):
    module = emulated.module()
    monkeypatch.setattr(ops_cuda, "csrc", module)
    module.set_order(0)
    torch.use_deterministic_algorithms(True)  # torch.empty() is then full of NaN, or of the largest integer
    yield ops_cuda
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=emulated.ORDERS)
def cuda_orders(cuda, request):
    """`cuda` once for each order of a block's threads: a forgotten barrier goes unnoticed in one of them."""
    cuda.csrc.set_order(request.param)
    return cuda
