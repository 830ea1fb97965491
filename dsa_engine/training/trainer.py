"""The training loop: optimizers, learning-rate schedule, EMA, resumable checkpoints, a log. Losses live elsewhere."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dsa_engine.training.csv_log import CsvLog
from dsa_engine.training.wan import sharding

LOG_EVERY = 20  # steps
Loss = Callable[..., Tensor]


def lr_schedule(step: int, steps: int, warmup: int = 100, hold: float = 0.4, floor: float = 0.03) -> float:
    """Learning-rate factor: linear warm-up, constant for `hold` of the run, then linear down to `floor`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = (step / steps - hold) / (1 - hold)
    return rise * (1 - (1 - floor) * max(0.0, fall))


def lr_warmup(step: int, steps: int, warmup: int = 20) -> float:
    """Learning-rate factor: linear warm-up, then constant."""
    return min(1.0, (step + 1) / warmup)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if distributed() else 1


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Objective(nn.Module):
    """A loss over a model as one module, so that PyTorch's data parallelism sees every use of the model's weights."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args) -> Tensor:
        return self.loss(*args)


class Optimized:
    """A model, the loss it steps on, its optimizers and the running average (EMA) of its weights.

    Gradients are clipped at norm 1 and averaged over all processes. These hold the whole model each
    (DistributedDataParallel), or with `shard` a part of its weights, gradients, optimizer states and EMA. The EMA's
    decay warms up as n / (n + 50), so short runs do not average in the initial weights.

    Args:
        model: what is trained, in place.
        loss: loss(*args) of `update`'s arguments, a scalar.
        steps: length of the run, for `lr_factor`.
        lr: AdamW's learning rate, or one for each child of the model by name.
        muon: learning rate of torch.optim.Muon (updates of AdamW's size) for the matrices inside the model's `blocks`,
            which AdamW then leaves alone; None for AdamW alone.
        betas: of AdamW.
        weight_decay: of all optimizers.
        ema_decay: the EMA's, after its warm-up; None: there is no EMA.
        lr_factor: lr_factor(step, steps) multiplies all learning rates.
        shard: spreads a model over the processes, in place (`sharding.shard`); all must have it with the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        steps: int,
        lr: float | Mapping[str, float],
        muon: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        ema_decay: float | None = 0.999,
        lr_factor: Callable[[int, int], float] = lr_schedule,
        shard: Callable[[nn.Module], None] | None = None,
    ):
        self.model, self.steps, self.lr_factor, self.ema_decay, self.step = model, steps, lr_factor, ema_decay, 0
        self.objective: nn.Module = Objective(model, loss)
        self.sharded = distributed() and shard is not None
        if distributed() and not self.sharded:
            self.objective = DistributedDataParallel(self.objective)  # gives every process the first one's weights
        self.ema = None if ema_decay is None else copy.deepcopy(model).requires_grad_(False)
        if self.sharded:
            shard(model)
            if self.ema is not None:
                sharding.spread_like(self.ema, model)
        matrices = {p for name, p in model.named_parameters() if muon and "blocks." in name and p.ndim == 2}
        rates = lr if isinstance(lr, Mapping) else {"": lr}
        groups = [
            {"params": [p for p in model.get_submodule(name).parameters() if p not in matrices], "lr": rate}
            for name, rate in rates.items()
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
        ]
        if muon:
            ordered = [p for p in model.parameters() if p in matrices]
            by_muon = torch.optim.Muon(ordered, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(by_muon)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def update(self, *args) -> float:
        """One step on loss(*args); returns the loss. FloatingPointError, and no step, where it is not finite."""
        loss = self.objective(*args)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: must be finite; try a lower rate")
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.sharded:
            sharding.clip_gradients(self.model.parameters(), 1.0)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * self.lr_factor(self.step, self.steps)
            optimizer.step()
        self.step += 1
        if self.ema is not None:
            self._average(self.ema, self.ema_decay)
        return value

    @torch.no_grad()
    def _average(self, ema: nn.Module, most: float) -> None:
        decay = min(most, self.step / (self.step + 50))
        averages, values = ([sharding.local(p) for p in module.parameters()] for module in (ema, self.model))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(ema.buffers(), self.model.buffers()):
            average.copy_(value)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of."""
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema})

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors in every case. Of a sharded model all processes must ask, and process 0 gets them."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        parts = {name: module.state_dict() for name, module in self._modules.items()}
        return sharding.gathered({**parts, "optimizers": optimizers, "step": self.step})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of any number of processes, sharded or not; every process takes its part."""
        for name, module in self._modules.items():
            own = module.state_dict()
            module.load_state_dict({key: sharding.like(value, own[key]) for key, value in state[name].items()})
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            values = {
                index: {
                    key: sharding.like(value, parameters[index]) if value.ndim else value  # a step has no shape
                    for key, value in one.items()
                }
                for index, one in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": values})
        self.step = state["step"]


class Trainer:
    """Steps a model until its number of steps, and can be killed at any time.

    Everything that a run needs to go on is in one file, `folder/checkpoint.pt`: the model, and whatever else is trained
    or averaged beside it (`others`, by name). The random values of step n depend on seed, process and n alone, so a
    resumed run equals an uninterrupted one to the bit. Process 0 writes.
    """

    def __init__(self, main: Optimized, folder: Path, seed: int = 0, others: Mapping[str, Stateful] | None = None):
        self.main, self.folder, self.seed = main, Path(folder), seed
        self.parts: dict[str, Stateful] = {"main": main, **(others or {})}
        self.generator = torch.Generator()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = CsvLog(self.folder)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(
        self,
        prepare: Callable[[torch.Generator], tuple],
        save_every: int = 500,
        note: str = "",
        report: Callable[[], dict[str, float]] = dict,
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Step on loss(*prepare(generator)) until done, with a progress bar.

        Every 20 steps a row of mean loss, seconds and what `report` adds goes to the log; every `save_every` steps, and
        at the end, a checkpoint is written and `on_save` called. The checkpoint's steps, not the clock, decide.
        """
        main, losses, start = self.main, [], time.perf_counter() - self.log.seconds
        with tqdm(total=main.steps, initial=main.step, desc=note, mininterval=5, disable=rank() > 0) as bar:
            while main.step < main.steps:
                # torch mixes the seed: neighbouring seeds are independent
                self.generator.manual_seed((self.seed * 2**24 + main.step) * 2**10 + rank())
                losses.append(main.update(*prepare(self.generator)))
                bar.update()
                if (main.step % LOG_EVERY == 0 or main.step == main.steps) and rank() == 0:
                    mean = sum(losses) / len(losses)
                    losses.clear()
                    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    seconds = round(time.perf_counter() - start, 1)
                    self.log.add({"step": main.step, "loss": mean, "seconds": seconds, **report()})
                if main.step % save_every == 0 or main.step == main.steps:
                    self.save()
                    if rank() == 0:
                        self.log.plot(note)
                        on_save()

    def save(self) -> None:
        """Write the checkpoint to a temporary name and rename it, so a kill or a full disk leaves the last good one.

        Process 0 writes; the others give their part of what is sharded.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if rank() > 0:
            return
        temporary = self.checkpoint.with_suffix(".part")
        try:
            with temporary.open("wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.checkpoint)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self) -> bool:
        """Load the folder's checkpoint if there is one; True if there was. Log rows after it are dropped."""
        found = self.checkpoint.exists()
        if found:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        if rank() == 0:
            self.log.resume(self.main.step)
        return found


def batches(
    make_pool: Callable[[int], tuple[Tensor, ...]], batch: int, per_pool: int, start: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Random batches from pools that are drawn anew every `per_pool` steps; step n's batch depends on n alone.

    make_pool(index) returns tensors of equal first dimension.
    """
    step, index = start, -1
    while True:
        if step // per_pool != index:
            index = step // per_pool
            pool = make_pool(index)  # each process has its own
        rows = torch.randint(len(pool[0]), (batch,), generator=torch.Generator().manual_seed(step * 1024 + rank()))
        yield tuple(part[rows] for part in pool)
        step += 1
