"""The runner: the next chunks of several sessions, made together, a forward at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsa_engine.engine.chunk_plan import Node, Row
from dsa_engine.engine.device import on_device
from dsa_engine.engine.model_runner import StepInputs
from dsa_engine.engine.scheduler import Batcher
from dsa_engine.engine.session import Session


@dataclass
class Turn:
    """A session whose chunk is being made, and what is left of the chunk's plan."""

    session: Session
    plan: list[Node]


class Runner:
    """Batches at the level of steps: sessions at different steps and positions share a forward.

        runner.add(session)               wants its next chunk
        for session in runner.forward():  one forward; these are done denoising
            chunk = session.finish()

    A session that stops early leaves at once, one that is added comes into the very next forward with room (`Batcher`
    says how fair that is). All sessions of a runner are of one pool: one engine, size and window. capacity: rows of a
    forward; a session takes one a step, and two where its chunk before is committed along with the first.
    """

    def __init__(self, capacity: int = 8):
        self.batcher = Batcher(capacity)
        self._turns: dict[int, Turn] = {}  # by cache slot

    @property
    def inputs(self) -> StepInputs | None:
        return next((turn.session.rollout.inputs for turn in self._turns.values()), None)

    @property
    def device(self) -> torch.device:
        """That of its sessions; with nobody there is nothing to do on any."""
        return torch.device("cpu") if self.inputs is None else self.inputs.x.device

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, session: Session, deadline: float | None = None) -> None:
        """Begin the session's next chunk. deadline: any number, only compared with those of other sessions.

        Raises ValueError for a session of another pool or one that is here already, RuntimeError for one that is closed
        or complete.
        """
        rollout = session.rollout
        if self.inputs is not None and rollout.inputs is not self.inputs:
            raise ValueError("a session of another engine, size or window: give each such pool a runner of its own")
        if session.closed or rollout.slots[0] not in self._turns:
            self._turns[rollout.slots[0]] = Turn(session, list(session.begin()))
            self._wait(rollout.slots[0], deadline)
        else:
            raise ValueError(f"the session in slot {rollout.slots[0]} already waits or runs: finish its chunk first")

    def _wait(self, slot: int, deadline: float | None = None) -> None:
        plan = self._turns[slot].plan
        replays = sum(not node.step for node in plan)
        self.batcher.add(slot, plan[replays].commit, deadline, replays)

    def remove(self, session: Session) -> None:
        """Forget a session, before it is closed or when its chunk is not wanted any more."""
        slot = session.rollout.slots[0]
        if self._turns.pop(slot, None) is not None:
            self.batcher.remove(slot)

    @on_device
    @torch.inference_mode()
    def forward(self) -> list[Session]:
        """One forward over as many rows as fit; returns the sessions whose chunk is denoised, to be finished.

        After an exception everything is as before, and the next call tries the same forward again.
        """
        rows = self.batcher.next()
        if not rows:
            return []
        alone = {row.key for row in rows if row.commit} - {row.key for row in rows if not row.commit}
        together = {row.key for row in rows if row.commit} - alone
        inputs = self.inputs
        try:
            ahead = {row: not row.commit and row.key in together for row in rows}
            inputs.forward([Row(row.key, row.commit, ahead[row]) for row in rows])
        except BaseException:
            self.batcher.report(())
            for key in dict.fromkeys(row.key for row in rows):
                self.batcher.remove(key)
                self._wait(key)
            raise
        stepped, done, state = [], [], None
        for row in rows:
            turn = self._turns[row.key]
            rollout = turn.session.rollout
            if row.key in alone:
                rollout.took(Node(commit=True, step=False), rollout.slots)
                if turn.plan[0].step:  # there was no room for both
                    turn.plan[0] = turn.plan[0]._replace(commit=False)
                else:
                    turn.plan.pop(0)
            elif not row.commit:
                node = turn.plan.pop(0)
                rollout.took(node, rollout.slots)
                stepped.append((row.key, node.decide))
        if any(decide and self._turns[key].plan for key, decide in stepped):
            state = inputs.told_back()  # of all of them at once, for every read waits for the device
        for key, decide in stepped:
            turn = self._turns[key]
            if not turn.plan or (decide and turn.session.rollout.stopped([key], state)[0]):
                done.append(key)
        self.batcher.report(done)
        return [self._turns.pop(key).session for key in done]
