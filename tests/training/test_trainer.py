"""The training loop: resumable to the bit, safe against kills and full disks, two processes step as one."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dsa_engine.training.trainer import Optimized, Trainer, batches, lr_schedule, lr_warmup


class Net(nn.Module):
    """One matrix inside `blocks`, which Muon takes, and one outside."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 6)])
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.blocks[0](x).tanh())


def new(steps=20, seed=0, **options) -> Optimized:
    torch.manual_seed(seed)
    model = Net()
    return Optimized(model, lambda x: (model(x) - x[:, :2].square()).square().mean(), steps, lr=0.01, **options)


def draw(generator):
    return (torch.randn(8, 4, generator=generator),)


def state(thing) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in getattr(thing, part).state_dict().items()}


@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, muon):
    whole = Trainer(new(muon=muon), tmp_path / "whole", seed=3)
    whole.run(draw, save_every=10)
    first = Trainer(new(10, muon=muon, lr_factor=lambda step, steps: lr_schedule(step, 20)), tmp_path / "parts", seed=3)
    first.run(draw, save_every=10)  # as if it had been killed after 10
    second = Trainer(new(seed=1, muon=muon), tmp_path / "parts", seed=3)
    assert second.resume() and second.main.step == 10
    second.run(draw, save_every=10)
    expected, got = state(whole.main), state(second.main)
    assert all(got[k].equal(v) for k, v in expected.items())


def test_what_is_trained_beside_it_resumes_with_it(tmp_path):
    def both(steps):
        main, other = new(steps, lr_factor=lr_warmup), new(100, seed=5, lr_factor=lr_warmup)
        trainer = Trainer(main, tmp_path / "run", seed=1, others={"other": other})

        def prepare(generator):
            other.update(*draw(generator))
            return draw(generator)

        trainer.resume()
        trainer.run(prepare, save_every=5)
        return state(main), state(other)

    both(5)
    resumed = both(12)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    whole = both(12)
    assert all(a[k].equal(b[k]) for a, b in zip(resumed, whole) for k in a)


def test_muon_steps_are_orthogonal_and_of_adamws_size(tmp_path):
    """A matrix step of Muon has equal singular values, the more so as 5 Newton-Schulz steps allow: within [.6, 1.3]."""
    main = new(muon=0.1, weight_decay=0.0, lr_factor=lambda step, steps: 1.0)
    before = main.model.blocks[0].weight.detach().clone(), main.model.out.weight.detach().clone()
    main.update(torch.randn(64, 4))
    step = main.model.blocks[0].weight.detach() - before[0]
    values = torch.linalg.svdvals(step) / (0.1 * 0.2 * 6**0.5)  # 0.2 sqrt(larger side): as large as AdamW's updates
    assert 0.5 < values.min() and values.max() < 1.4
    adam = main.model.out.weight.detach() - before[1]
    torch.testing.assert_close(adam.abs(), torch.full_like(adam, 0.01), rtol=1e-3, atol=0)  # its first step: lr * sign


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path):
    first = Trainer(new(60, lr_factor=lr_warmup), tmp_path, seed=2)
    first.run(draw, save_every=20)
    rows = (tmp_path / "log.csv").read_text()
    torch.save(torch.load(first.checkpoint, weights_only=True), tmp_path / "keep.pt")
    back = Trainer(new(40, lr_factor=lr_warmup), tmp_path / "b", seed=2)
    back.run(draw, save_every=20)
    (tmp_path / "b" / "log.csv").write_text(rows)  # killed at step 60, the last checkpoint is of step 40
    again = Trainer(new(60, lr_factor=lr_warmup), tmp_path / "b", seed=2)
    assert again.resume()
    again.run(draw, save_every=20)

    def losses(text):
        return [(row["step"], row["loss"]) for row in csv.DictReader(text.splitlines())]

    assert losses((tmp_path / "b" / "log.csv").read_text()) == losses(rows)
    assert [step for step, _ in losses(rows)] == ["20", "40", "60"]
    assert (tmp_path / "b" / "log.png").read_bytes().startswith(b"\x89PNG")


DIES = """
import os, resource, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from test_trainer import Trainer, draw, lr_warmup, new
trainer = Trainer(new(10, lr_factor=lr_warmup), Path({folder!r}), seed=3)
trainer.run(draw, save_every=10)
trainer.main.update(torch.ones(8, 4))
{accident}
trainer.save()
"""
ACCIDENTS = {
    "full disk": "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))",
    "kill": "torch.save = lambda state, f: (f.write(b'half'), f.flush(), os.kill(os.getpid(), signal.SIGKILL))",
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_while_saving_leaves_the_last_good_checkpoint(tmp_path, accident):
    """A real limit on file size, and a real SIGKILL half-way through the file."""
    tests = str(__file__).rsplit("/", 1)[0]
    script = textwrap.dedent(DIES).format(tests=tests, folder=str(tmp_path), accident=ACCIDENTS[accident])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if accident == "kill" else 1), done.stderr
    again = Trainer(new(), tmp_path, seed=3)
    assert again.resume() and again.main.step == 10
    assert accident == "kill" or not (tmp_path / "checkpoint.part").exists()


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_hurt():
    main = new()
    before = state(main)
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(FloatingPointError, match="step 0"):
        main.update(torch.full((8, 4), float("nan")))
    assert all(v.equal(before[k]) for k, v in state(main).items())


def test_the_average_of_the_weights_is_the_weighted_sum_of_their_history():
    main = new(ema_decay=0.9)
    average = main.model.out.weight.detach().clone()
    for step in range(1, 8):
        main.update(torch.randn(8, 4))
        decay = min(0.9, step / (step + 50))
        average = decay * average + (1 - decay) * main.model.out.weight.detach()
    torch.testing.assert_close(main.ema.out.weight, average)


def test_learning_rate_factors():
    steps = 1000
    assert lr_schedule(0, steps) == pytest.approx(0.01)
    assert lr_schedule(200, steps) == lr_schedule(399, steps) == 1.0
    assert lr_schedule(700, steps) == pytest.approx((1 + 0.03) / 2)
    assert lr_schedule(999, steps) == pytest.approx(0.03, abs=0.002)
    assert [lr_warmup(s, steps) for s in (0, 19, 500)] == [0.05, 1.0, 1.0]


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
    main = new(seed=rank)  # different weights: those of process 0 count
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))[8 * rank : 8 * (rank + 1)]
    for _ in range(3):
        main.update(x)
    torch.save(main.state_dict(), folder / f"rank{rank}.pt")
    dist.barrier()  # process 0 keeps the store: it must not leave while the other still needs it
    dist.destroy_process_group()


def test_two_processes_step_as_one_with_both_batches(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_two, args=(tmp_path, port), nprocs=2)
    alone = new()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        alone.update(x)
    for rank in (0, 1):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for part in ("model", "ema"):
            for name, value in alone.state_dict()[part].items():
                torch.testing.assert_close(got[part][name], value.detach())
