"""A picture from a file, from bytes or from Pillow: decoded within limits, upright, scaled and cut to a size."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsa_engine.media import geometry, video
from dsa_engine.media.geometry import Orientation

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # of uploads
FILE_FORMATS = (*FORMATS, "TIFF", "AVIF", "JPEG2000", "PPM")  # of a user's own files
PIXELS = 4096 * 4096  # of an upload: more are not unpacked, whatever a small file claims to hold
FILE_PIXELS = 2 * 89_478_485  # of a user's own file: where Pillow itself refuses
NAME = "input_reference"
ORIENTATION = 0x0112  # EXIF's tag


def decode(data: bytes, height: int, width: int) -> np.ndarray:
    """An uploaded image file -> uint8 [height, width, 3]. Errors and result as `read_image`'s."""
    return _read(io.BytesIO(data), NAME, height, width, FORMATS, PIXELS)


def read_image(path: str | PathLike, height: int, width: int) -> np.ndarray:
    """An image file -> uint8 [height, width, 3]: upright by its EXIF, cut in the middle to the aspect, scaled.

    What Pillow does not know may be a video of one frame, which is read as FFmpeg reads it.

    Raises:
        ValueError: with the file's name: it is no image, is cut off, too large, or holds several frames.
        OSError: it cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            return _read(file, str(path), height, width, FILE_FORMATS, FILE_PIXELS)
        except NotPillows as error:
            try:
                frames = video.count_frames(path)
                if frames == 1:
                    return video.read_video(path, height, width, fps=1, max_frames=1)[0]
            except ValueError:
                raise error from None
    raise _several(str(path), frames)


class NotPillows(ValueError):
    """None of the formats that were asked for."""


def _several(name: str, frames: int) -> ValueError:
    return ValueError(f"{name}: holds {frames} frames; an image has one, several are a video")


def _read(file, name: str, height: int, width: int, formats: tuple[str, ...], pixels: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(file, formats=formats) as picture:
                if picture.width * picture.height > pixels:
                    raise Image.DecompressionBombError
                frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # MPO: a photo and previews
                if frames == 1:
                    return _cover(picture, height, width)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: has more than {pixels} pixels, which is the limit") from error
    except UnidentifiedImageError as error:
        raise NotPillows(f"{name}: is no image that can be read; must be {', '.join(formats)}") from error
    except Exception as error:  # the decoders of broken files raise everything that there is
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: is no image that can be read, it is cut off or damaged ({why})") from error
    raise _several(name, frames)


def _cover(picture: Image, height: int, width: int) -> np.ndarray:
    orientation = Orientation.from_exif(picture.getexif().get(ORIENTATION))
    target = (width, height) if orientation.transpose else (height, width)
    left, top, right, bottom = geometry.cover_box((picture.height, picture.width), target)
    # JPEG is decoded at half, a quarter or an eighth where that is still twice as fine as what is asked for
    finest = max(2 * target[1] / (right - left), 2 * target[0] / (bottom - top))
    if finest < 1:
        picture.draft(None, (int(finest * picture.width) + 1, int(finest * picture.height) + 1))
    return geometry.cover(as_rgb(picture), height, width, orientation=orientation)


def upright(picture: Image) -> np.ndarray:
    """A Pillow image in its own size, uint8 [H, W, 3], upright by its EXIF. Raises ValueError for floats."""
    orientation = Orientation.from_exif(picture.getexif().get(ORIENTATION))
    return np.ascontiguousarray(orientation.apply(np.asarray(as_rgb(picture).convert("RGB"))))


def as_rgb(picture: Image) -> Image:
    """A Pillow image of any mode as RGB, or grey as L; of 16 bits the upper 8. Raises ValueError for floats."""
    from PIL import Image

    if picture.mode in ("RGB", "L"):
        return picture
    if picture.mode.startswith("I"):  # I;16 in either byte order; I: older Pillows' 16 bits
        values = np.asarray(picture)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise ValueError(f"grey values from {values.min()} to {values.max()}; must be 16 bits, 0 to 65535")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("pixels of mode F, whose range is unknown; must be of 8 or 16 bits, or an array in [0, 1]")
    return picture.convert("RGB")


def from_text(text: str) -> bytes:
    """The bytes of a data URL or of plain base64. Raises ValueError for anything else."""
    match = re.match(r"data:[^,]{0,100};base64,", text)
    try:
        return base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            "input_reference: must be an image as a data URL (data:image/png;base64,...), as base64, or as a file of "
            "multipart/form-data"
        ) from error
