"""Mean, spread and confidence interval of a handful of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["mean_std_ci"]


def mean_std_ci(values: Iterable[float]) -> tuple[float, float | None, float | None]:
    """Mean, unbiased standard deviation, and half-width of the 95 % confidence interval of the mean.

    With n values: std = sqrt(sum (x - mean)^2 / (n - 1)), ci95 = t(0.975, n - 1) std / sqrt(n), by
    Student's t. One value has no spread: std and ci95 are None. No value raises ``ValueError``.
    """
    numbers = [float(value) for value in values]
    count = len(numbers)
    if count == 0:
        raise ValueError("no values: nothing to average")
    mean = math.fsum(numbers) / count
    if count == 1:
        return mean, None, None
    from scipy.special import stdtrit  # a tenth of the import time of scipy.stats

    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (count - 1))
    return mean, std, float(stdtrit(count - 1, 0.975)) * std / math.sqrt(count)
