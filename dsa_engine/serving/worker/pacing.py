"""When a live stream's next chunk may start and is due, and how load lowers the threshold. No thread, no clock: callers
pass the time in."""

from __future__ import annotations

import math


class PlaybackPacer:
    """Models the player at the other end: it starts with the first chunk, shows `fps` frames per second, stops when it
    runs out, and goes on when the next chunk arrives.

    The next chunk may start once the player has at most one chunk buffered, and is due when its buffer is empty. So a
    stream is at most one chunk ahead: a new prompt shows quickly, and no chunk is made that nobody may see.
    """

    def __init__(self, fps: float, now: float):
        self.fps = fps
        self.start_at = now  # when the next chunk may start
        self.runs_out = math.inf  # when the player's buffer is empty

    def ack(self, now: float) -> None:
        """The consumer can accept the next chunk. The time that it was slow in saying so is added to the deadline."""
        if now > self.start_at:
            self.runs_out = max(self.runs_out, self.runs_out + now - self.start_at)
            self.start_at = now

    def delivered(self, now: float, frames: int) -> tuple[float, float | None]:
        """A chunk of `frames` is ready. Returns its latency and its deadline in seconds, None for the first chunk."""
        latency = now - self.start_at
        first = math.isinf(self.runs_out)
        deadline = None if first else self.runs_out - self.start_at
        duration = frames / self.fps
        self.runs_out = (now if first else max(self.runs_out, now)) + duration
        self.start_at = max(now, self.runs_out - duration)
        return latency, deadline


class LoadController:
    """One confidence threshold for all "budget" streams of an engine, lowered while chunks are close to being late.

        threshold = ceiling * (1 - pressure),
        pressure += GAIN / n * ([latency > LATE_MARGIN * deadline] - TARGET_LATE_RATE)

    after each chunk, clamped to [0, 1], with n live streams. All streams share the threshold, so the most confident
    chunks stop early first, whichever stream they belong to. The controller needs no cost model of a step. It controls
    the tail and not the mean: a share TARGET_LATE_RATE of the chunks takes more than LATE_MARGIN of its deadline, so
    hardly any takes more than all of it.
    """

    LATE_MARGIN = 0.7
    TARGET_LATE_RATE = 0.02
    GAIN = 0.5  # under heavy overload about two chunks of each stream bring it down to the minimum of steps

    def __init__(self):
        self.pressure = 0.0

    def threshold(self, ceiling: float) -> float:
        return ceiling * (1.0 - self.pressure)

    def delivered(self, latency: float, deadline: float, live: int) -> None:
        error = (latency > self.LATE_MARGIN * deadline) - self.TARGET_LATE_RATE
        self.pressure = min(max(self.pressure + self.GAIN * error / max(live, 1), 0.0), 1.0)
