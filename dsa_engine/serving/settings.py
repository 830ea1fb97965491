"""What a server is configured with: where it listens, who may use it, and what one worker admits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The HTTP side of a server. Raises ValueError for values out of range."""

    host: str = "127.0.0.1"  # address to listen at; the default is this machine only
    port: int = 8000  # 0 for any that is free
    token: str | None = None  # clients must send it as a bearer token
    origins: tuple[str, ...] = ()  # other web pages that may use the API (CORS)
    data: Path = Path("dsa-engine-data")  # the jobs' database and videos
    max_body: int = 16 * 2**20  # of a request, in bytes
    max_prompt: int = 4096  # in characters
    max_frames: int = 2000  # of a job, in pixel frames
    start_timeout: float = 10.0  # seconds until a WebSocket must have sent session.start
    grace: float = 3.0  # seconds that running chunks get when the server stops

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: must be from 0 (any that is free) to 65535")
        if self.token is not None and not self.token.strip():
            raise ValueError("token='': must not be empty; leave it out for a server without one")
        for name in ("max_body", "max_prompt", "max_frames", "start_timeout", "grace"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")


@dataclass(frozen=True)
class WorkerLimits:
    """What one worker admits. Raises ValueError for values out of range."""

    max_sessions: int = 32  # live streams at once
    max_jobs: int = 4  # jobs at once
    max_queue: int = 32  # live streams that may wait for a slot
    idle_timeout: float = 30.0  # seconds that a live stream's consumer may be silent
    lifetime: float = 3600.0  # seconds of a live stream
    max_batch_rows: int = 8  # sequences of one forward
    steps: str | None = None  # of requests that name none; None: "budget", or "fixed" without a confidence head

    def __post_init__(self):
        for name, low in (("max_sessions", 1), ("max_jobs", 0), ("max_queue", 0), ("max_batch_rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {low}; nearest is {low}")
        for name in ("idle_timeout", "lifetime"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r}: must be a number of seconds above 0, e.g. 30")

    @property
    def slots(self) -> int:
        """Cache slots that this needs."""
        return self.max_sessions + self.max_jobs

    def within(self, slots: int) -> WorkerLimits:
        """The same limits for no more than `slots` sessions and jobs, in the same proportion but with at least one of
        each where possible. Logs a warning if that is fewer than asked for."""
        if slots >= self.slots:
            return self
        jobs = min(self.max_jobs, max(1, slots * self.max_jobs // self.slots), slots - 1)
        bounded = replace(self, max_sessions=slots - jobs, max_jobs=jobs)
        logger.warning(
            "%d live streams and %d jobs at once instead of %d and %d: the device's memory holds %d; "
            "--max-sessions and --max-jobs ask for others",
            bounded.max_sessions,
            bounded.max_jobs,
            self.max_sessions,
            self.max_jobs,
            slots,
        )
        return bounded
