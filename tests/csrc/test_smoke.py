"""The smoke test of csrc's attention with its kernels on the host."""

from __future__ import annotations

from dsa_engine.ops import smoke


def test_csrc_passes(cuda):
    assert smoke.check(cuda.attention, "cpu") is None
