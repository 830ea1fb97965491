"""The model's forward, and the state of every session between two forwards, on the device, one entry per cache slot.

A forward is a function only of which slots take part and how (`RowSpec`): noise level, positions, ring indices, prompt,
noise and stop rule are read on the device at the slot. So one captured graph serves every step of every chunk of every
session, and sessions at different steps and positions share a forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_engine import ops
from dsa_engine.engine.chunk_plan import Forward, LaunchSpec, RowSpec, lower
from dsa_engine.engine.device import read
from dsa_engine.kernel_types import REDUCE, StopRule
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.interfaces import TextKV
from dsa_engine.ops.reference import reduce_confidence
from dsa_engine.sampling.kv_cache import CacheView, KVCache
from dsa_engine.sampling.policy import ExitRule
from dsa_engine.sampling.schedule import TIMESTEPS


class ModelRunner:
    """Static buffers for the N slots of a cache; entry N is scratch space, to which padding rows and commits write.

    x [N + 1, F, C, h, w]: what the next step denoises; x0: the last estimate, and so the chunk to commit next;
    noise [N + 1, S, F, C, h, w]: entry k follows step k, entry 0 starts the chunk; sigmas [N + 1, S + 1]: the levels,
    then zeros; step [N + 1]: steps taken; state [N + 1, F + 1]: confidences and stop flag (`ops.epilogue`).
    deterministic: rows run through the model one by one, so that a session's bits do not depend on the others.
    """

    def __init__(
        self,
        dit: CausalDiT,
        head: ConfidenceHead | None,
        cache: KVCache,
        frames: int,
        size: tuple[int, int],
        levels: int,
        deterministic: bool = False,
    ):
        self.dit, self.head, self.cache, self.frames, self.deterministic = dit, head, cache, frames, deterministic
        config, slots = dit.config, cache.slots
        options = {"device": dit.device, "dtype": dit.dtype}
        latents = (frames, config.in_dim, *size)
        self.x = torch.zeros(slots + 1, *latents, **options)
        self.x0 = torch.zeros_like(self.x)
        self.noise = torch.zeros(slots + 1, levels, *latents, **options)
        # The host's parameters of a chunk, one row per slot, in one copy. Floats are stored as their bits.
        self.chunk_params = torch.zeros(slots + 1, levels + 5, dtype=torch.int32, device=dit.device)
        self.sigmas, self.threshold, self.min_steps, self.max_steps, self.reduce = unpack_chunk_params(
            self.chunk_params
        )
        self.step = torch.zeros(slots + 1, dtype=torch.long, device=dit.device)
        self.state = torch.zeros(slots + 1, frames + 1, device=dit.device)
        heads = (config.num_heads, config.head_dim)
        self.text = TextKV(
            torch.zeros(config.num_layers, 2, slots + 1, config.text_len, *heads, **options),
            torch.ones(slots + 1, dtype=torch.long, device=dit.device),
            torch.ones(slots + 1, device=dit.device),
        )
        self.graphs: Any = None  # GraphRunner of this pool, once they are captured (`Engine.warmup`)
        self.prompt_lengths = [config.text_len] * (slots + 1)  # `text.used` where the host can read it

    @property
    def nbytes(self) -> int:
        own = (self.x, self.x0, self.noise, self.chunk_params, self.step, self.state, *self.text)
        return sum(t.nbytes for t in own)

    def set_prompt(self, slot: Tensor, text: TextKV) -> None:
        """The slots' prompts from now on."""
        length = text.kv.shape[3]
        self.text.kv[:, :, slot, :length] = text.kv
        self.text.used[slot] = length if text.used is None else text.used
        self.text.repeat[slot] = 1.0 if text.repeat is None else text.repeat
        for s, used in zip(slot.tolist(), self.text.used[slot].tolist()):
            self.prompt_lengths[s] = used

    def start_chunk(
        self,
        slot: Tensor,
        noise: Tensor,
        sigmas: Sequence[float],
        rules: Sequence[ExitRule],
        exit_confidence: Tensor | None = None,
    ) -> None:
        """Start a chunk in the slots [B].

        Args:
            slot: int64 [B].
            noise: [B, K, F, C, h, w], entry 0 at level sigmas[0].
            sigmas: the levels.
            rules: one a slot.
            exit_confidence: float32 [B, F] of the chunk before, for rules without a threshold. It is read on the
                device: the host need not know it.
        """
        self.x[slot] = noise[:, 0]
        self.noise[slot, : noise.shape[1]] = noise
        self.step[slot] = 0
        self.state[slot] = 0.0
        host = torch.zeros(len(rules), self.chunk_params.shape[1], dtype=torch.int32)
        levels, threshold, *counts = unpack_chunk_params(host)
        levels[:, : len(sigmas)] = torch.tensor(sigmas)
        for row, rule in enumerate(rules):
            threshold[row] = math.nan if rule.threshold is None else _at_least(rule.threshold)
            for count, value in zip(counts, (rule.min_steps, rule.max_steps, REDUCE.index(rule.reduce))):
                count[row] = value
        self.chunk_params[slot] = self._to_device(host)
        if any(rule.threshold is None for rule in rules):
            sent, previous = self.threshold[slot], reduce_confidence(exit_confidence, self.reduce[slot])
            self.threshold[slot] = torch.where(sent.isnan(), previous, sent)

    def rows(self, rows: Sequence[RowSpec], size: int = 0) -> Tensor:
        """Rows as the device reads them: [4, R] slot, commit, frames ahead, counts.

        size: R, if a batch is to be padded. Padding repeats the first row and does not count: it writes nothing but the
        keys and values that the first row writes too. It comes before that row, since after it, in deterministic mode,
        the slot has moved on.
        """
        columns = [(row.slot, row.commit, self.frames * row.ahead, True) for row in rows]
        columns = [(*columns[0][:3], False)] * (size - len(rows)) + columns
        return self._to_device(torch.tensor(list(zip(*columns))))

    def _to_device(self, host: Tensor) -> Tensor:
        """Copy without a wait: torch keeps the page-locked memory until the copy is done, then reuses it."""
        return (host.pin_memory() if self.x.is_cuda else host).to(self.x.device, non_blocking=True)

    def read_state(self) -> list[list[float]]:
        """`state` of every slot on the host, [N + 1][F + 1], once everything launched so far is done."""
        return read(self.state).tolist()

    def steps_taken(self, slots: Sequence[int]) -> list[int]:
        """Steps of their chunk that the slots have taken, as `read_state`."""
        step = read(self.step).tolist()
        return [step[slot] for slot in slots]

    def lower(
        self, plan: Sequence[Forward], rows: int, host_decides: bool = False, each_step: bool = False
    ) -> tuple[LaunchSpec, ...]:
        """A plan for so many slots as launches. host_decides: a policy has to be asked after each step; each_step: so
        has a callback, and steps are launched one by one."""
        return lower(plan) if self.graphs is None else self.graphs.lower(plan, rows, host_decides, each_step)

    def launch(self, launch: LaunchSpec, slots: Sequence[int]) -> None:
        """Run a launch for some slots whose chunks have been started."""
        if self.graphs is not None:
            return self.graphs.launch(launch, slots)
        for forward in launch.forwards:
            self.forward(forward.rows(slots))

    def forward(self, rows: Sequence[RowSpec]) -> None:
        """One forward over some rows, commits first (a step may see a chunk that is committed in the same forward)."""
        if self.graphs is not None:
            return self.graphs.forward(rows)
        lengths = [self.prompt_lengths[row.slot] for row in rows]
        self.run(self.rows(rows), lengths, any(not row.commit for row in rows))

    @torch.inference_mode()
    def run(self, rows: Tensor, lengths: Sequence[int], steps: bool = True) -> None:
        """`forward` without the host: rows [4, R] of `rows()`; lengths: keys of their prompts, at least;
        steps: whether any row is a step. Everything is written at the slots, positions last."""
        slot, commit, ahead, counts = rows
        commit, counts = commit.bool(), counts.bool()
        memory = self.cache.rows(slot, self.frames, ahead)
        if self.deterministic:
            parts = [(slice(i, i + 1), length) for i, length in enumerate(lengths)]
        else:
            parts = [(slice(None), max(lengths))]
        for part, longest in parts:
            self._rows(slot[part], commit[part], counts[part], memory.select(part), longest, steps)
        self.cache.position.index_add_(0, slot, (commit & counts) * self.frames)

    def _rows(self, slot: Tensor, commit: Tensor, counts: Tensor, memory: CacheView, longest: int, steps: bool) -> None:
        stopped = self.state[slot, -1] > 0  # a device-side loop runs on until all of its rows have stopped:
        step = self.step[slot] - stopped.long()  # one that has takes its last step again, and writes the same keys
        level = torch.where(commit, 0.0, self.sigmas[slot, step])[:, None].expand(-1, self.frames)
        x = torch.where(commit[:, None, None, None, None], self.x0[slot], self.x[slot])
        taps = () if self.head is None else self.head.taps
        text = self._text(slot, longest)
        tokens, time, hidden = self.dit.forward_features(x, TIMESTEPS * level, memory.frames, text, memory, taps)
        if not steps:
            return
        levels = self.noise.shape[1]  # nothing follows the last step, whose next level is 0
        noise = self.noise[slot, (step + 1).clamp(max=levels - 1)]
        after = self.sigmas[slot, (step + 1).clamp(max=levels)][:, None].expand_as(level)
        end = ops.epilogue(
            tokens,
            time,
            x,
            noise,
            level,
            after,
            self.dit.head.final_layer(time),
            None if self.head is None else self.head.for_epilogue(hidden, time),
            self._rule(slot, step),
            self.dit.config.eps,
        )
        scratch = len(self.x) - 1
        target = torch.where(commit | stopped | ~counts, scratch, slot)
        self.x0[target], self.state[target] = end.x0, end.state
        self.x[torch.where(end.state[:, -1] > 0, scratch, target)] = end.x  # the last step's stays, to be taken again
        self.step[target] = step + 1

    def _rule(self, slot: Tensor, step: Tensor) -> StopRule:
        taken = (step + 1).to(torch.int32)
        return StopRule(taken, self.min_steps[slot], self.max_steps[slot], self.reduce[slot], self.threshold[slot])

    def _text(self, slot: Tensor, longest: int) -> TextKV:
        kv = self.text.kv[:, :, slot, :longest]
        full = self.text.kv.shape[3]
        if slot.device.type == "cpu" and longest == full and self.text.used[slot].eq(full).all():
            return TextKV(kv)  # nothing to mask, nothing that counts more than once
        return TextKV(kv, self.text.used[slot], self.text.repeat[slot])


def unpack_chunk_params(rows: Tensor) -> tuple[Tensor, ...]:
    """Views of int32 rows [R, S + 5]: levels [R, S + 1] and threshold [R] as float32, then min_steps, most and
    reduce."""
    floats = rows.view(torch.float32)
    return floats[:, :-4], floats[:, -4], *rows[:, -3:].unbind(1)


def _at_least(threshold: float) -> float:
    """The smallest float32 that is no less, so that the device's comparison is the host's."""
    rounded = torch.tensor(threshold, dtype=torch.float32)
    return (rounded if rounded.item() >= threshold else torch.nextafter(rounded, torch.tensor(float("inf")))).item()
