"""``ddsweep compare``: which settings of two sweeps differ, and which numbers moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.report.answers import rows_by_trial, rows_of, two_levels
from ddsweep.report.formats import percent, plain
from ddsweep.report.settings import NAMES, heading, key_of, settings_of_row, varying
from ddsweep.results.reader import Results
from ddsweep.results.statistics import Difference, differences_by_network, mean_std_ci

__all__ = ["Pair", "compare_lines", "pairs_of"]

_WORDS = {"accuracy": "test accuracy", "attack_success": "fooled"}

MOST_PAIRS = 20
"""The number of pairs that are listed; the mean is over all."""

MOST_VALUES = 5
"""The number of values of a setting that are listed."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two trials that agree in all settings but those in which the sweeps differ as a whole. ``differences``
    are the test accuracy of the second minus that of the first (of an attack: the fraction fooled), by the
    networks that both were judged on, and on the same images; empty if there are none."""

    first: Row
    second: Row
    differences: Mapping[Any, float]

    @property
    def moved(self) -> Difference | None:
        """Their mean."""
        if not self.differences:
            return None
        mean, _, ci95 = mean_std_ci(self.differences.values())
        return Difference(mean, ci95, len(self.differences))

    @property
    def other_data(self) -> bool:
        """Whether data of one name have another content."""
        return _differ(self, "dataset_fingerprint")

    @property
    def other_pool(self) -> bool:
        """Whether a pool was trained anew between the two."""
        return self.first["pool_train"] == self.second["pool_train"] and _differ(self, "pool_networks")

    @property
    def measure(self) -> str:
        """What the columns ``test_..._mean`` of both have: ``accuracy``, or ``attack_success`` if both are
        attacks."""
        attacks = self.first.get("objective") == self.second.get("objective") == "attack"
        return "attack_success" if attacks else "accuracy"


def _differ(pair: Pair, column: str) -> bool:
    """Whether both rows tell ``column``, and not the same."""
    a, b = pair.first[column], pair.second[column]
    return a is not None and b is not None and a != b


def pairs_of(first: Results, second: Results) -> tuple[list[str], list[Pair]]:
    """(the settings in which all trials of one differ from all of the other; the pairs, in the order of the
    first). A trial that would have several partners has none."""
    rows = [_rows(results) for results in (first, second)]
    values = [{name: {repr(settings_of_row(row).get(name)) for row in own} for name in NAMES} for own in rows]
    apart = [name for name in NAMES if values[0][name].isdisjoint(values[1][name])]
    names = [name for name in NAMES if name not in apart]
    partners: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows[1]:
        partners[key_of(settings_of_row(row), names)].append(row)
    ours: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows[0]:
        ours[key_of(settings_of_row(row), names)].append(row)
    evals = [_evals(results) for results in (first, second)]
    found = []
    for key, own in ours.items():
        if len(own) == len(partners[key]) == 1:
            (a,), (b,) = own, partners[key]
            pair = Pair(a, b, {})
            if not pair.other_data and not pair.other_pool:
                sides = evals[0][a["trial_id"]], evals[1][b["trial_id"]]
                pair = replace(pair, differences=_differences(*sides, pair))
            found.append(pair)
    return apart, found


def compare_lines(names: tuple[str, str], first: Results, second: Results) -> list[str]:
    """What `ddsweep compare` prints of the sweeps called ``names``.

    Raises `UserError` if no trial of one of them is done.
    """
    for name, results in zip(names, (first, second), strict=True):
        if not _rows(results):
            raise UserError(f"{name}: no trial is done yet")
    apart, pairs = pairs_of(first, second)
    lines = [f"{names[0]} -> {names[1]}", "", "settings:"]
    settings = [[settings_of_row(row) for row in _rows(results)] for results in (first, second)]
    for name in apart:
        a, b = (_values([plain(of.get(name)) for of in own]) for own in settings)
        lines.append(f"  {name}: {a} -> {b}")
    if not apart:
        lines.append("  none differs as a whole")
    counts = [len(_rows(results)) for results in (first, second)]
    measures = {pair.measure for pair in pairs}
    what = " or ".join(_WORDS[name] for name in _WORDS if name in (measures or {"accuracy"}))
    lines += ["", f"{what} in %, {counted(len(pairs), 'pair')} of {counts[0]} and {counts[1]} trials:"]
    if not pairs:
        lines.append("  a pair is one trial of each that are alike in all other settings")
    own = [settings_of_row(pair.first) for pair in pairs]
    shown = varying(own)
    for pair, of_pair in list(zip(pairs, own, strict=True))[:MOST_PAIRS]:
        said = ", ".join(f"{heading(name)} {plain(of_pair.get(name))}" for name in shown)
        ids = dict.fromkeys((pair.first["trial_id"], pair.second["trial_id"]))
        lines.append(f"  {' -> '.join(ids)}{': ' if said else ''}{said}")
        lines.append(f"    {_moved_text(pair)}")
    if len(pairs) > MOST_PAIRS:
        lines.append(f"  ... and {len(pairs) - MOST_PAIRS} more")
    moved = [pair.differences for pair in pairs if pair.differences]
    if len(moved) > 1 and len(measures) == 1:
        both = two_levels(moved)
        total = f"{percent(both.mean, sign=True)} ± {percent(both.ci95)}"
        shared = len(set(moved[0]).intersection(*moved)) > 1
        of = f"95 % interval, for other pairs{' and other networks' if shared else ''}"
        lines += ["", f"all pairs: {total} ({of}; {len(moved)} pairs)"]
    return lines


def _values(said: Sequence[str]) -> str:
    """The different ones, or the first few and their number."""
    found = list(dict.fromkeys(said))
    return ", ".join(found[:MOST_VALUES]) + (f", ... ({len(found)})" if found[MOST_VALUES:] else "")


def _moved_text(pair: Pair) -> str:
    moved, rows = pair.moved, (pair.first, pair.second)
    before, after = (
        percent(row[f"test_{pair.measure}_mean"], row[f"test_{pair.measure}_std"]) for row in rows
    )
    if moved is None:
        others = "data" if pair.other_data else "networks"
        return f"{before} -> {after} (other {others}: not paired)"
    if any(row["test_models"] != moved.n for row in rows):  # these are over all that each has
        before, after = (
            f"{text} on {counted(row['test_models'], 'network')}"
            for text, row in zip((before, after), rows, strict=True)
        )
    interval = "" if moved.ci95 is None else f" ± {percent(moved.ci95)}"
    on = f"on the same {moved.n} networks" if moved.n > 1 else "on the same network"
    return f"{before} -> {after}, {percent(moved.mean, sign=True)}{interval} {on}"


def _rows(results: Results) -> list[Row]:
    done = results.trials[results.trials["status"] == "done"]
    return rows_of(done)


def _evals(results: Results) -> dict[str, list[Row]]:
    """By trial, the rows of the distilled set under its own protocol."""
    frame = results.evals
    return rows_by_trial(frame[(frame["source"] == "distilled") & (frame["protocol"] == "as_distilled")])


def _differences(first: Sequence[Row], second: Sequence[Row], pair: Pair) -> dict[Any, float]:
    """The differences on the networks that both have, each after its own T steps. A network is known by its
    architecture, its data, its law or pool with its recipe, and its number. The known networks of ``fixed``
    trials have numbers of their own."""

    def side(rows: Sequence[Row], trial: Row) -> list[Row]:
        last = trial["inner_steps"] * trial["inner_epochs"]
        after = [row for row in rows if row["inner_step"] == last]
        # By the data set, because images of another shape, or other classes, make other networks.
        kind = (trial["dataset"], trial["init_param"], trial["init"] == "fixed", trial["pool_recipe"])
        named = ((row["network"], row["init_law"], row["pool"], *kind, row["model_seed"]) for row in after)
        return [{**row, "model_seed": name} for row, name in zip(after, named, strict=True)]

    return differences_by_network(side(second, pair.second), side(first, pair.first), pair.measure)
