"""The loop that gives DSA its name: denoise a chunk step by step, and stop when the confidence head says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsa_engine import ops
from dsa_engine.models.confidence import ConfidenceHead
from dsa_engine.models.dit import CausalDiT
from dsa_engine.models.interfaces import TextKV
from dsa_engine.sampling.kv_cache import CacheView
from dsa_engine.sampling.policy import Policy
from dsa_engine.sampling.schedule import TIMESTEPS


class Step(NamedTuple):
    """Inputs and outputs of one denoising step, for the rows of the batch that took it.

    chunk: 0, 1, ...; index: 1, 2, ...; sigma: its noise level; rows: indices in the batch;
    x, x0 [len(rows), F, C, H, W]; confidence [len(rows), F], None without a head.
    """

    chunk: int
    index: int  # type: ignore[assignment]
    sigma: float
    rows: list[int]
    x: Tensor
    x0: Tensor
    confidence: Tensor | None


class Denoised(NamedTuple):
    """latents [B, F, C, H, W]: each row's x0 estimate at its exit step; steps: each row's count;
    confidence [B, F] of the exit step on the device, None without a head."""

    latents: Tensor
    steps: list[int]
    confidence: Tensor | None


def denoise_chunk(
    model: CausalDiT,
    head: ConfidenceHead | None,
    x: Tensor,
    *,
    chunk: int,
    sigmas: Sequence[float],
    policies: Sequence[Policy],
    renoise: Callable[[int, list[int]], Tensor],
    text_kv: TextKV,
    rows: CacheView,
    on_step: Callable[[Step], None] | None = None,
) -> Denoised:
    """Denoise one chunk of B rows, each for as many steps as its policy gives it.

    At level sigma: v = model(x), x0 = x - sigma v, c = head(hidden). A row whose policy stops leaves the batch with x0;
    the others go on from (1 - sigma') x0 + sigma' noise at the next level sigma'.

    x [B, F, C, H, W]: at level sigmas[0], pure noise where that is 1; policies: one per row; renoise(step, rows) gives
    the noise after `step` steps (1, 2, ...) for those rows of the batch; text_kv, rows: the prompt's and the past's
    keys and values (the chunk's own K/V are left in the cache, not advanced); on_step is called after each step, before
    its decision.
    """
    latents = torch.empty_like(x)
    confidence = x.new_empty(x.shape[:2], dtype=torch.float32) if head else None
    steps = [0] * len(x)
    active = list(range(len(x)))
    previous = None  # x0 of the active rows after the previous step
    for step, sigma in enumerate(sigmas, 1):
        level = x.new_full(x.shape[:2], sigma, dtype=torch.float32)
        out = model(x, TIMESTEPS * level, rows.frames, text_kv, rows, head.taps if head else ())
        x0 = ops.velocity_to_x0(x, out.velocity, level)
        step_confidence = head(out.hidden, out.time).sigmoid() if head else None
        if on_step is not None:
            on_step(Step(chunk, step, sigma, list(active), x, x0, step_confidence))

        stop = [True] * len(active)
        if step < len(sigmas):  # else nothing is left to decide, nor to read
            values = read_policy_signals([policies[row].signal for row in active], step_confidence, x0, previous)
            stop = [policies[row].should_stop(chunk, step, v, len(sigmas)) for row, v in zip(active, values)]
        leave = [i for i, s in enumerate(stop) if s]
        stay = [i for i, s in enumerate(stop) if not s]
        for i in leave:
            latents[active[i]], steps[active[i]] = x0[i], step
            if head:
                confidence[active[i]] = step_confidence[i]
        if not stay:
            return Denoised(latents, steps, confidence)
        if leave:
            keep = torch.tensor(stay, device=x.device)
            x0, text_kv, rows = x0[keep], text_kv.select(keep), rows.select(keep)
            active = [active[i] for i in stay]
        previous = x0
        x = ops.renoise(x0, renoise(step, active), level[: len(active)].fill_(sigmas[step]))
    raise AssertionError("unreachable: every row stops at the last level")


def read_policy_signals(
    signals: Sequence[str | None], confidence: Tensor | None, x0: Tensor, previous: Tensor | None
) -> list[list[float] | None]:
    """Each row's policy signal, one value per frame: one device-to-host copy for the whole batch."""
    known = {}
    if "confidence" in signals:
        known["confidence"] = confidence
    if "change" in signals and previous is not None:
        known["change"] = (x0.float() - previous.float()).square().mean(dim=(2, 3, 4))
    host = dict(zip(known, torch.stack(list(known.values())).tolist())) if known else {}
    return [host[name][row] if name in host else None for row, name in enumerate(signals)]


def commit_chunk(model: CausalDiT, latents: Tensor, text_kv: TextKV, rows: CacheView) -> None:
    """Write the clean chunk's keys and values: one forward at timestep 0. Advances nothing."""
    model(latents, latents.new_zeros(latents.shape[:2], dtype=torch.float32), rows.frames, text_kv, rows)
