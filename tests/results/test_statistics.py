from __future__ import annotations

import random

import pytest
from scipy import stats

from ddsweep.results.statistics import mean_std_ci


@pytest.mark.parametrize("count", [2, 3, 16, 64, 200])
def test_agrees_with_scipy(count: int) -> None:
    draw = random.Random(count)
    values = [draw.gauss(0.9, 0.05) for _ in range(count)]
    mean, std, ci95 = mean_std_ci(values)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, count - 1, loc=mean, scale=error)
    assert mean == pytest.approx(sum(values) / count, rel=1e-12)
    assert std == pytest.approx(stats.tstd(values), rel=1e-12)
    assert ci95 == pytest.approx((high - low) / 2, rel=1e-9)


def test_one_value_has_no_spread() -> None:
    assert mean_std_ci([0.5]) == (0.5, None, None)


def test_equal_values_have_none_either() -> None:
    assert mean_std_ci([0.5, 0.5, 0.5]) == (0.5, 0.0, 0.0)


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_std_ci([])
