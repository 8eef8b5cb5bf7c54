"""Numbers as people write them: in files, which PyYAML reads, and in sentences."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

__all__ = ["counted", "real", "whole"]

_NUMBER = re.compile(r"[-+]?(?!0\d)(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")


def counted(number: float, noun: str, plural: str = "") -> str:
    """``1 trial``, ``2 trials``; the plural has an s unless it is given."""
    return f"{number:.15g} {noun if number == 1 else plural or f'{noun}s'}"


def real(value: Any) -> float:
    """A number, also one that YAML 1.1 reads as text, such as 1e-3, or numpy's. Truth values are not numbers.

    Raises `ValueError` for anything else.
    """
    if isinstance(value, str) and _NUMBER.match(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"a whole number of {len(str(value))} digits is too large") from None


def whole(value: Any) -> int:
    """A whole number; 3.0 and 1e3 are whole, 3.5 and true are not. Raises `ValueError` for these."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    try:
        number = real(value)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)
