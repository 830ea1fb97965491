"""Weights spread over two processes: they step as one does with both batches, and what is saved is whole."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dsa_engine.config import ModelConfig
from dsa_engine.models.dit import CausalDiT
from dsa_engine.training.teacher_forcing import teacher_forced
from dsa_engine.training.trainer import Optimized, lr_warmup
from dsa_engine.training.wan.sharding import Pass
from dsa_engine.training.wan.sharding import shard as spread

SIZES = ModelConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, text_dim=8, text_len=3, freq_dim=8)


def new(shard=False, checkpointing=False) -> Optimized:
    torch.manual_seed(0)
    dit = CausalDiT(SIZES)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.15)
    dit.checkpointing = checkpointing
    run = Pass(dit, teacher_forced)

    def loss(video, noisy, sigma, text):
        return run(video, noisy, sigma, text, text, 1).velocity.square().mean()

    return Optimized(dit, loss, 10, 0.01, lr_factor=lr_warmup, shard=(lambda _: spread(run, None)) if shard else None)


def batch(step: int, clips: slice):
    generator = torch.Generator().manual_seed(step)
    draws = ((2, 2, 1, 16, 4, 4), (2, 2, 1, 16, 4, 4), (2, 2), (2, 2, 3, 8))
    return [torch.rand(shape, generator=generator)[clips] for shape in draws]


def steps(main: Optimized, count: int, clips: slice = slice(None)) -> Optimized:
    for _ in range(count):
        main.update(*batch(main.step, clips))
    return main


def _two(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        main = steps(new(True, checkpointing), 3, slice(rank, rank + 1))
        state = main.state_dict()
        held = sum(p.to_local().nbytes for p in main.model.parameters())
        if rank == 0:
            torch.save(state, folder / f"{name}.pt")
            torch.save(torch.tensor(held), folder / f"{name}-held.pt")
        dist.barrier()
    main = new(True)
    main.load_state_dict(torch.load(folder / "alone.pt", weights_only=True))
    state = steps(main, 2, slice(rank, rank + 1)).state_dict()
    if rank == 0:
        torch.save(state, folder / "resumed.pt")
    dist.barrier()
    dist.destroy_process_group()


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for name, value in state.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)), prefix)
    return {prefix: state} if isinstance(state, torch.Tensor) else {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.save(steps(new(), 3).state_dict(), folder / "alone.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_two, args=(folder, port), nprocs=2)
    return folder


@pytest.mark.parametrize("name", ["plain", "checkpointed"])
def test_two_sharded_processes_step_as_one_with_both_batches(folder, name):
    """Weights, EMA and AdamW's state alike, by the same names, with and without gradient checkpointing."""
    alone, two = (flat(torch.load(folder / f"{x}.pt", weights_only=True)) for x in ("alone", name))
    assert alone.keys() == two.keys()
    for key, value in alone.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    held = torch.load(folder / f"{name}-held.pt", weights_only=True).item()
    assert held < 0.6 * sum(4 * p.numel() for p in CausalDiT(SIZES).parameters())


def test_a_run_of_one_process_goes_on_in_two(folder):
    expected = steps(new(), 5).state_dict()
    two = torch.load(folder / "resumed.pt", weights_only=True)
    assert two["step"] == 5
    for key, value in flat(expected).items():
        torch.testing.assert_close(flat(two)[key], value, rtol=1e-3, atol=2e-5)


def test_a_run_of_two_processes_goes_on_in_one(folder):
    main = new()
    main.load_state_dict(torch.load(folder / "plain.pt", weights_only=True))
    state, expected = flat(steps(main, 2).state_dict()), flat(steps(new(), 5).state_dict())
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=2e-5)


def test_checkpointing_changes_no_gradient():
    """What is computed twice is the same twice: gradients to the bit."""
    plain, again = new(), new(checkpointing=True)
    for main in (plain, again):
        main.objective(*batch(0, slice(None))).backward()
    for one, other in zip(plain.model.parameters(), again.model.parameters()):
        assert (one.grad is None and other.grad is None) or one.grad.equal(other.grad)
    assert not copy.deepcopy(CausalDiT(SIZES)).checkpointing
