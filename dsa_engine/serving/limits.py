"""What one worker admits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """sessions, jobs: live streams and jobs at once; waiting: live streams in the queue behind
    them; idle, lifetime: seconds without a sign of the consumer, and in all, of a live stream; rows: of a forward.
    steps: of an order that does not say; None is "budget", and "fixed" where the model has no confidence head."""

    sessions: int = 32
    jobs: int = 4
    waiting: int = 32
    idle: float = 30.0
    lifetime: float = 3600.0
    rows: int = 8
    steps: str | None = None

    def __post_init__(self):
        for name, least in (("sessions", 1), ("jobs", 0), ("waiting", 0), ("rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}; nearest is {least}")
        for name in ("idle", "lifetime"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r}: must be a number of seconds above 0, e.g. 30")

    def within(self, places: int) -> Limits:
        """The same with no more than `places` sessions and jobs, in the same proportion but for one of each where that
        is possible; fewer than asked for is said."""
        wanted = self.sessions + self.jobs
        if places >= wanted:
            return self
        jobs = min(self.jobs, max(1, places * self.jobs // wanted), places - 1)
        bounded = replace(self, sessions=places - jobs, jobs=jobs)
        logger.warning(
            "places for %d live streams and %d jobs instead of %d and %d: %d are what the device's memory holds; "
            "--max-sessions and --max-jobs ask for others",
            bounded.sessions,
            bounded.jobs,
            self.sessions,
            self.jobs,
            places,
        )
        return bounded
