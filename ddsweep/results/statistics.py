"""Mean, spread and confidence interval of a handful of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Difference", "differences_by_network", "mean_std_ci", "paired_difference"]


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


@dataclass(frozen=True)
class Difference:
    """Mean of the differences on the ``n`` networks that both have, and the half-width of its 95 % confidence
    interval (Student's t over the differences); None for one network."""

    mean: float
    ci95: float | None
    n: int


def paired_difference(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], measure: str = "accuracy"
) -> Difference | None:
    """The ``measure`` of the rows ``ours`` minus that of ``others``, on the networks (``model_seed``) that
    both have, each once (its last row); None without a common network."""
    differences = differences_by_network(ours, others, measure)
    if not differences:
        return None
    mean, _, ci95 = mean_std_ci(differences.values())
    return Difference(mean, ci95, len(differences))


def differences_by_network(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], measure: str
) -> dict[Any, float]:
    """The ``measure`` of the rows ``ours`` minus that of ``others``, by each network that both have."""
    own, theirs = ({row["model_seed"]: row[measure] for row in rows} for rows in (ours, others))
    return {network: value - theirs[network] for network, value in own.items() if network in theirs}
