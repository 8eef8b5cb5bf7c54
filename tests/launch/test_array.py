"""How trials are dealt to the elements of an array."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddsweep.launch.array import deal


def trials(*seconds: float) -> tuple[list[Any], dict[str, float]]:
    ids = [f"t{number}" for number in range(len(seconds))]
    return [SimpleNamespace(trial_id=one) for one in ids], dict(zip(ids, seconds, strict=True))


@pytest.mark.parametrize("elements", [1, 3, 7, 50])
def test_shares_are_disjoint_whole_and_balanced(elements: int) -> None:
    costs = [float(1 + number * 7919 % 13) for number in range(40)]
    found, seconds = trials(*costs)
    shares = deal(found, seconds, elements)
    assert len(shares) == min(elements, 40) and all(shares)
    dealt = [one for share in shares for one in share]
    assert sorted(dealt) == sorted(seconds)
    sums = [sum(seconds[one] for one in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs)
    assert deal(found, seconds, elements) == shares


def test_one_dear_trial_keeps_its_element_for_itself() -> None:
    assert deal(*trials(1, 1, 10, 1), 2) == [["t2"], ["t0", "t1", "t3"]]
    assert deal([], {}, 4) == []
