"""The training loop: resumable to the bit, safe against a kill, two processes step as one with both batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dsa_engine.training.trainer import Trainer, batches, falling, level


def new(folder, steps=20, **options) -> Trainer:
    torch.manual_seed(0)
    return Trainer(nn.Linear(4, 2), folder, steps, lr=0.01, seed=3, **options)


def loss_of(trainer):
    def loss(generator):
        x = torch.randn(8, 4, generator=generator)
        return (trainer.model(x) - x[:, :2].square()).square().mean()

    return loss


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = new(tmp_path / "whole")
    whole.run(loss_of(whole), save_every=10)
    first = new(tmp_path / "parts")
    first.steps = 10  # as if it had been killed here
    first.factor = lambda step, steps: falling(step, 20)
    first.run(loss_of(first), save_every=10)
    second = new(tmp_path / "parts")
    assert second.resume() and second.step == 10
    second.run(loss_of(second), save_every=10)
    for name in ("model", "ema"):
        expected, got = (getattr(t, name).state_dict() for t in (whole, second))
        assert all(got[k].equal(v) for k, v in expected.items())


def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = new(tmp_path)
    trainer.run(loss_of(trainer), save_every=20)
    good = trainer.checkpoint.read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        trainer.save()
    assert trainer.checkpoint.read_bytes() == good


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_hurt(tmp_path):
    trainer = new(tmp_path)
    before = trainer.model.weight.clone()
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.update(trainer.model.weight.sum() * float("nan"))
    assert trainer.model.weight.equal(before)


def test_the_average_of_the_weights_is_the_weighted_sum_of_their_history(tmp_path):
    trainer = new(tmp_path, ema_decay=0.9)
    average = trainer.model.weight.detach().clone()
    for step in range(1, 8):
        trainer.update(loss_of(trainer)(trainer.generator))
        decay = min(0.9, step / (step + 50))
        average = decay * average + (1 - decay) * trainer.model.weight.detach()
    torch.testing.assert_close(trainer.ema.weight, average)


def test_learning_rate_factors():
    steps = 1000
    assert falling(0, steps) == pytest.approx(0.01)
    assert falling(200, steps) == falling(399, steps) == 1.0
    assert falling(700, steps) == pytest.approx((1 + 0.03) / 2)
    assert falling(999, steps) == pytest.approx(0.03, abs=0.002)
    assert [level(s, steps) for s in (0, 19, 500)] == [0.05, 1.0, 1.0]


def test_step_n_sees_the_same_batch_in_a_resumed_run():
    def pool(index):
        return (torch.arange(100) + 1000 * index,)

    whole = batches(pool, 4, per_pool=5)
    seen = [next(whole)[0].tolist() for _ in range(12)]
    late = batches(pool, 4, per_pool=5, start=7)
    assert [next(late)[0].tolist() for _ in range(5)] == seen[7:]
    assert [row[0] // 1000 for row in seen] == [0] * 5 + [1] * 5 + [2] * 2


def _two(rank, folder, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer = new(folder)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))[8 * rank : 8 * (rank + 1)]
    for _ in range(3):
        trainer.update((trainer.model(x) - x[:, :2].square()).square().mean())
    torch.save(trainer.model.state_dict(), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_step_as_one_with_both_batches(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_two, args=(tmp_path, port), nprocs=2)
    alone = new(tmp_path / "alone")
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        alone.update((alone.model(x) - x[:, :2].square()).square().mean())
    for rank in (0, 1):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(state["weight"], alone.model.weight.detach())
