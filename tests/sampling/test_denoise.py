"""`denoise_chunk` against the loop written out naively, and with a model whose answers are known."""

from __future__ import annotations

import pytest
import torch

from dsa_engine import Change, Confidence, Fixed, PerChunk
from dsa_engine.models.confidence import PooledHead
from dsa_engine.models.dit import DiTOutput
from dsa_engine.models.interfaces import TextKV
from dsa_engine.sampling.denoise import denoise_chunk
from dsa_engine.sampling.kv_cache import KVCache
from dsa_engine.sampling.schedule import Schedule

SCHEDULE = Schedule(shift=3.0)
SHAPE = (3, 16, 4, 4)


def renoise_table(rows: int) -> torch.Tensor:
    return torch.randn(len(SCHEDULE), rows, *SHAPE, generator=torch.Generator().manual_seed(1))


def cache_rows(dit, rows: int):
    config = dit.config
    cache = KVCache(config.num_layers, config.num_heads, config.head_dim, 4, 6, slots=rows)
    return cache.rows(cache.acquire(rows), SHAPE[0])


def naive(dit, head, x, counts, table, text_kv, rows):
    """One row at a time, the formulas of flow matching with plain torch."""
    result, certain = [], []
    for b, count in enumerate(counts):
        only = torch.tensor([b])
        sample = x[only]
        for step in range(count):
            sigma = SCHEDULE.sigmas[step]
            t = torch.full((1, SHAPE[0]), 1000 * sigma)
            out = dit(sample, t, rows.frames[only], text_kv.select(only), rows.select(only), head.taps)
            x0 = sample - sigma * out.velocity
            if step + 1 < count:
                after = SCHEDULE.sigmas[step + 1]
                sample = (1 - after) * x0 + after * table[step + 1, only]
        result.append(x0)
        certain.append(torch.sigmoid(head(out.hidden, out.time)))
    return torch.cat(result), torch.cat(certain)


@pytest.mark.parametrize("counts", [(4, 4), (1, 1), (1, 3), (4, 2), (2, 4, 1, 3)])
def test_rows_that_stop_at_different_steps_equal_the_naive_loop(tiny_dit, tiny_config, close, counts):
    head = PooledHead(tiny_config).requires_grad_(False)
    torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
    x, table = torch.randn(len(counts), *SHAPE), renoise_table(len(counts))
    text_kv = tiny_dit.text_kv(torch.randn(len(counts), 5, 40))
    rows = cache_rows(tiny_dit, len(counts))
    result = denoise_chunk(
        tiny_dit,
        head,
        x,
        chunk=0,
        sigmas=SCHEDULE.sigmas,
        policies=[Fixed(n) for n in counts],
        renoise=lambda step, which: table[step, which],
        text_kv=text_kv,
        rows=rows,
    )
    expected, certain = naive(tiny_dit, head, x, counts, table, text_kv, cache_rows(tiny_dit, len(counts)))
    assert result.steps == list(counts)
    close(result.latents, expected, 1e-5)
    close(result.confidence, certain, 1e-5)


class Oracle:
    """A model that knows the clean chunk: v = (x - target) / sigma, so x0 is the target after any number of steps."""

    def __init__(self, target):
        self.target, self.sizes = target, []

    def __call__(self, x, t, frames, text_kv, memory, taps):
        self.sizes.append(len(x))
        rows = memory.which
        v = (x - self.target[rows]) / (t / 1000)[:, :, None, None, None]
        return DiTOutput(v, torch.tensor(rows), t)


class Rows:
    """Stands in for the cache view: remembers which rows are still there."""

    def __init__(self, which):
        self.which, self.frames = which, None

    def select(self, keep):
        return Rows([self.which[i] for i in keep.tolist()])


def logits(hidden, time):
    """Row r's confidence is sigmoid(r): row 0 is the least sure."""
    return hidden.float()[:, None].expand(-1, SHAPE[0])


logits.taps = ()


def test_a_perfect_model_needs_one_step_and_stopped_rows_cost_nothing():
    target = torch.randn(4, *SHAPE)
    model = Oracle(target)
    seen = []
    result = denoise_chunk(
        model,
        logits,
        torch.randn(4, *SHAPE),
        chunk=0,
        sigmas=SCHEDULE.sigmas,
        policies=[PerChunk([n]) for n in (3, 1, 4, 2)],
        renoise=lambda step, which: torch.randn(len(which), *SHAPE),
        text_kv=TextKV(torch.zeros(1, 2, 4, 1, 1, 1)),
        rows=Rows([0, 1, 2, 3]),
        on_step=seen.append,
    )
    torch.testing.assert_close(result.latents, target, rtol=0, atol=2e-6)
    assert model.sizes == [4, 3, 2, 1]
    assert [step.rows for step in seen] == [[0, 1, 2, 3], [0, 2, 3], [0, 2], [2]]
    assert [step.sigma for step in seen] == pytest.approx([1.0, 0.9, 0.75, 0.5])


def test_the_confidence_of_each_row_decides_for_that_row_alone():
    model = Oracle(torch.zeros(3, *SHAPE))
    result = denoise_chunk(
        model,
        logits,
        torch.randn(3, *SHAPE),
        chunk=0,
        sigmas=SCHEDULE.sigmas,
        policies=[Confidence(0.6) for _ in range(3)],  # sigmoid(0) = .5 never passes, sigmoid(1) = .73 does at once
        renoise=lambda step, which: torch.zeros(len(which), *SHAPE),
        text_kv=TextKV(torch.zeros(1, 2, 3, 1, 1, 1)),
        rows=Rows([0, 1, 2]),
    )
    assert result.steps == [4, 1, 1]
    assert result.confidence[:, 0].tolist() == pytest.approx([0.5, 0.7310586, 0.8807970])


class Known:
    """A model whose estimate after step k of row r and frame f is the constant table[k - 1, r, f]."""

    def __init__(self, table):
        self.table, self.step = table, 0

    def __call__(self, x, t, frames, text_kv, memory, taps):
        estimate = self.table[self.step, memory.which][:, :, None, None, None].expand(x.shape)
        self.step += 1
        return DiTOutput((x - estimate) / (t / 1000)[:, :, None, None, None], torch.tensor(memory.which), t)


ESTIMATES = torch.tensor(
    [  # [steps, rows, frames]; the changes are the squares of the differences
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [0.1, 0.1, 0.1], [1, 1, 1], [0, 0, 0]],
        [[1, 0, 1], [9, 9, 9], [1, 1, 0.9], [0, 0, 0]],
        [[1, 0, 1], [9, 9, 9], [7, 7, 7], [2, 0, 0]],
    ]
)


def known_chunk(policies, table=ESTIMATES, head=None):
    model = Known(table)
    return denoise_chunk(
        model,
        head,
        torch.randn(4, *SHAPE),
        chunk=0,
        sigmas=SCHEDULE.sigmas,
        policies=policies,
        renoise=lambda step, which: torch.randn(len(which), *SHAPE),
        text_kv=TextKV(torch.zeros(1, 2, 4, 1, 1, 1)),
        rows=Rows([0, 1, 2, 3]),
    )


def test_a_row_stops_when_its_own_estimate_hardly_changes():
    """Row 0 settles at step 4, 1 at 2, 2 at 3, 3 at 2: while others leave, each is compared with its own past."""
    result = known_chunk([Change(0.02) for _ in range(4)])
    assert result.steps == [4, 2, 3, 2]
    exits = ESTIMATES[[3, 1, 2, 1], range(4)]
    torch.testing.assert_close(result.latents, exits[:, :, None, None, None].expand(-1, *SHAPE), rtol=0, atol=1e-5)
    assert known_chunk([Change(0.02, frame_reduce="min") for _ in range(4)]).steps == [2, 2, 3, 2]


def test_rows_may_read_different_things_at_once():
    """The change of row 0, the confidence of rows 1 and 3 (sigmoid of the row's number), nothing for row 2."""
    policies = [Change(0.02), Confidence(0.8), Fixed(3), Confidence(0.9)]
    assert known_chunk(policies, head=logits).steps == [4, 4, 3, 1]


@pytest.mark.parametrize(
    "policies, fetched",
    [
        ([Fixed(4)] * 4, 0),
        ([Confidence(1.0)] * 4, 3),  # after the last step nothing is left to decide
        ([Change(0.0)] * 4, 2),  # after the first step there is nothing to see
        ([Change(0.0), Confidence(1.0), Fixed(4), Confidence(1.0)], 3),
    ],
)
def test_a_decision_fetches_at_most_once_and_only_what_is_read(monkeypatch, policies, fetched):
    calls = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self.is_floating_point()) or tolist(self))
    steps = torch.arange(4.0)[:, None, None].expand(4, 4, 3)  # always changes
    assert known_chunk(policies, table=steps, head=logits).steps == [4] * 4
    assert sum(calls) == fetched
