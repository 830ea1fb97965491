"""Checks of arguments. Each raises ValueError with the name, the value, the rule and the nearest legal value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_int(name: str, value: Any, low: int = 1) -> None:
    """A whole number of at least `low`; bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        number = isinstance(value, (int, float)) and abs(value) < float("inf")
        near = max(low, round(value)) if number else low
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {low}; nearest is {near}")


def check_min(name: str, value: float, low: float = 1) -> None:
    """A number of at least `low`."""
    if not value >= low:
        raise ValueError(f"{name}={value!r}: must be at least {low}; nearest is {low}")


def check_unit(name: str, value: Any) -> None:
    """A number within [0, 1]; bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        number = isinstance(value, (int, float)) and value == value
        hint = f"; nearest is {min(max(float(value), 0.0), 1.0)}" if number else ""
        raise ValueError(f"{name}={value!r}: must be within [0, 1]{hint}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """One of `choices`."""
    if value not in (names := tuple(choices)):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, names))}")


def check_video(name: str, x: Any, channels: int, unit: int = 1) -> None:
    """A tensor [B, T, channels, H, W] without an empty axis, height and width multiples of `unit`."""
    if x.ndim != 5 or x.shape[2] != channels or not x.numel():
        legal = f"[B, T, {channels}, H, W]"
        raise ValueError(
            f"{name} of shape {list(x.shape)}: must be {legal}, no axis empty; the third axis must be {channels}"
        )
    height, width = x.shape[-2:]
    if height % unit or width % unit:
        near = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
        raise ValueError(f"{name} of {height} x {width}: both sides must be multiples of {unit}; nearest is {near}")
