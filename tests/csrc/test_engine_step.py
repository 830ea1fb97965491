"""A whole step of the engine through csrc on the host: the ops get the very views that the engine makes."""

from __future__ import annotations

import importlib

import pytest
import torch

from dsa_engine.config import ModelConfig, RolloutConfig
from dsa_engine.engine.chunk_plan import RowSpec
from dsa_engine.engine.engine import Engine
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.ops import dispatch, reference
from dsa_engine.sampling.policy import ExitRule
from tests.support.csrc.emulated import check_error

SIZE, FRAMES = 4, 2
SIZES = dict(num_layers=2, ffn_dim=96, text_dim=40, text_len=12, freq_dim=64)
SMALL = ModelConfig(dim=64, num_heads=2, **SIZES)  # head dim 32, which csrc's attention has not
WIDE = ModelConfig(dim=128, num_heads=2, **SIZES)  # head dim 64
FLOOR = 3e-6  # float32 sums in another order, through two layers


def models(config):
    dit, head = CausalDiT(config), PooledHead(config)
    for parameter in (*dit.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.15)
    return dit, head


def step(dit, head):
    """Latents, their estimate and the decisions of two slots after a step of one and a commit and a step of the other,
    in forwards of both."""
    config = RolloutConfig(chunk_frames=FRAMES, shift=3.0)
    engine = Engine(dit, head, None, None, config, 2)
    inputs = engine._pool(engine._pool_shape(SIZE, SIZE, 3 * FRAMES, config), 2)
    drawn = torch.Generator().manual_seed(1)
    inputs.cache.k.fill_(float("nan"))
    inputs.cache.v.fill_(float("nan"))
    slot = inputs.cache.acquire(2)
    inputs.set_prompt(slot, dit.text_kv(torch.randn(2, 5, dit.config.text_dim, generator=drawn), collapse=True))
    noise = torch.randn(2, 4, FRAMES, dit.config.in_dim, SIZE, SIZE, generator=drawn).to(dit.dtype)
    rule = ExitRule(min_steps=1, max_steps=4, threshold=2.0, reduce="min")  # no confidence is 2: nobody stops
    inputs.start_chunk(slot, noise, [1.0, 0.9, 0.7, 0.5], [rule, rule])
    a, b = slot.tolist()
    for rows in ([RowSpec(a), RowSpec(b)], [RowSpec(a, commit=True), RowSpec(a, ahead=True), RowSpec(b)]):
        inputs.run(inputs.rows(rows), [12] * len(rows))
    return inputs.x[slot].clone(), inputs.x0[slot].clone(), inputs.state[slot].clone(), inputs.step[slot].tolist()


@pytest.fixture
def through(monkeypatch):
    """through(module, ops): those ops run in a module, the others in plain torch; returns the names of what ran."""

    def route(module, ops):
        called = []

        def resolve(op, x, *key, **more):
            called.append(op)
            return getattr(module if op in ops else reference, op)

        for group in dispatch.OP_GROUPS:
            monkeypatch.setattr(importlib.import_module(f"dsa_engine.ops.{group}"), "resolve", resolve)
        return called

    return route


@pytest.mark.parametrize(
    "config, dtype, left_out",
    [
        (SMALL, torch.float32, {"attention"}),
        (SMALL, torch.bfloat16, {"attention"}),
        (WIDE, torch.bfloat16, set()),
    ],
)
def test_a_step_in_csrc_is_the_step_in_plain_torch(cuda, through, config, dtype, left_out):
    dit, head = models(config)
    exact = step(dit, head)
    dit, head = dit.to(dtype), head.to(dtype)
    plain = step(dit, head)
    called = through(cuda, set(cuda.OPS) - left_out)
    ours = step(dit, head)
    assert called.count("epilogue") == 2 and "norm_rope_append" in called and ours[3] == plain[3] == [2, 2]
    for name, *values in zip(("x", "x0", "state"), ours, plain, exact):
        check_error(name, *values, FLOOR)
