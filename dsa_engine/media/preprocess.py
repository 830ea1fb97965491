"""A user's images and videos, in any of the usual forms, as one tensor of the requested size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_engine.media import geometry, image

FORMS = (
    "a PIL image, an array [H, W, 3] or a tensor [3, H, W], uint8 or float in [0, 1]; several (a list, or one axis "
    "more in front) are a video's frames, or one image for each prompt"
)


def to_video_tensor(name: str, given: Any, batch: int, size: tuple[int, int]) -> Tensor:
    """An `image` or a `video` as float32 [batch, T, 3, H, W] in [0, 1], T = 1 for an image.

    One serves all prompts; with an axis more there is one for each. Other sizes than (H, W) are cut in the middle to
    its aspect and scaled, antialiased; 8-bit frames stay 8-bit. Frames are scaled one by one, so what was given and
    what is returned are all that is in memory. A PIL image is turned upright by its EXIF.

    Raises ValueError with what is accepted.
    """
    axes, frames = _frames(name, given)
    shape = [*axes, *((frames[0].shape[2], *frames[0].shape[:2]) if frames else ())]
    if len(axes) == 0:
        shape = [1, *shape]
    if name == "image":  # one image a clip
        shape = [shape[0], 1, *shape[1:]] if len(shape) == 4 else shape
    elif len(shape) == 4:
        shape = [1, *shape]
    if len(shape) != 5 or shape[2] != 3 or 0 in shape or (name == "image" and shape[1] != 1):
        raise ValueError(f"{name} of shape {shape}: must be {FORMS}")
    if shape[0] not in (1, batch):
        raise ValueError(f"{name}: {shape[0]} for {batch} prompts; give one for all or one for each")
    _check_range(name, frames)
    scaled = torch.empty(len(frames), 3, *size)
    for out, frame in zip(scaled, frames):
        out.copy_(_cover(frame, *size))
    return scaled.unflatten(0, (shape[0], shape[1])).expand(batch, -1, -1, -1, -1)


def _cover(frame: np.ndarray, height: int, width: int) -> Tensor:
    """float32 [3, height, width] in [0, 1] of a frame [h, w, 3]."""
    from PIL import Image

    if frame.dtype == np.uint8:
        scaled = geometry.cover(Image.fromarray(np.ascontiguousarray(frame)), height, width)
        return torch.from_numpy(scaled).movedim(-1, 0) / 255
    channels = [Image.fromarray(np.ascontiguousarray(frame[..., i], np.float32)) for i in range(3)]
    return torch.stack([torch.from_numpy(geometry.cover(c, height, width)) for c in channels]).clamp(0, 1)


def _check_range(name: str, frames: list[np.ndarray]) -> None:
    ranges = [(frame.min(), frame.max()) for frame in frames if frame.dtype != np.uint8]
    if ranges:
        low, high = np.min([r[0] for r in ranges]), np.max([r[1] for r in ranges])  # NaN where one is
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: values from {low:.3g} to {high:.3g}; floats must be within [0, 1], 0 to 255 only as uint8"
            )


def _frames(name: str, given: Any) -> tuple[tuple[int, ...], list[np.ndarray]]:
    """The axes before the last three, and the frames [h, w, c] along them, as views where that is possible."""
    if isinstance(given, (list, tuple)):
        parts = [_frames(name, part) for part in given]
        shapes = [[*axes, *(frames[0].shape if frames else ())] for axes, frames in parts]
        if not parts or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{name}: a list of {shapes}; must hold at least one, all alike")
        return (len(parts), *parts[0][0]), [frame for _, frames in parts for frame in frames]
    if isinstance(given, Tensor):
        pixels = given.detach().cpu()
        array = (pixels if pixels.dtype == torch.uint8 else pixels.float()).numpy()
        array = np.moveaxis(array, -3, -1) if array.ndim >= 3 else array
    elif isinstance(given, np.ndarray):
        array = given
    elif hasattr(given, "convert"):  # a PIL image
        try:
            array = image.upright(given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    else:
        raise ValueError(f"{name} of type {type(given).__name__}: must be {FORMS}")
    if array.ndim < 3:
        raise ValueError(f"{name} of shape {list(array.shape)}: must be {FORMS}")
    axes = array.shape[:-3]
    if 0 in array.shape:
        channels_first = (*axes, array.shape[-1], *array.shape[-3:-1])
        return channels_first, []
    return axes, [array[index] for index in np.ndindex(axes)]
