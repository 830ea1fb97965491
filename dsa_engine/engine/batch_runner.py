"""The runner: the next chunks of several sessions, made together, a forward at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsa_engine.engine.chunk_plan import Forward, RowSpec
from dsa_engine.engine.device import on_device
from dsa_engine.engine.model_runner import ModelRunner
from dsa_engine.engine.scheduler import StepScheduler
from dsa_engine.engine.session import Session


@dataclass
class ActiveChunk:
    """A session whose chunk is being made, and what is left of the chunk's plan."""

    session: Session
    plan: list[Forward]


class BatchRunner:
    """Batches at the level of steps: sessions at different steps and positions share a forward.

        runner.add(session)               wants its next chunk
        for session in runner.forward():  one forward; these are done denoising
            chunk = session.finish()

    A session that stops early leaves at once, one that is added comes into the very next forward with room (`StepScheduler`
    says how fair that is). All sessions of a runner are of one pool: one engine, size and window. capacity: rows of a
    forward; a session takes one a step, and two where its chunk before is committed along with the first.
    """

    def __init__(self, capacity: int = 8):
        self.scheduler = StepScheduler(capacity)
        self._active: dict[int, ActiveChunk] = {}  # by cache slot

    @property
    def inputs(self) -> ModelRunner | None:
        return next((chunk.session.rollout.inputs for chunk in self._active.values()), None)

    @property
    def device(self) -> torch.device:
        """That of its sessions; with nobody there is nothing to do on any."""
        return torch.device("cpu") if self.inputs is None else self.inputs.x.device

    def __len__(self) -> int:
        return len(self._active)

    def add(self, session: Session, deadline: float | None = None) -> None:
        """Begin the session's next chunk. deadline: any number, only compared with those of other sessions.

        Raises ValueError for a session of another pool or one that is here already, RuntimeError for one that is closed
        or complete.
        """
        rollout = session.rollout
        if self.inputs is not None and rollout.inputs is not self.inputs:
            raise ValueError("a session of another engine, size or window: give each such pool a runner of its own")
        if session.closed or rollout.slots[0] not in self._active:
            self._active[rollout.slots[0]] = ActiveChunk(session, list(session.begin()))
            self._wait(rollout.slots[0], deadline)
        else:
            raise ValueError(f"the session in slot {rollout.slots[0]} already waits or runs: finish its chunk first")

    def _wait(self, slot: int, deadline: float | None = None) -> None:
        plan = self._active[slot].plan
        replays = sum(not node.step for node in plan)
        self.scheduler.add(slot, plan[replays].commit, deadline, replays)

    def remove(self, session: Session) -> None:
        """Forget a session, before it is closed or when its chunk is not wanted any more."""
        slot = session.rollout.slots[0]
        if self._active.pop(slot, None) is not None:
            self.scheduler.remove(slot)

    @on_device
    @torch.inference_mode()
    def forward(self) -> list[Session]:
        """One forward over as many rows as fit; returns the sessions whose chunk is denoised, to be finished.

        After an exception everything is as before, and the next call tries the same forward again.
        """
        rows = self.scheduler.next()
        if not rows:
            return []
        alone = {row.key for row in rows if row.commit} - {row.key for row in rows if not row.commit}
        together = {row.key for row in rows if row.commit} - alone
        inputs = self.inputs
        try:
            ahead = {row: not row.commit and row.key in together for row in rows}
            inputs.forward([RowSpec(row.key, row.commit, ahead[row]) for row in rows])
        except BaseException:
            self.scheduler.complete(())
            for key in dict.fromkeys(row.key for row in rows):
                self.scheduler.remove(key)
                self._wait(key)
            raise
        stepped, done, state = [], [], None
        for row in rows:
            chunk = self._active[row.key]
            rollout = chunk.session.rollout
            if row.key in alone:
                rollout.on_forward_done(Forward(commit=True, step=False), rollout.slots)
                if chunk.plan[0].step:  # there was no room for both
                    chunk.plan[0] = chunk.plan[0]._replace(commit=False)
                else:
                    chunk.plan.pop(0)
            elif not row.commit:
                node = chunk.plan.pop(0)
                rollout.on_forward_done(node, rollout.slots)
                stepped.append((row.key, node.decide))
        if any(decide and self._active[key].plan for key, decide in stepped):
            state = inputs.read_state()  # of all of them at once, for every read waits for the device
        for key, decide in stepped:
            chunk = self._active[key]
            if not chunk.plan or (decide and chunk.session.rollout.poll_stop_flags([key], state)[0]):
                done.append(key)
        self.scheduler.complete(done)
        return [self._active.pop(key).session for key in done]


Runner = BatchRunner  # the earlier public name
