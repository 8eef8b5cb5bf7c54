"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "×"


def sparkline(values: Sequence[float | None], width: int = 48) -> str:
    """``values`` as bars from the least to the greatest, at most ``width`` of them.

    More values than that are averaged in runs of equal length. A run without a finite number is a ``×``, so a
    loss that is not finite is shown. Equal values give a line in the middle.
    """
    count = min(width, len(values))
    runs = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [_mean(run) for run in runs]
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return _GAP * count
    low, high = min(finite), max(finite)
    span = high - low
    return "".join(
        _GAP
        if mean is None
        else _BARS[len(_BARS) // 2 - 1]
        if span == 0
        else _BARS[round((mean - low) / span * (len(_BARS) - 1))]
        for mean in means
    )


def _mean(run: Sequence[float | None]) -> float | None:
    finite = [value for value in run if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
