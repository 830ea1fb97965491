"""What one worker admits."""

from __future__ import annotations

from dataclasses import dataclass


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
