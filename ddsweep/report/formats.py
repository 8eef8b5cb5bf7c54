"""Numbers and settings as short text for a table cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["NONE", "duration", "percent", "plain", "shape_text", "size"]

NONE = "–"
"""Stands for a value that was not measured."""


def percent(mean: float | None, spread: float | None = None, *, sign: bool = False) -> str:
    """A fraction as percent with one decimal, ``54.1 ± 6.6``; without ``spread`` just ``54.1``."""
    if mean is None:
        return NONE
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if spread is None else f"{text} ± {100 * spread:.1f}"


def plain(value: Any) -> str:
    """A setting, or any single value, as a user would write it."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    """Seconds in the units that matter: ``4.2 s``, ``37 s``, ``2 min 05 s``, ``3 h 07 min``, ``2 d 04 h``."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 1440:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def shape_text(shape: Sequence[int]) -> str:
    """(channels, height, width) as ``3x32x32``."""
    return "x".join(map(str, shape))


def size(count: float | None) -> str:
    """Bytes with a decimal prefix: ``7.8 kB``, ``872.4 MB``."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
