"""When a live stream's chunks are wanted and due, and how hard the load presses. No thread, no clock: times come in."""

from __future__ import annotations

import math


class Pace:
    """The player at the other end, as far as one can know it: it starts with the first chunk and shows `fps` frames a
    second; when it runs out, it stands still until the next chunk is there, and goes on from then.

    A chunk is wanted when what the player still holds lasts no longer than one chunk, and due when it holds nothing.
    So a stream is at most a chunk ahead: a new prompt is seen soon, and nothing is made that nobody may ever see.
    """

    def __init__(self, fps: float, now: float):
        self.fps = fps
        self.wanted = now  # when the next chunk may be begun
        self.due = math.inf  # when the player runs out

    def taken(self, now: float) -> None:
        """The consumer has room for the next chunk. One that was slow in saying so has kept itself waiting."""
        if now > self.wanted:
            self.due = max(self.due, self.due + now - self.wanted)
            self.wanted = now

    def delivered(self, now: float, frames: int) -> tuple[float, float | None]:
        """A chunk of some frames is there; returns its latency and the latency that it was allowed, None for any."""
        latency = now - self.wanted
        deadline = None if math.isinf(self.due) else self.due - self.wanted
        lasts = frames / self.fps
        self.due = (now if math.isinf(self.due) else max(self.due, now)) + lasts
        self.wanted = max(now, self.due - lasts)
        return latency, deadline


class Governor:
    """One confidence threshold for all "budget" streams of an engine, lowered while chunks come late.

        threshold = ceiling * (1 - pressure),      pressure += GAIN / n * (latency / deadline - SETPOINT) at each chunk,

    within [0, 1], n streams live. One threshold for all is what makes sure streams stop early first: a chunk that
    reaches it is done, one that does not is refined further, whoever it belongs to. An integral controller needs no
    model of what a step costs; it settles where the chunks take SETPOINT of their deadline, the rest of which is room
    for those that take longer than the mean.
    """

    SETPOINT = 0.6
    GAIN = 0.3
    WORST = 2.0  # a chunk that was held up for longer counts no more than this

    def __init__(self):
        self.pressure = 0.0

    def threshold(self, ceiling: float) -> float:
        return ceiling * (1.0 - self.pressure)

    def delivered(self, latency: float, deadline: float, live: int) -> None:
        error = min(latency / deadline, self.WORST) - self.SETPOINT
        self.pressure = min(max(self.pressure + self.GAIN * error / max(live, 1), 0.0), 1.0)
