"""How a picture of one size comes into a frame of another: orientation, pixel aspect, cut and scale. Pillow scales."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Orientation(NamedTuple):
    """One of the eight ways to hold a picture. To show it: rows and columns swapped (transpose), then flips."""

    transpose: bool = False
    flip_columns: bool = False
    flip_rows: bool = False

    @classmethod
    def from_exif(cls, value: int | None) -> Orientation:
        """Of EXIF's tag 0x0112, 1 to 8; others, and none, mean upright."""
        return EXIF.get(value or 1, UPRIGHT)

    @classmethod
    def from_display_matrix(cls, matrix: bytes) -> Orientation:
        """Of nine int32 in the machine's byte order, as FFmpeg has them: a point (p, q) is shown at x = a p + c q,
        y = b p + d q. Angles between are taken for the nearest right one."""
        a, b, _, c, d, *_ = struct.unpack("=9i", matrix[:36])
        if abs(a) >= abs(b):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels [H, W, 3] upright, [W, H, 3] with `transpose`."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


UPRIGHT = Orientation()
EXIF = {
    1: UPRIGHT,
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),  # turned a quarter clockwise to be upright: phones held upright
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


def cover_box(
    size: tuple[int, int], target: tuple[int, int], pixel_aspect: Fraction | float = 1.0
) -> tuple[float, float, float, float]:
    """The largest part in the middle of a picture that has the target's aspect: (left, top, right, bottom).

    Args:
        size, target: (height, width) in pixels.
        pixel_aspect: width of a pixel of the picture over its height.
    """
    (h, w), (height, width) = size, target
    wide = w * pixel_aspect * height > h * width  # compared as products: the same aspect must be the whole picture
    box_w = float(h * width / height / pixel_aspect) if wide else float(w)
    box_h = float(h) if wide else min(float(h), float(w * pixel_aspect * height / width))
    left, top = (w - box_w) / 2, (h - box_h) / 2
    return left, top, left + box_w, top + box_h


def cover(
    picture: Image,
    height: int,
    width: int,
    pixel_aspect: Fraction | float = 1.0,
    orientation: Orientation = UPRIGHT,
) -> np.ndarray:
    """A picture of mode RGB, L or F -> uint8 [height, width, 3], or float32 [height, width] of mode F.

    The middle of the target's aspect is cut out and scaled in one pass (bicubic, antialiased), and the result is put
    upright, so beyond the picture there is never more than the target in memory.
    """
    from PIL import Image

    target = (width, height) if orientation.transpose else (height, width)
    box = cover_box((picture.height, picture.width), target, pixel_aspect)
    scaled = picture.resize(target[::-1], Image.Resampling.BICUBIC, box)
    pixels = np.asarray(scaled if scaled.mode == "F" else scaled.convert("RGB"))
    return np.array(orientation.apply(pixels), order="C")
