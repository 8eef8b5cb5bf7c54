"""The best setting of each kind, chosen on validation, and what it is worth on test: from the tables alone.

Seeds and networks are two levels, and are never pooled. A mean is over seeds of means over networks. Its
interval has the spread of both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ddsweep.catalog import PROTOCOLS, TrialSpec
from ddsweep.catalog.evaluation import MAX_TUNED_STEPS
from ddsweep.catalog.numbers import counted
from ddsweep.report.choice import Choice, choose, score_of
from ddsweep.report.settings import KIND, key_of, settings_of, settings_of_row
from ddsweep.report.summary import NEIGHBOUR
from ddsweep.results.reader import Results
from ddsweep.results.statistics import mean_std_ci

__all__ = [
    "FEW_NETWORKS",
    "PROTOCOL_TEXTS",
    "TUNED_MEANING",
    "Answer",
    "TwoLevels",
    "answers",
    "rows_by_trial",
    "rows_of",
    "two_levels",
    "warnings_of",
]

FEW_NETWORKS = 10
"""With fewer held-out networks the spread over them is hardly known."""

_TUNED = f"{PROTOCOLS[0]}_tuned"

PROTOCOL_TEXTS = {
    PROTOCOLS[0]: "at the same steps",
    _TUNED: "with steps tuned",
    NEIGHBOUR: "without a network",
}
"""How baselines are applied, in the order in which they are told."""

TUNED_MEANING = (
    "Tuned: at the best of the numbers of steps that were tried. By default these are T and others up to "
    f"{MAX_TUNED_STEPS}, and more may help."
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TwoLevels:
    """A mean over seeds of means over networks. ``std_networks`` is the root mean square of the seeds'
    standard deviations over networks (None where each has one network), ``std_seeds`` that of the means (None
    for one seed).

    ``ci95`` is the half-width of the 95 % interval of the mean. All seeds are judged on the same networks, so
    more seeds make it no surer of other networks. It is the root of the sum of two squares, each by
    Student's t: of the interval over the seeds' means, and of that over networks, each with its mean over
    seeds. What a seed and a network have for themselves is in both, so it is rather too wide. With one seed,
    or networks of the seeds' own, it has one of the two; None with neither."""

    mean: float
    std_networks: float | None
    std_seeds: float | None
    ci95: float | None
    seeds: int
    networks: int


def two_levels(by_seed: Sequence[Mapping[int, float]]) -> TwoLevels:
    """Sum up the values of each seed by network. Raises ``ValueError`` if there is none."""
    within = [mean_std_ci(values.values()) for values in by_seed]
    mean, over_seeds, ci95_seeds = mean_std_ci([mean for mean, _, _ in within])
    spreads = [std for _, std, _ in within if std is not None]
    rms = math.sqrt(math.fsum(std * std for std in spreads) / len(spreads)) if spreads else None
    common = set(by_seed[0]).intersection(*by_seed)
    of_networks = [math.fsum(values[i] for values in by_seed) / len(by_seed) for i in sorted(common)]
    ci95_networks = mean_std_ci(of_networks)[2] if common else None
    found = [ci95 for ci95 in (ci95_seeds, ci95_networks) if ci95 is not None]
    interval = math.hypot(*found) if found else None
    return TwoLevels(mean, rms, over_seeds, interval, len(within), min(map(len, by_seed)))


@dataclass(frozen=True)
class Answer:
    """The best of ``among`` settings of one ``kind``, by the mean of ``val_score`` over its seeds: of
    ``equals`` more with the same mean, the first of the sweep. ``unfinished`` settings were left out
    because a seed is not done. Where that holds for all, ``whole`` is false: these are those with most seeds.

    ``measure`` is what is shown: ``accuracy``, or ``attack_success`` of an attack, with ``others``, the
    accuracy on all classes but the attacked ones. ``test`` is after T steps;
    ``tuned`` is at the best rate and number of steps, of sets without learned rates. ``gains`` are paired
    differences to each baseline, by (source, protocol); protocols are those of `PROTOCOL_TEXTS`. With steps
    tuned they are those of ``tuned``, if there is one. Without ``all_known`` there may be trials of which no
    row tells, and settings with fewer seeds than others were left out.
    """

    kind: dict[str, Any]
    settings: dict[str, Any]
    trials: tuple[str, ...]
    among: int
    equals: int
    unfinished: int
    whole: bool
    val_score: float | None
    measure: str
    test: TwoLevels
    n_diverged: int
    gains: dict[tuple[str, str], TwoLevels]
    tuned: TwoLevels | None = None
    others: TwoLevels | None = None
    all_known: bool = True


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a table, with None for null."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(name): value for name, value in row.items()} for row in plain.to_dict("records")]


def rows_by_trial(frame: pd.DataFrame) -> dict[str, list[Row]]:
    by_trial: dict[str, list[Row]] = defaultdict(list)
    for row in rows_of(frame):
        by_trial[row["trial_id"]].append(row)
    return by_trial


def answers(
    results: Results, by: Sequence[str] | None = None, asked: Iterable[TrialSpec] = ()
) -> list[Answer]:
    """One answer for each kind, sorted. Trials of one kind agree in ``by``, by default in the settings of
    `KIND`. A setting with a seed that is stopped, failed or not there yet is counted, but not chosen while
    there are others: its done seeds may be the lucky ones. A trial whose evaluation is lost is not done.
    ``asked`` are the trials of the sweep file, because a trial that failed or is not there has no row that
    tells its settings; without them, a setting with fewer seeds than others lacks some. Among settings with
    equal scores the first one is chosen, in the order of ``asked``, or by trial id without it."""
    judged = _judged(results)
    rows = [
        {**row, "status": "distilled"} if row["status"] == "done" and row["trial_id"] not in judged else row
        for row in rows_of(results.trials)
    ]
    if not rows:
        return []
    asked = tuple(asked)
    there = set(results.trials["trial_id"])
    failed = set(results.failures["trial_id"])
    rows += [
        {
            **settings_of(trial),
            **{"trial_id": trial.trial_id, "val_score": None},
            "status": "failed" if trial.trial_id in failed else "missing",
        }
        for trial in asked
        if trial.trial_id not in there
    ]
    place = {trial.trial_id: number for number, trial in enumerate(asked)}
    rows.sort(key=lambda row: (place.get(row["trial_id"], len(place)), row["trial_id"]))
    kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    names = KIND if by is None else tuple(by)
    for row in rows:
        kinds[key_of(settings_of_row(row), names)].append(row)
    known, in_order = bool(asked), sorted(kinds.values(), key=lambda own: _place(own[0], names))
    chosen = [choose(of_kind, known) for of_kind in in_order]
    ids = [row["trial_id"] for choice in chosen if choice is not None for row in choice.trials]
    evals = _distilled_and_baselines(results, ids)
    found = (_answer(choice, names, evals, known) for choice in chosen if choice is not None)
    return [answer for answer in found if answer is not None]


def _place(row: Row, names: Sequence[str]) -> list[tuple[bool, float, str]]:
    """Where the kind of a trial stands among others: by one setting after the other, numbers by size."""
    values = [settings_of_row(row).get(name) for name in names]
    return [
        (False, float(value), "") if isinstance(value, int | float) else (True, 0.0, str(value))
        for value in values
    ]


def _answer(
    choice: Choice, names: Sequence[str], evals: Mapping[str, list[Row]], all_known: bool
) -> Answer | None:
    best = choice.trials
    settings = settings_of_row(best[0])
    measure = "attack_success" if settings.get("objective") == "attack" else "accuracy"
    own = {row["trial_id"]: _own_rows(evals[row["trial_id"]], row) for row in best}
    after = [_by_network(own[row["trial_id"]], measure) for row in best]
    if not all(after):
        return None
    tuned = {row["trial_id"]: _tuned_rows(evals[row["trial_id"]]) for row in best}
    after_tuned = [_by_network(tuned[row["trial_id"]], measure) for row in best]
    others = [_by_network(own[row["trial_id"]], "accuracy_other") for row in best]
    beside = [value for values in others for value in values.values()] if measure != "accuracy" else []
    return Answer(
        kind={name: settings.get(name) for name in names},
        settings=settings,
        trials=tuple(row["trial_id"] for row in best),
        among=choice.among,
        equals=choice.equals,
        unfinished=choice.unfinished,
        whole=choice.whole,
        val_score=None if score_of(best) == -math.inf else score_of(best),
        measure=measure,
        test=two_levels(after),
        n_diverged=sum(len(_diverged([*own[key], *tuned[key]])) for key in own),
        gains=_gains(best, own, tuned, evals, measure),
        tuned=two_levels(after_tuned) if all(after_tuned) else None,
        others=two_levels(others) if beside and None not in beside else None,
        all_known=all_known,
    )


def _judged(results: Results) -> set[str]:
    """The trials with a judged set."""
    frame = results.evals
    return set(frame["trial_id"][(frame["source"] == "distilled") & (frame["protocol"] == PROTOCOLS[0])])


def _distilled_and_baselines(results: Results, ids: Sequence[str]) -> dict[str, list[Row]]:
    """Of the trials ``ids`` the rows under the protocol that its set was made for, those of baselines among
    them."""
    frame = results.evals
    own = frame[frame["trial_id"].isin(ids)]
    return rows_by_trial(own[own["protocol"].isin(list(PROTOCOL_TEXTS))])


def _own_rows(rows: Sequence[Row], trial: Row) -> list[Row]:
    """The values of the distilled set after T steps."""
    ours = [row for row in rows if (row["source"], row["protocol"]) == ("distilled", PROTOCOLS[0])]
    return [row for row in ours if row["inner_step"] == trial["inner_steps"] * trial["inner_epochs"]]


def _tuned_rows(rows: Sequence[Row]) -> list[Row]:
    """The values of the distilled set at its best rate and number of steps; none for learned rates."""
    return [row for row in rows if (row["source"], row["protocol"]) == ("distilled", _TUNED)]


def _by_network(rows: Sequence[Row], measure: str) -> dict[int, float]:
    return {row["model_seed"]: row[measure] for row in rows}


def _diverged(rows: Sequence[Row]) -> set[int]:
    """The networks that diverged, after T steps or as tuned."""
    return {row["model_seed"] for row in rows if row["diverged"]}


def _gains(
    best: Sequence[Row],
    own: Mapping[str, list[Row]],
    tuned: Mapping[str, list[Row]],
    evals: Mapping[str, list[Row]],
    measure: str,
) -> dict[tuple[str, str], TwoLevels]:
    """By (source, protocol) the paired differences, for baselines that every seed has on its own networks."""
    found: dict[tuple[str, str], list[dict[int, float]]] = defaultdict(list)
    for trial in best:
        others: dict[tuple[str, str], dict[Any, float]] = defaultdict(dict)
        for row in evals[trial["trial_id"]]:
            if row["source"] != "distilled" and row[measure] is not None:
                others[row["source"], row["protocol"]][row["model_seed"]] = row[measure]
        for key, theirs in others.items():
            # Nearest neighbour needs no network. On k-means centres it is one number; on random images it
            # has as many draws as there are held-out networks, and a known network is beside them all.
            beside = key[1] == NEIGHBOUR and trial["init"] == "fixed"
            one = math.fsum(theirs.values()) / len(theirs) if beside else theirs.get(None)
            of_networks = {} if beside else theirs
            ours = own[trial["trial_id"]]
            if key[1] == _TUNED:
                ours = tuned[trial["trial_id"]] or ours
            differences = {
                row["model_seed"]: row[measure] - of_networks.get(row["model_seed"], one)
                for row in ours
                if row["model_seed"] in of_networks or one is not None
            }
            if differences:
                found[key].append(differences)
    return {key: two_levels(values) for key, values in found.items() if len(values) == len(best)}


def warnings_of(answer: Answer) -> Iterator[str]:
    """The reservations that belong to an answer."""
    test = answer.test
    if test.seeds == 1:
        yield "one seed: the interval says nothing of other seeds"
    elif test.seeds == 2:
        yield "two seeds: an interval over so few is wide, and hardly known"
    if 1 < test.networks < FEW_NETWORKS:
        yield f"{test.networks} networks are few"
    if answer.among > 1:
        yield f"validation is that of the best of {answer.among}, and so flatters; test chose nothing"
    if answer.equals:
        yield f"as good on validation images: {counted(answer.equals, 'other setting')}"
    if answer.measure == "attack_success" and answer.gains:
        yield "baselines have the rate that is best for accuracy on the rewritten labels, not for fooling"
    if answer.n_diverged:
        yield f"{counted(answer.n_diverged, 'network')} diverged, and count in the mean"
    if not answer.whole:
        yield "no setting is done for all of its seeds; this one may be the lucky one"
    if answer.unfinished:
        why = "a seed stopped, failed or not done"
        if not answer.all_known:
            why = "a seed stopped or not done, or fewer seeds than others, of which some may have failed"
        yield f"{counted(answer.unfinished, 'setting')} left out: {why}"
