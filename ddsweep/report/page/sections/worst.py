"""The networks on which sets do worst, and those that diverged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.markup import tag
from ddsweep.report.page.measures import Spread
from ddsweep.report.page.section import Section
from ddsweep.report.page.table import Column, Table

__all__ = ["worst_section"]

_MOST = 15
_LOW = 0.5
"""A network is low if its accuracy is below this part of the median of its trial."""


def worst_section(gathered: Gathered, finals: Mapping[int, Spread]) -> Section:
    several = {number: found for number, found in finals.items() if len(found.values) > 1}
    if not several:
        return Section("worst", "The worst networks", [])
    low = [int((found.values < _LOW * np.median(found.values)).sum()) for found in several.values()]
    rows: list[tuple[int, list[Any]]] = []
    for (number, found), count in zip(several.items(), low, strict=True):
        place = int(found.values.argmin())
        row = [
            gathered.trials[number].trial_id,
            int(found.seeds[place]),
            float(found.values[place]),
            float(np.quantile(found.values, 0.05)),
            float(np.median(found.values)),
            count,
            found.n_diverged,
        ]
        rows.append((number, row))
    rows.sort(key=lambda item: (-item[1][6], item[1][2]))
    shown = rows[:_MOST]
    trials = Table(
        "worst-trials",
        f"Trials with diverged or poor networks first, {gathered.measure_words} in %; low: below half the "
        "median of the trial",
        [
            Column("trial_id", "trial"),
            Column("model_seed", "worst network", "count"),
            Column("lowest", "its test", "percent"),
            Column("p5", "5 % are below", "percent"),
            Column("median", "median", "percent"),
            Column("n_low", "low", "count"),
            Column("n_diverged", "diverged", "count"),
        ],
        [row for _, row in shown],
        trials=[number for number, _ in shown],
    )
    parts = [trials]
    if hard := _hard(gathered, several):
        parts.append(hard)
    diverged = sum(found.n_diverged for found in finals.values())
    count = sum(len(found.values) for found in finals.values())
    text = f"{diverged:,} of {count:,} networks diverged; each counts as wrong answers in every mean."
    return Section("worst", "The worst networks", [tag("p", text), *parts])


def _hard(gathered: Gathered, several: Mapping[int, Spread]) -> Table | None:
    """The networks that are below the mean of most trials and, by their mean, of all: network i is the same
    for every trial of its architecture, law and data."""
    kinds = []
    for number, found in several.items():
        settings = gathered.trials[number].settings
        words = (settings.get(name) for name in ("dataset", "network", "init_law", "init_param", "pool"))
        kinds += [", ".join(str(word) for word in words if word)] * len(found.values)
    every = list(several.values())
    columns = {
        "kind": kinds,
        "network": np.concatenate([found.seeds for found in every]),
        "lower": np.concatenate([found.values < found.values.mean() for found in every]),
        "below": np.concatenate([found.values - found.values.mean() for found in every]),
        "value": np.concatenate([found.values for found in every]),
    }
    whole = pd.DataFrame(columns).groupby(["kind", "network"])
    table = whole.agg(
        lower=("lower", "mean"), below=("below", "mean"), value=("value", "mean"), trials=("value", "size")
    ).reset_index()
    table = (
        table[(table["trials"] > 1) & (table["lower"] > 0.5) & (table["below"] < 0)]
        .sort_values("below")
        .head(_MOST)
    )
    if table.empty:
        return None
    rows = [
        [kind, int(seed), float(value), float(below), int(trials)]
        for kind, seed, value, below, trials in zip(
            *(table[name] for name in ("kind", "network", "value", "below", "trials")), strict=True
        )
    ]
    return Table(
        "hard-networks",
        "Held-out networks that are hard for most sets: mean over the trials that were judged on them, in %",
        [
            Column("kind", "networks of"),
            Column("model_seed", "number", "count"),
            Column("mean", "test", "percent"),
            Column("below", "minus the mean of the trial", "gain"),
            Column("trials", "trials", "count"),
        ],
        rows,
    )
