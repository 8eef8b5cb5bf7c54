"""The choice of a setting on validation, by the mean over its seeds: no seed is chosen among."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddsweep.report.settings import NAMES, key_of, settings_of_row

__all__ = ["Choice", "choose", "score_of"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The done ``trials`` of the setting that was chosen ``among`` so many. ``equals`` others are as good,
    and ``unfinished`` ones could not be chosen. If none could, ``whole`` is false: these are those with most
    seeds."""

    trials: list[Row]
    among: int
    equals: int
    unfinished: int
    whole: bool


def choose(rows: Sequence[Row], all_known: bool) -> Choice | None:
    """The setting with the highest mean of ``val_score`` over its seeds, of which all must be done, as other
    done seeds may be the lucky ones; None if no trial is done. ``rows`` are trials with their settings and
    ``status`` (``missing``: not begun). Without ``all_known`` there may be trials that have no row."""
    by_setting: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    free = [name for name in NAMES if name != "seed"]
    for row in rows:
        by_setting[key_of(settings_of_row(row), free)].append(row)
    # Those of which nothing has been done are still to come: nothing is known of them.
    begun = [own for own in by_setting.values() if any(row["status"] != "missing" for row in own)]
    done = [[row for row in own if row["status"] == "done"] for own in begun]
    seeds = 0 if all_known else max(map(len, begun), default=0)
    able = [own for own, of_it in zip(done, begun, strict=True) if len(own) == max(len(of_it), seeds)]
    whole = bool(able)
    if not whole:
        most = max(map(len, done), default=0)
        able = [own for own in done if len(own) == most > 0]
    if not able:
        return None
    best = max(able, key=score_of)  # the first of equal ones
    equals = [own for own in able if own is not best and score_of(own) == score_of(best) > -math.inf]
    return Choice(best, len(able), len(equals), len(begun) - len(able), whole)


def score_of(rows: Sequence[Row]) -> float:
    """The mean of ``val_score``; below all others if one is missing."""
    scores = [row["val_score"] for row in rows]
    return -math.inf if None in scores else math.fsum(scores) / len(scores)
