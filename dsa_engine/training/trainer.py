"""The training loop: optimiser, learning-rate schedule, EMA, resumable checkpoints and a log. Losses live elsewhere."""

from __future__ import annotations

import copy
import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


def falling(step: int, steps: int, warmup: int = 100, hold: float = 0.4, floor: float = 0.03) -> float:
    """Learning-rate factor: linear warm-up, constant for `hold` of the run, then linear down to `floor`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = (step / steps - hold) / (1 - hold)
    return rise * (1 - (1 - floor) * max(0.0, fall))


def average_gradients(model: nn.Module) -> None:
    """Mean of the gradients over all processes, as one flat all-reduce; nothing without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def level(step: int, steps: int, warmup: int = 20) -> float:
    """Learning-rate factor: linear warm-up, then constant."""
    return min(1.0, (step + 1) / warmup)


class Trainer:
    """Trains `model` by a loss function that draws from `generator`; everything it needs to resume is in one file.

    The EMA warms up as n / (n + 50), so short runs do not average in the initial weights. lr: one learning rate, or one
    for each child of the model by name; factor(step, steps) multiplies it.
    """

    def __init__(
        self, model: nn.Module, folder: Path, steps: int, lr: float | dict[str, float], seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.98), weight_decay: float = 0.01, ema_decay: float = 0.999,
        factor: Callable[[int, int], float] = falling,
    ):  # fmt: skip
        self.model, self.folder, self.steps, self.factor = model, Path(folder), steps, factor
        self.ema_decay = ema_decay
        self.ema = copy.deepcopy(model).requires_grad_(False)
        rates = lr if isinstance(lr, dict) else {"": lr}
        groups = [{"params": list(model.get_submodule(name).parameters()), "lr": rate} for name, rate in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
        self.rates = list(rates.values())
        self.generator = torch.Generator().manual_seed(1000 * seed + rank())
        self.step = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, loss: Callable[[torch.Generator], Tensor], save_every: int = 500, note: str = "",
        report: Callable[[], dict[str, float]] = dict, on_save: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Step until `steps`, with a progress bar; log every 20 steps, with what `report` adds; checkpoint every
        `save_every`, then call `on_save`."""
        window: list[float] = []
        started = time.perf_counter()
        with tqdm(total=self.steps, initial=self.step, desc=note, mininterval=5, disable=rank() > 0) as bar:
            while self.step < self.steps:
                window.append(self.update(loss(self.generator)))
                bar.update()
                if self.step % 20 == 0 and rank() == 0:
                    mean = sum(window) / len(window)
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    self._log(step=self.step, loss=mean, seconds=time.perf_counter() - started, **report())
                    window.clear()
                if self.step % save_every == 0 or self.step == self.steps:
                    self.save()
                    on_save()

    def update(self, loss: Tensor) -> float:
        """One optimiser step with clipping at norm 1. Raises FloatingPointError when the loss is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss {value} at step {self.step}; the last checkpoint is in {self.folder}")
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * self.factor(self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return value

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, self.step / (self.step + 50))
        ours, theirs = list(self.ema.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.ema.buffers(), self.model.buffers()):
            mine.copy_(other)

    @property
    def checkpoint(self) -> Path:
        return self.folder / (f"checkpoint.{rank()}.pt" if rank() else "checkpoint.pt")

    def save(self) -> None:
        """Write the checkpoint to a temporary name and rename it, so a kill leaves the last good one."""
        part = self.checkpoint.with_suffix(".part")
        state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        torch.save({**state, "step": self.step, "generator": self.generator.get_state()}, part)
        os.replace(part, self.checkpoint)

    def resume(self) -> bool:
        """Load the folder's checkpoint if there is one; True if there was."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.generator.set_state(state["generator"])
        return True

    def _log(self, **row: float) -> None:
        path = self.folder / "log.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def batches(make_pool: Callable[[int], tuple[Tensor, ...]], batch: int, per_pool: int, start: int = 0) -> Iterator:
    """Random batches from pools that are remade every `per_pool` steps; step n's batch depends on n alone.

    make_pool(index) returns tensors of equal first dimension.
    """
    step, held = start, -1
    while True:
        if step // per_pool != held:
            held = step // per_pool
            pool = make_pool(held)  # each process makes its own
        rows = torch.randint(len(pool[0]), (batch,), generator=torch.Generator().manual_seed(step * 64 + rank()))
        yield tuple(part[rows] for part in pool)
        step += 1
