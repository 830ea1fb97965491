"""The toy world of the small model: a coloured shape that moves over a plain background, described in a closed grammar.

Everything about it is known exactly (position, event, whether a chunk can be predicted from its past), so a model
trained on it can be measured without a judge. numpy only.

Geometry: frames are SIZE x SIZE pixels, pixel (i, j) has its centre at x = j + .5, y = i + .5, y points down.
(x, y) is the centroid of the shape and lives in [LOW, HIGH], where every shape is wholly inside the frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from types import MappingProxyType

import numpy as np

from dsa_engine.checks import check_min

SIZE = 64  # px, height and width of a frame
RADIUS = 10.0  # px; the shapes have comparable areas, see `distance`
SPEED = 3.0  # px per frame along each moving axis
LOW, HIGH = 12.5, SIZE - 12.5  # px, range of the centroid; 12 px is the reach of the triangle's corner
WINDOW = 28  # px, side of the window around a centroid that holds the whole shape

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (40, 70, 255),
    "yellow": (240, 220, 40),
    "magenta": (230, 50, 230),
    "cyan": (60, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = {
    "still": "rests",
    "sideways": "moves sideways",
    "vertical": "moves up and down",
    "diagonal": "moves diagonally",
    "jumping": "jumps",
}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (80, 80, 80), "navy": (20, 28, 84)}
EVENTS = ("first", "same", "cut", "soft")
MOTION_WEIGHTS = MappingProxyType({"still": 0.1, "sideways": 0.3, "vertical": 0.3, "diagonal": 0.2, "jumping": 0.1})

SLOTS = {"color": tuple(COLORS), "shape": SHAPES, "motion": tuple(MOTIONS), "background": tuple(BACKGROUNDS)}
_OFFSETS = dict(zip(SLOTS, np.cumsum([0] + [len(words) for words in SLOTS.values()]).tolist()))
NULL = sum(len(words) for words in SLOTS.values())  # the id of "nothing said"
VOCABULARY = NULL + 1
NULL_TOKENS = (NULL,) * len(SLOTS)

_ANY = ["|".join(phrases) for phrases in (COLORS, SHAPES, MOTIONS.values(), BACKGROUNDS)]
GRAMMAR = "a <{}> <{}> <{}> [on <{}>]".format(*_ANY)
_PROMPT = re.compile("{0}({1}) ({2}) ({3})(?: on {0}({4}))?".format("(?:(?:an?|the) )?", *_ANY))
_MOTION_OF = {phrase: motion for motion, phrase in MOTIONS.items()}


@dataclass(frozen=True)
class Caption:
    """What a chunk shows. `str(caption)` is its prompt, `caption.tokens` what the model reads.

    Raises ValueError for a word outside its slot (`SLOTS`), naming the nearest one.
    """

    color: str
    shape: str
    motion: str
    background: str = "black"

    def __post_init__(self):
        for slot, words in SLOTS.items():
            if getattr(self, slot) not in words:
                raise _not_in(words, slot, getattr(self, slot))

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} {MOTIONS[self.motion]} on {self.background}"

    @property
    def look(self) -> tuple[str, str, str]:
        """(color, shape, background): two chunks of one look show the same object."""
        return self.color, self.shape, self.background

    @property
    def tokens(self) -> tuple[int, ...]:
        """One id per slot, in the order of `SLOTS`; the ids of two slots never overlap."""
        return tuple(_OFFSETS[slot] + words.index(getattr(self, slot)) for slot, words in SLOTS.items())

    @classmethod
    def parse(cls, prompt: str) -> Caption:
        """The caption of a prompt of `GRAMMAR`; case, spacing, the article and a final full stop do not matter.

        Raises ValueError for any other prompt, with the grammar and the nearest legal prompt.
        """
        text = " ".join(prompt.lower().split()).removesuffix(".").rstrip()
        if not text:
            raise ValueError(f"the prompt {prompt!r} is empty; it must read: {GRAMMAR}, for example: {EXAMPLE}")
        match = _PROMPT.fullmatch(text)
        if match is None:
            raise ValueError(f"the prompt {prompt!r} must read: {GRAMMAR}; the nearest is: {_nearest_caption(text)}")
        color, shape, phrase, background = match.groups(default="black")
        return cls(color, shape, _MOTION_OF[phrase], background)


EXAMPLE = Caption("red", "circle", "sideways")


def _nearest(phrases: Sequence[str], words: Sequence[str]) -> tuple[str, float]:
    """The phrase most alike to any run of as many of `words`, and how alike, in [0, 1]."""

    def similarity(phrase: str) -> float:
        n = len(phrase.split())
        runs = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
        return max(SequenceMatcher(None, phrase, run).ratio() for run in runs)

    best = max(phrases, key=similarity)
    return best, similarity(best)


def _not_in(words: Sequence[str], slot: str, word: object) -> ValueError:
    near = _nearest(words, [str(word)])[0]
    return ValueError(f"{slot} {word!r}: must be one of {', '.join(words)}; the nearest is {near!r}")


def _nearest_caption(text: str) -> Caption:
    words = text.split()
    motion = _MOTION_OF[_nearest(tuple(_MOTION_OF), words)[0]]
    background, similarity = _nearest(SLOTS["background"], words)
    # Most words have some letters of "navy" in them: a background is guessed only from a word that is close to it.
    background = background if similarity > 0.7 else "black"
    return Caption(_nearest(SLOTS["color"], words)[0], _nearest(SHAPES, words)[0], motion, background)


def as_caption(caption: Caption | str) -> Caption:
    """A prompt parsed; a caption as it is."""
    return Caption.parse(caption) if isinstance(caption, str) else caption


def distance(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance in px from points at (dx, dy) off the centroid to the outline of `shape`, negative inside.

    circle: radius 10 (area 314 px); square: side 17 (289); triangle: equilateral, apex up, corners 12 px from the
    centroid (187); cross: two bars of 20 x 7 (231). Broadcasts. Outside a corner of the triangle or the cross it is
    a lower bound, which only anti-aliasing could see.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - RADIUS
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * RADIUS
    if shape == "triangle":  # the farthest of three half-planes: the base below, two flanks
        flank = np.abs(dx) * np.float32(np.sqrt(0.75)) - 0.5 * dy
        return np.maximum(dy, flank) - 0.6 * RADIUS
    if shape == "cross":
        ax, ay, arm, half = np.abs(dx), np.abs(dy), RADIUS, 0.35 * RADIUS
        return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))
    raise _not_in(SHAPES, "shape", shape)


def window(shape: str, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance float32 [N, w, w], rows and columns int [N, w] of the w = WINDOW px around each of xy [N, 2]."""
    corner = np.clip(np.floor(xy).astype(int) - WINDOW // 2, 0, SIZE - WINDOW)  # [N, 2]
    cells = corner[:, :, None] + np.arange(WINDOW)  # [N, 2, w]
    away = (cells + 0.5 - xy[:, :, None]).astype(np.float32)
    return distance(shape, away[:, 0, None, :], away[:, 1, :, None]), cells[:, 1], cells[:, 0]


def coverage(sd: np.ndarray) -> np.ndarray:
    """Share of a pixel that is inside, in [0, 1], from the signed distance of its centre: a one-pixel-wide ramp."""
    return np.clip(0.5 - sd, 0.0, 1.0)


def _paint(looks: Sequence[tuple[str, str, str]], xy: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] of N looks at xy [N, 2]."""
    ground = np.array([BACKGROUNDS[background] for _, _, background in looks], dtype=np.uint8)
    color = np.array([COLORS[color] for color, _, _ in looks], dtype=np.float32)
    shapes = np.array([shape for _, shape, _ in looks])
    frames = np.broadcast_to(ground[:, None, None, :], (len(looks), SIZE, SIZE, 3)).copy()
    for shape in set(shapes.tolist()):
        n = np.flatnonzero(shapes == shape)
        sd, rows, columns = window(shape, xy[n])
        base = ground[n, None, None].astype(np.float32)
        paint = base + coverage(sd)[..., None] * (color[n, None, None] - base)
        frames[n[:, None, None], rows[:, :, None], columns[:, None, :]] = (paint + 0.5).astype(np.uint8)
    return frames


def render(caption: Caption | str | Sequence[Caption | str], x, y) -> np.ndarray:
    """uint8 [H, W, 3] of a caption with its centroid at (x, y) px; [N, H, W, 3] when x and y are arrays [N].

    One caption serves all N frames; a sequence gives each its own. The motion word draws nothing.
    """
    x, y = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
    xy = np.stack([x.reshape(-1), y.reshape(-1)], axis=1)
    captions = [caption] * len(xy) if isinstance(caption, Caption | str) else list(caption)
    if len(captions) != len(xy):
        raise ValueError(f"{len(captions)} captions for {len(xy)} positions: give one caption, or {len(xy)}")
    frames = _paint([as_caption(c).look for c in captions], xy)
    return frames if x.ndim else frames[0]


@dataclass(frozen=True)
class Clip:
    """frames uint8 [T, H, W, 3]; xy float64 [T, 2] px, the centroids; one caption, event and `hard` per chunk.

    A chunk is hard when its past cannot foretell it: the first, a cut, or jumping. A soft switch changes only the
    motion word; it is its own event, and hard only when it is to jumping.
    """

    frames: np.ndarray
    captions: list[Caption]
    events: list[str]
    hard: np.ndarray
    xy: np.ndarray


def events_of(captions: Sequence[Caption]) -> list[str]:
    """Each chunk's event, from the captions alone: another look is a cut, only another motion a soft switch."""
    events = ["first"]
    for before, now in zip(captions, captions[1:]):
        events.append("cut" if now.look != before.look else "soft" if now.motion != before.motion else "same")
    return events


def _positions(rng: np.random.Generator, captions: Sequence[Caption], chunk_frames: int) -> np.ndarray:
    """xy float64 [T, 2]. An axis is a point on a circle of circumference 2 (HIGH - LOW), folded onto [LOW, HIGH].

    So moving is adding SPEED, walls bounce by themselves, and the half of the circle is the direction: it outlives a
    soft switch, and that of an axis at rest is drawn but not seen.
    """
    span = HIGH - LOW
    position, positions = np.zeros(2), []
    for caption, event in zip(captions, events_of(captions)):
        moving = {"sideways": (1, 0), "vertical": (0, 1), "diagonal": (1, 1)}.get(caption.motion, (0, 0))
        if anew := event in ("first", "cut") or caption.motion == "jumping":
            position = rng.uniform(0.0, 2 * span, size=2)
        steps = np.arange(chunk_frames) + (not anew)  # an object that carries on moves into the chunk's first frame
        positions.append(position + SPEED * steps[:, None] * np.array(moving))
        position = positions[-1][-1]
    return HIGH - np.abs(np.mod(np.concatenate(positions), 2 * span) - span)


def render_clip(rng: np.random.Generator, captions: Sequence[Caption | str], chunk_frames: int = 3) -> Clip:
    """A clip of given captions, one per chunk of `chunk_frames` frames; `rng` draws positions and directions.

    The position is continuous from chunk to chunk but for a cut or a jumping chunk (which rests at a new one).
    """
    scenes = [as_caption(caption) for caption in captions]
    check_min("captions", len(scenes))
    check_min("chunk_frames", chunk_frames)
    events, xy = events_of(scenes), _positions(rng, scenes, chunk_frames)
    hard = [event in ("first", "cut") or c.motion == "jumping" for event, c in zip(events, scenes)]
    frames = _paint([c.look for c in scenes for _ in range(chunk_frames)], xy)
    return Clip(frames, scenes, events, np.array(hard), xy)


def _draw(rng: np.random.Generator, weights: Mapping[str, float]) -> Caption:
    color, shape, background = (SLOTS[k][rng.integers(len(SLOTS[k]))] for k in ("color", "shape", "background"))
    motion = rng.choice(tuple(weights), p=np.divide(tuple(weights.values()), sum(weights.values())))
    return Caption(color, shape, str(motion), background)


def sample_captions(
    rng: np.random.Generator, chunks: int, cut: float = 0.15, soft: float = 0.10, weights: Mapping = MOTION_WEIGHTS
) -> list[Caption]:
    """One caption per chunk: a later chunk is a cut to another look with probability `cut`, a soft switch with `soft`.
    The `weights` of the motion words need not sum to 1."""
    captions = [_draw(rng, weights)]
    while len(captions) < chunks:
        before, now, chance = captions[-1], captions[-1], rng.random()
        while chance < cut and now.look == before.look:
            now = _draw(rng, weights)
        others = {motion: weight for motion, weight in weights.items() if weight and motion != before.motion}
        if cut <= chance < cut + soft and others:
            now = replace(before, motion=_draw(rng, others).motion)
        captions.append(now)
    return captions


def sample_clip(rng: np.random.Generator, chunks: int = 4, chunk_frames: int = 3, **odds) -> Clip:
    """A random clip of `chunks` chunks; `odds` are the cut, soft and weights of `sample_captions`."""
    return render_clip(rng, sample_captions(rng, chunks, **odds), chunk_frames)


def sample_clips(
    rng: np.random.Generator, n: int, chunks: int = 4, chunk_frames: int = 3, **odds
) -> tuple[np.ndarray, np.ndarray]:
    """n random clips: frames uint8 [n, T, H, W, 3], tokens int64 [n, chunks, 4]; `odds` as of `sample_clip`."""
    for name, count in (("n", n), ("chunks", chunks), ("chunk_frames", chunk_frames)):
        check_min(name, count)
    frames = np.empty((n, chunks * chunk_frames, SIZE, SIZE, 3), dtype=np.uint8)
    tokens = np.empty((n, chunks, len(SLOTS)), dtype=np.int64)
    for i in range(n):
        clip = sample_clip(rng, chunks, chunk_frames, **odds)
        frames[i] = clip.frames
        tokens[i] = [caption.tokens for caption in clip.captions]
    return frames, tokens
