"""An uploaded image: decoded within limits, scaled and cropped to the size of the video."""

from __future__ import annotations

import base64
import binascii
import io
import re

import numpy as np

from dsa_engine.media import preprocess

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
PIXELS = 4096 * 4096  # more are not unpacked, whatever a small file claims to hold


def decode(data: bytes, height: int, width: int) -> np.ndarray:
    """An image file -> uint8 [height, width, 3], scaled until it covers them and cut at the centre.

    Raises ValueError for another file, or one that is too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            w, h = image.size
            if w * h > PIXELS:
                raise Image.DecompressionBombError
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"input_reference: has more than {PIXELS} pixels, which is the limit") from error
    except Exception as error:  # the decoders of broken files raise everything that there is
        raise ValueError(f"input_reference: is no image that can be read; send {', '.join(FORMATS)}") from error
    covered = preprocess.to_video_tensor("input_reference", pixels, 1, (height, width))[0, 0]
    return (255 * covered).round().byte().movedim(0, -1).contiguous().numpy()


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
