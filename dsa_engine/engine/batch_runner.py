"""Runs the next chunks of several sessions together, a forward at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import torch

from dsa_engine.engine.chunk_plan import Forward, RowSpec, lower, split_commits
from dsa_engine.engine.device import on_device
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.engine.scheduler import StepScheduler
from dsa_engine.engine.session import Session


@dataclass
class ActiveChunk:
    """A session whose chunk is in the making: the rest of its plan, and the forward that comes next."""

    session: Session
    launches: Generator[Any, Any, Any]  # of `run_plan`, each of one forward
    forward: Forward

    def advance(self, state: list | None) -> bool:
        """The forward has run; returns whether another follows. state: `ModelRunner.read_state`, if it decides."""
        try:
            launch, _ = self.launches.send(state)
        except StopIteration:
            return False
        (self.forward,) = launch.forwards
        return True


class BatchRunner:
    """Step-level batching: sessions at different steps and positions share a forward.

        runner.add(session)               requests its next chunk
        for session in runner.forward():  one forward; these are done denoising
            chunk = session.finish()

    A session that stops early leaves at once; one that is added joins the very next forward with room (for fairness see
    `StepScheduler`). All sessions of a runner share a pool: one engine, size and window.
    """

    def __init__(self, capacity: int = 8):
        """A runner without sessions.

        Args:
            capacity: rows of a forward. A session takes one per step, and two where its previous chunk is committed
                along with the first step.
        """
        self.scheduler = StepScheduler(capacity)
        self._active: dict[Any, ActiveChunk] = {}  # by cache slot

    @property
    def inputs(self) -> ModelRunner | None:
        return next((chunk.session.pool for chunk in self._active.values()), None)

    @property
    def device(self) -> torch.device:
        """Of its sessions; the CPU without any."""
        return torch.device("cpu") if self.inputs is None else self.inputs.x.device

    def __len__(self) -> int:
        return len(self._active)

    def add(self, session: Session, deadline: float | None = None) -> None:
        """Start the session's next chunk.

        Args:
            session: of this runner's pool, not in it yet.
            deadline: any number, only compared with those of other sessions.

        Raises:
            ValueError: a session of another pool, or one that is in the runner already.
            RuntimeError: a session that is closed or complete.
        """
        if self.inputs is not None and session.pool is not self.inputs:
            raise ValueError("a session of another engine, size or window: give each such pool a runner of its own")
        slot = session.rollout.slots[0]
        if not session.closed and slot in self._active:
            raise ValueError(f"the session in slot {slot} already waits or runs: finish its chunk first")
        plan = session.prepare_chunk()
        if self.scheduler.capacity == 1:
            plan = split_commits(plan)
        recaches = sum(not forward.step for forward in plan)
        self.scheduler.add(slot, plan[recaches].commit, deadline, recaches)
        launches = session.rollout.run(lower(plan))
        next(launches)
        self._active[slot] = ActiveChunk(session, launches, plan[0])

    def remove(self, session: Session) -> None:
        """Forget a session, before it is closed or when its chunk is no longer needed."""
        slot = session.rollout.slots[0]
        if self._active.pop(slot, None) is not None:
            self.scheduler.remove(slot)

    @on_device
    @torch.inference_mode()
    def forward(self) -> list[Session]:
        """One forward over as many rows as fit; returns the sessions whose chunk is denoised, to be finished.

        After an exception everything is as before, and the next call retries the same forward.
        """
        rows = self.scheduler.next()
        if not rows:
            return []
        inputs = self.inputs
        by_service = sorted(rows, key=lambda row: row.commit)
        chunks: dict[Any, ActiveChunk] = {row.key: self._active[row.key] for row in by_service}
        try:
            ahead = [not row.commit and chunks[row.key].forward.commit for row in rows]
            inputs.forward([RowSpec(cast(int, row.key), row.commit, after) for row, after in zip(rows, ahead)])
        except BaseException:
            self.scheduler.abort()
            raise
        # One read for all, since every read waits for the device.
        state = inputs.read_state() if any(chunk.forward.decide for chunk in chunks.values()) else None
        done = [slot for slot, chunk in chunks.items() if not chunk.advance(state)]
        self.scheduler.complete(done)
        return [self._active.pop(slot).session for slot in done]


Runner = BatchRunner  # the earlier public name
