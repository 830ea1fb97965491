"""How well a clip of the synthetic world shows what its captions say: exact, since the world is known exactly.

Each frame is compared to the four rendered shapes at every position. numpy and torch only; no learnt features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from dsa_engine.checks import check_min
from dsa_engine.shapes.world import (
    BACKGROUNDS,
    COLORS,
    HIGH,
    LOW,
    SHAPES,
    SIZE,
    Caption,
    as_caption,
    coverage,
    distance,
    window,
)

FIT_LIMIT = 0.006  # a valid frame's largest template error; a missing shape costs .003 to .04, a wrong background .03
MASS_LIMIT = 20  # px; a shape has 187 to 314
STILL_LIMIT, MOVING_LIMIT = 0.5, 1.0  # px per frame; the world's objects move by 0 or by 3, by 1.5 around a bounce
LEAP = 5.0  # px; what goes farther from one frame to the next was not moved but put elsewhere
PURE, MIXED = 0.25, 0.4  # slow axis over fast axis: at most, for one axis; at least, for a diagonal

_HALF = 15  # px: reach 12.5 of a shape, 1 of the smoothing, 1 of the sub-pixel search
_CENTRES = range(math.floor(LOW), math.ceil(HIGH) + 1)  # whole-pixel positions
_PAD = _HALF - _CENTRES[0]
_SHIFTS = np.arange(-8, 9) / 8  # px, sub-pixel positions around the best whole-pixel one


@dataclass(frozen=True)
class Scores:
    """Per frame [T] and per chunk, see `score`."""

    fit: np.ndarray  # float, mean squared error of the caption's template at its best position; frames in [0, 1]
    valid: np.ndarray  # bool, the frame shows its caption
    xy: np.ndarray  # float [T, 2], px, that best position
    texture: np.ndarray  # float, variance of the colour inside the shape; 0 in the world, about .01 with .1 of noise
    motion: np.ndarray  # bool [chunks], the object moves as the chunk's caption says


def score(
    frames: np.ndarray | torch.Tensor, captions: Caption | str | Sequence[Caption | str], chunk_frames: int = 3
) -> Scores:
    """Scores of one clip: frames [T, H, W, 3], uint8 or float in [0, 1], and one caption per frame (or one for all).

    valid = fit < .006, and none of the other shapes fits better, and more than 20 px are nearest to the caption's
    colour among all colours and backgrounds. fit = min over positions of mean((blur(frame) - blur(template))^2), with a
    box blur of 3 x 3 so that grain does not count as a wrong shape: `texture` sees it.

    motion judges each chunk of `chunk_frames` (the last may be shorter) by the mean displacement per axis, counted from
    the frame before the chunk when that shows the same object; see `moves_as`. A chunk in which a frame lacks the
    colour is wrong. Raises ValueError for other shapes, dtypes or counts of captions.
    """
    x = _unit(frames)
    texts = [captions] * len(x) if isinstance(captions, Caption | str) else captions
    shown = [as_caption(text) for text in texts]
    if len(shown) != len(x):
        raise ValueError(f"{len(shown)} captions for {len(x)} frames: give one caption, or {len(x)}")
    check_min("chunk_frames", chunk_frames)
    fits, positions = _locate(x, shown)
    own = np.array([SHAPES.index(caption.shape) for caption in shown])
    t = np.arange(len(x))
    fit, xy = fits[t, own], positions[t, own]
    seen = _mass(x, shown) > MASS_LIMIT
    valid = (fit < FIT_LIMIT) & (fits.argmin(axis=1) == own) & seen
    starts = range(0, len(x), chunk_frames)
    motion = [_chunk_moves(shown, xy, seen, start, start + chunk_frames) for start in starts]
    return Scores(fit, valid, xy, _texture(x, shown, xy), np.array(motion))


def moves_as(motion: str, path: np.ndarray) -> bool:
    """Whether positions [N, 2] in px, one per frame, move as the motion word says; fewer than 2 positions always do.

    With a, b the mean |displacement| per frame along x and y, big = max(a, b) and small = min(a, b): still and jumping
    (which stands still within a chunk) need big < .5; the others big > 1 without a leap of 5 px, and diagonal small >
    .4 big, sideways and vertical small < .25 big along the right axis. A single displacement can fall on a bounce and
    look still: chunks need 3 frames, or 2 and a past.
    """
    if len(path) < 2:
        return True
    steps = np.abs(np.diff(path, axis=0))
    a, b = steps.mean(axis=0)
    big, small = max(a, b), min(a, b)
    if motion in ("still", "jumping"):
        return bool(big < STILL_LIMIT)
    if big <= MOVING_LIMIT or steps.max() >= LEAP:
        return False
    if motion == "diagonal":
        return bool(small > MIXED * big)
    return bool(small < PURE * big and big == (a if motion == "sideways" else b))


def psnr(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    """-10 log10 mean((a - b)^2) in dB for frames [T, H, W, 3], uint8 or float in [0, 1]; inf for equal frames."""
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise ValueError(f"frames of {list(x.shape)} and {list(y.shape)}: both must have the same shape")
    error = (x - y).double().square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def _unit(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """float32 [T, H, W, 3] in [0, 1]; ValueError for another shape or dtype."""
    x = torch.as_tensor(frames).detach().cpu()
    if x.ndim != 4 or tuple(x.shape[1:]) != (SIZE, SIZE, 3):
        raise ValueError(f"frames of shape {list(x.shape)}: must be [T, {SIZE}, {SIZE}, 3]")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"frames of {x.dtype}: must be uint8, or floating point in [0, 1]; the nearest is torch.uint8")
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def _colors(captions: Sequence[Caption]) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour and background in [0, 1], each [T, 3]."""
    pairs = torch.tensor([(COLORS[c.color], BACKGROUNDS[c.background]) for c in captions]) / 255
    return pairs[:, 0], pairs[:, 1]


@cache
def _bank() -> torch.Tensor:
    """Smoothed coverage [4 shapes, 17 * 17 sub-pixel shifts (y, x), 30, 30] of shapes off the middle."""
    cells = (np.arange(2 * _HALF) + 0.5 - _HALF - _SHIFTS[:, None]).astype(np.float32)  # [17, 30]
    dy, dx = cells[:, None, :, None], cells[None, :, None, :]
    masks = np.stack([coverage(distance(shape, dx, dy)) for shape in SHAPES])  # [4, 17, 17, 30, 30]
    return F.avg_pool2d(torch.from_numpy(masks).flatten(1, 2), 3, 1, 1)


def _locate(x: torch.Tensor, captions: Sequence[Caption]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest template error [T, 4] of each shape in the caption's colours, and its position [T, 4, 2].

    With r the smoothed frame less its background, d = colour - background and m a template's coverage, the error is
    |r - m d|^2 = |r|^2 - 2 sum(m (r . d)) + |d|^2 |m|^2: one correlation of the single map r . d with the templates.
    The whole-pixel positions are tried first, then 17 x 17 sub-pixel ones around the best.
    """
    color, ground = _colors(captions)
    d = color - ground
    r = F.avg_pool2d((x - ground[:, None, None]).permute(0, 3, 1, 2), 3, 1, 1)  # [T, 3, H, W]
    energy, contrast = r.square().sum(dim=(1, 2, 3)), d.square().sum(dim=1)  # [T], [T]
    along = F.pad(torch.einsum("tchw,tc->thw", r, d), [_PAD] * 4)  # [T, H + 2 pad, W + 2 pad]
    bank = _bank()
    whole = bank[:, len(_SHIFTS) ** 2 // 2]  # [4, 30, 30]
    cost = contrast[:, None, None, None] * whole.square().sum(dim=(1, 2))[:, None, None]
    cost = cost - 2 * F.conv2d(along[:, None], whole[:, None])  # [T, 4, positions, positions]
    best = cost.flatten(2).argmin(dim=2)
    row, column = best // len(_CENTRES), best % len(_CENTRES)  # [T, 4]
    reach = torch.arange(2 * _HALF)
    t = torch.arange(len(x))[:, None, None, None]
    near = along[t, (row[..., None] + reach)[..., None], (column[..., None] + reach)[..., None, :]]  # [T, 4, 30, 30]
    cost = contrast[:, None, None] * bank.square().sum(dim=(2, 3)) - 2 * torch.einsum("tsij,skij->tsk", near, bank)
    lowest, shift = cost.min(dim=2)  # [T, 4]
    fits = (energy[:, None] + lowest).clamp(min=0) / (3 * SIZE * SIZE)
    fine = torch.from_numpy(_SHIFTS)
    xy = torch.stack((column + fine[shift % len(fine)], row + fine[shift // len(fine)]), dim=2) + _CENTRES[0]
    return fits.numpy(), xy.numpy()


def _mass(x: torch.Tensor, captions: Sequence[Caption]) -> np.ndarray:
    """Pixels [T] of each frame that are nearer to the caption's colour than to any other colour or background."""
    palette = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()]) / 255
    own = torch.tensor([list(COLORS).index(caption.color) for caption in captions])
    # |x - p|^2 less |x|^2, which is the same for all p
    nearest = (palette.square().sum(dim=1) - 2 * x @ palette.T).argmin(dim=3)
    return (nearest == own[:, None, None]).sum(dim=(1, 2)).numpy()


def _texture(x: torch.Tensor, captions: Sequence[Caption], xy: np.ndarray) -> np.ndarray:
    """Variance [T] of the pixels at least 1.5 px inside the shape, mean of the three channels."""
    texture = np.empty(len(x))
    for t, caption in enumerate(captions):
        sd, rows, columns = window(caption.shape, xy[t : t + 1])
        patch = x[t].numpy()[rows[0][:, None], columns[0]]  # [w, w, 3]
        texture[t] = patch[sd[0] < -1.5].var(axis=0).mean()
    return texture


def _chunk_moves(captions: Sequence[Caption], xy: np.ndarray, seen: np.ndarray, start: int, stop: int) -> bool:
    caption, before = captions[start], max(start - 1, 0)
    carries_on = captions[before].look == caption.look and caption.motion != "jumping" and seen[before]
    return bool(seen[start:stop].all()) and moves_as(caption.motion, xy[before if carries_on else start : stop])
