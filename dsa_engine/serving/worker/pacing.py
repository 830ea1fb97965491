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
    """One confidence threshold for all "budget" streams of an engine, lowered while chunks come near being late.

        threshold = ceiling * (1 - pressure),     pressure += GAIN / n * ([latency > MARGIN * deadline] - RATE)

    at each chunk, within [0, 1], n streams live. One threshold for all is what makes sure chunks stop early first: one
    that reaches it is done, one that does not is refined further, whoever it belongs to. The controller needs no model
    of what a step costs, and it looks at the tail, not at the mean: it settles where a share RATE of the chunks takes
    more than MARGIN of the time it has, so that hardly any takes more than all of it.
    """

    MARGIN = 0.7
    RATE = 0.02
    GAIN = 0.5  # under a load that is far too high it takes about two chunks of each stream to the fewest steps

    def __init__(self):
        self.pressure = 0.0

    def threshold(self, ceiling: float) -> float:
        return ceiling * (1.0 - self.pressure)

    def delivered(self, latency: float, deadline: float, live: int) -> None:
        error = (latency > self.MARGIN * deadline) - self.RATE
        self.pressure = min(max(self.pressure + self.GAIN * error / max(live, 1), 0.0), 1.0)
