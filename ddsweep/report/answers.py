"""The best setting of each kind, chosen on validation, and what it is worth on test: from the tables alone.

Seeds and networks are two levels, and are never pooled. A mean is over seeds of means over networks. Its
interval is over seeds if there are several, else over networks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ddsweep.catalog import PROTOCOLS
from ddsweep.report.settings import KIND, NAMES, settings_of_row
from ddsweep.results.reader import Results
from ddsweep.results.statistics import mean_std_ci, paired_difference

__all__ = ["Answer", "TwoLevels", "answers", "rows_of", "two_levels"]

FEW_NETWORKS = 10
"""With fewer held-out networks the spread over them is hardly known."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TwoLevels:
    """A mean over seeds of means over networks. ``std_networks`` is the root mean square of the seeds'
    standard deviations over networks (None where each has one network), ``std_seeds`` that of the means (None
    for one seed). ``ci95`` is the half-width of the 95 % interval (Student's t): over seeds where there are
    several, else over networks."""

    mean: float
    std_networks: float | None
    std_seeds: float | None
    ci95: float | None
    seeds: int
    networks: int


def two_levels(by_seed: Sequence[Sequence[float]]) -> TwoLevels:
    """Sum up the values over networks of each seed. Raises ``ValueError`` if there is none."""
    within = [mean_std_ci(values) for values in by_seed]
    mean, over_seeds, ci95 = mean_std_ci([mean for mean, _, _ in within])
    spreads = [std for _, std, _ in within if std is not None]
    rms = math.sqrt(math.fsum(std * std for std in spreads) / len(spreads)) if spreads else None
    interval = within[0][2] if len(within) == 1 else ci95
    return TwoLevels(mean, rms, over_seeds, interval, len(within), min(map(len, by_seed)))


@dataclass(frozen=True)
class Answer:
    """The best of ``among`` settings of one ``kind``, by the mean of ``val_score`` over its seeds.

    ``measure`` is what is shown: ``accuracy``, or ``attack_success`` of an attack. ``gains`` are paired
    differences to each baseline, at the same steps (``as_distilled``) and with rate and steps tuned.
    """

    kind: dict[str, Any]
    settings: dict[str, Any]
    trials: tuple[str, ...]
    among: int
    unfinished: int
    val_score: float | None
    measure: str
    test: TwoLevels
    n_diverged: int
    gains: dict[tuple[str, str], TwoLevels]


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a table, with None for null."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(name): value for name, value in row.items()} for row in plain.to_dict("records")]


def answers(results: Results, by: Sequence[str] | None = None) -> list[Answer]:
    """One answer for each kind, in the order of the table. Trials of one kind agree in ``by``, by default in
    the settings of `KIND`. A setting with a stopped or failed seed is counted, but not chosen."""
    rows = rows_of(results.trials)
    kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    names = KIND if by is None else tuple(by)
    for row in rows:
        kinds[_key(settings_of_row(row), names)].append(row)
    evals = _distilled_and_baselines(results)
    found = (_answer(of_kind, names, evals) for of_kind in kinds.values())
    return [answer for answer in found if answer is not None]


def _answer(rows: Sequence[Row], names: Sequence[str], evals: Mapping[str, list[Row]]) -> Answer | None:
    by_setting: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    free = [name for name in NAMES if name != "seed"]
    for row in rows:
        by_setting[_key(settings_of_row(row), free)].append(row)
    whole = [own for own in by_setting.values() if all(row["status"] == "done" for row in own)]
    if not whole:
        return None
    best = max(whole, key=_score)
    settings = settings_of_row(best[0])
    measure = "attack_success" if settings.get("objective") == "attack" else "accuracy"
    own = {row["trial_id"]: _own_rows(evals[row["trial_id"]], row) for row in best}
    after = [[item[measure] for item in own[row["trial_id"]]] for row in best]
    if not all(after):
        return None
    return Answer(
        kind={name: settings.get(name) for name in names},
        settings=settings,
        trials=tuple(row["trial_id"] for row in best),
        among=len(whole),
        unfinished=len(by_setting) - len(whole),
        val_score=None if _score(best) == -math.inf else _score(best),
        measure=measure,
        test=two_levels(after),
        n_diverged=sum(item["diverged"] for rows in own.values() for item in rows),
        gains=_gains(best, own, evals) if measure == "accuracy" else {},
    )


def _score(rows: Sequence[Row]) -> float:
    scores = [row["val_score"] for row in rows]
    return -math.inf if None in scores else math.fsum(scores) / len(scores)


def _key(settings: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(repr(settings.get(name)) for name in names)


def _distilled_and_baselines(results: Results) -> dict[str, list[Row]]:
    """By trial, the rows under the protocol that its set was made for, with those of baselines."""
    frame = results.evals
    own = frame[frame["protocol"].isin([PROTOCOLS[0], f"{PROTOCOLS[0]}_tuned"])]
    by_trial: dict[str, list[Row]] = defaultdict(list)
    for row in rows_of(own):
        by_trial[row["trial_id"]].append(row)
    return by_trial


def _own_rows(rows: Sequence[Row], trial: Row) -> list[Row]:
    """The values of the distilled set after T steps."""
    last = trial["inner_steps"] * trial["inner_epochs"]
    return [row for row in rows if row["source"] == "distilled" and row["inner_step"] == last]


def _gains(
    best: Sequence[Row], own: Mapping[str, list[Row]], evals: Mapping[str, list[Row]]
) -> dict[tuple[str, str], TwoLevels]:
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for trial in best:
        others: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in evals[trial["trial_id"]]:
            if row["source"] != "distilled":
                others[row["source"], row["protocol"]].append(row)
        for key, rows in others.items():
            ours = {row["model_seed"]: row["accuracy"] for row in own[trial["trial_id"]]}
            if paired_difference(own[trial["trial_id"]], rows) is not None:
                found[key].append(
                    [ours[r["model_seed"]] - r["accuracy"] for r in rows if r["model_seed"] in ours]
                )
    return {key: two_levels(values) for key, values in found.items() if len(values) == len(best)}
