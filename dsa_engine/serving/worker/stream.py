"""A stream on its worker: what is known of it there, and what its caller can tell it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dsa_engine.engine.batch_runner import Runner
from dsa_engine.engine.session import Session
from dsa_engine.sampling.policy import Policy
from dsa_engine.serving.types import Closed, Event, Order
from dsa_engine.serving.worker.pacing import Pace

if TYPE_CHECKING:
    from dsa_engine.serving.worker.worker import Worker

Listener = Callable[[Event], None]


class Change(NamedTuple):
    """From the next chunk on: another prompt, another threshold, or both. None leaves it as it is."""

    prompt: str | None
    event_id: str | None
    recache: bool
    threshold: float | None
    transition_chunks: int


class Task:
    """A stream as its worker knows it, and its caller's hold on it. The methods come from any thread and return at
    once; everything else belongs to the worker's thread."""

    def __init__(self, worker: Worker, id: str, order: Order, listener: Listener):
        self.id, self.order, self.listener = id, order, listener
        self._worker = worker
        self.session: Session | None = None
        self.policy: Policy | None = None
        self.runner: Runner | None = None  # while its chunk is being made
        self.decoding = False  # its chunk is being decoded
        self.pace: Pace | None = None  # of a live stream
        self.changes: deque[Change] = deque()
        self.room = True  # the consumer has taken the last chunk
        self.opened = self.begun = 0.0  # when it got its place, and when its chunk was begun
        self.seen = 0.0  # a sign of the consumer
        self.position = 0  # in the queue, as last told

    def tell(
        self,
        prompt: str | None = None,
        event_id: str | None = None,
        recache: bool = True,
        threshold: float | None = None,
        transition_chunks: int = 0,
    ) -> None:
        """Another prompt (`Session.update`), confidence threshold or both from the next chunk on; Applied or Refused
        answers."""
        change = Change(prompt, event_id, recache, threshold, transition_chunks)
        self._worker.call(lambda: self._worker.told(self, change))

    def taken(self) -> None:
        """The last chunk is out of the consumer's hands; the next may be begun."""
        now = self._worker.clock()  # what passes until the worker hears of it is not the consumer's time
        self._worker.call(lambda: self._worker.taken(self, now))

    def touch(self) -> None:
        self.seen = self._worker.clock()  # a lone float: no need to wake the worker

    def close(self, reason: str = "closed") -> None:
        """Free its place at once, also in the middle of a chunk."""
        self._worker.call(lambda: self._worker.end(self, Closed(reason)))
