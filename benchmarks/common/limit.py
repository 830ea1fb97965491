"""The clock of a part of the GPU suite: how long its process may still take, counted from when the process began.

    limit = Limit(60.0)
    if limit.over(needs=5.0): ...       # what takes 5 s no longer fits

Imports, which a cold disk makes slow, are inside the limit: whoever kills the process counts them too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

UNFINISHED = 75  # exit code of a part that has left something out because its time was over
WHY = "--limit is over"


def age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class Limit:
    """seconds: of this process's life; None: for ever."""

    def __init__(self, seconds: float | None = None):
        self.began, self.seconds = time.monotonic() - age(), float("inf") if seconds is None else seconds
        self.until = self.began + self.seconds

    def share(self, part: float) -> Limit:
        """The first `part` of it, 0 to 1, as a limit of its own."""
        shorter = Limit()
        shorter.began, shorter.seconds = self.began, part * self.seconds
        shorter.until = self.began + shorter.seconds
        return shorter

    def left(self) -> float:
        """Seconds; below 0 where it is over."""
        return self.until - time.monotonic()

    def over(self, needs: float = 0.0) -> bool:
        """Whether fewer than `needs` seconds are left."""
        return self.left() <= needs
