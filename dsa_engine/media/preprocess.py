"""A user's images and videos, in any of the usual forms, as one tensor of the requested size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = (
    "a PIL image, an array [H, W, 3] or a tensor [3, H, W], uint8 or float in [0, 1]; several (a list, or one axis "
    "more in front) are a video's frames, or one image for each prompt"
)


def to_video_tensor(name: str, given: Any, batch: int, size: tuple[int, int]) -> Tensor:
    """An `image` or a `video` as float32 [batch, T, 3, H, W] in [0, 1], T = 1 for an image.

    One serves all prompts; with an axis more there is one for each. Other sizes than (H, W) are scaled until they cover
    it, antialiased, and what sticks out is cut off evenly. Raises ValueError with what is accepted.
    """
    frames = _tensor(name, given)
    if frames.ndim == 3:
        frames = frames[None]
    if name == "image":  # one image a clip
        frames = frames.unsqueeze(1) if frames.ndim == 4 else frames
    elif frames.ndim == 4:
        frames = frames[None]
    if frames.ndim != 5 or frames.shape[2] != 3 or 0 in frames.shape or (name == "image" and frames.shape[1] != 1):
        raise ValueError(f"{name} of shape {list(frames.shape)}: must be {FORMS}")
    if len(frames) not in (1, batch):
        raise ValueError(f"{name}: {len(frames)} for {batch} prompts; give one for all or one for each")
    return resize_and_crop(frames, *size).expand(batch, -1, -1, -1, -1)


def resize_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """frames [B, T, 3, H, W], scaled until they cover height x width, and cut to it at the centre."""
    batch, _, _, h, w = frames.shape
    scale = max(height / h, width / w)
    inner = (max(height, round(h * scale)), max(width, round(w * scale)))
    if inner != (h, w):
        flat = F.interpolate(frames.flatten(0, 1), inner, mode="bicubic", antialias=True, align_corners=False)
        frames = flat.clamp(0, 1).unflatten(0, (batch, -1))
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return frames[..., top : top + height, left : left + width]


def _tensor(name: str, given: Any) -> Tensor:
    """[..., 3, H, W] float32 in [0, 1]."""
    if isinstance(given, (list, tuple)):
        parts = [_tensor(name, part) for part in given]
        if not parts or any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"{name}: a list of {[list(p.shape) for p in parts]}; must hold at least one, all alike")
        return torch.stack(parts)
    if isinstance(given, Tensor):
        frames, whole = given.detach().cpu(), given.dtype == torch.uint8
    elif isinstance(given, np.ndarray) or hasattr(given, "convert"):  # a PIL image
        array = np.asarray(given if isinstance(given, np.ndarray) else given.convert("RGB"))
        if array.ndim < 3:
            raise ValueError(f"{name} of shape {list(array.shape)}: must be {FORMS}")
        frames, whole = torch.from_numpy(np.moveaxis(array, -1, -3).copy()), array.dtype == np.uint8
    else:
        raise ValueError(f"{name} of type {type(given).__name__}: must be {FORMS}")
    frames = frames.float() / 255 if whole else frames.float()
    if frames.numel() and not (frames.min() >= 0 and frames.max() <= 1):
        raise ValueError(
            f"{name}: values from {frames.min():.3g} to {frames.max():.3g}; floats must be within [0, 1], "
            "0 to 255 only as uint8"
        )
    return frames
