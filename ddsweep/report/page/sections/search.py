"""The settings that matter, and the values of the good trials."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ddsweep.report.formats import plain
from ddsweep.report.page.charts import colour_of
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.markup import Markup, tag
from ddsweep.report.page.measures import axis_of
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.page.table import Column, Table
from ddsweep.report.settings import heading, lacks

__all__ = ["importance", "search_section"]

_FEW = 20
"""With fewer settings the importance is hardly known."""

_BINS = 5


def importance(values: pd.Series, scores: pd.Series) -> tuple[float, float | None, float | None] | None:
    """(epsilon squared, p, Spearman's rank correlation) of one setting with the score; None where it has one
    value only.

    Epsilon squared is the part of the variance of the ranks of the scores that groups of equal value explain
    beyond chance, (H - k + 1) / (n - k) with H of Kruskal and Wallis (1952), k groups and n settings; at
    least 0. Numbers with more than five values are put in five groups of equal size; none is a group of its
    own. The correlation is that of numbers; None for words, and where there is a none.
    """
    from scipy.stats import kruskal, spearmanr

    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    groups = values.map(str)
    if numeric and values.nunique() > _BINS:
        groups = pd.qcut(values.rank(method="average"), _BINS, duplicates="drop").map(str)
    groups = groups.astype(object).where(values.notna(), "none")
    parts = [own.to_numpy() for _, own in scores.groupby(groups)]
    count = len(scores)
    if len(parts) < 2 or count <= len(parts) or scores.nunique() < 2:
        return None
    found = kruskal(*parts)
    explained = max(0.0, float((found.statistic - len(parts) + 1) / (count - len(parts))))
    ordered = numeric and values.notna().all() and values.nunique() > 1
    correlation = float(spearmanr(values, scores).statistic) if ordered else None
    return explained, float(found.pvalue), correlation


def search_section(gathered: Gathered) -> Section:
    """For sweeps with at least two settings that vary."""
    axes = gathered.settings
    frame = _scores(gathered, axes)
    if len(frame) < 4 or not axes:
        return Section("search", "Which settings matter", [])
    rows: list[list[Any]] = []
    for axis in axes:
        own = frame[[not lacks(settings, axis) for settings in frame["settings"]]]
        found = importance(own[axis], own["score"])
        if found is not None:
            rows.append([heading(axis), *found, int(own[axis].nunique(dropna=False))])
    parts: list[Markup | Chart | Table] = []
    if rows:
        rows.sort(key=lambda row: -row[1])
        parts += _importance_parts(rows, len(frame))
    if len(axes) > 1:
        parts.append(_parallel(gathered, axes))
    return Section("search", "Which settings matter", parts)


def _scores(gathered: Gathered, axes: list[str]) -> pd.DataFrame:
    """A row a setting: its values, and the mean of its score over seeds."""
    rows = [
        {
            **{axis: gathered.value(trial, axis) for axis in axes},
            "score": trial.row.get("val_score"),
            "settings": trial.settings,
            "key": _key(trial),
        }
        for trial in gathered.trials
        if trial.row.get("val_score") is not None
    ]
    if not rows:
        return pd.DataFrame({"score": []})
    frame = pd.DataFrame(rows)
    means = frame.groupby("key")["score"].transform("mean")
    return frame.assign(score=means).drop_duplicates("key").drop(columns="key")


def _key(trial: Any) -> str:
    return repr([(name, value) for name, value in trial.settings.items() if name != "seed"])


def _importance_parts(rows: list[list[Any]], count: int) -> list[Markup | Chart | Table]:
    mind = f" {count} settings are few: take this as a hint." if count < _FEW else ""
    text = (
        "How much of the variation of validation scores each setting explains on its own: epsilon squared of "
        f"Kruskal and Wallis over {count} settings, each with the mean over its seeds; stopped trials with "
        "the score at which they stopped. What only some methods have is judged among theirs. "
        f"Settings that matter only together do not show.{mind}"
    )
    chart = Chart(
        name="importance",
        title="Importance of settings",
        caption="Part of the variance of the ranks of validation scores that a setting explains alone.",
        summary="One bar for each setting; the table below has the numbers.",
        build=_importance_build,
        datasets={
            "bars": Dataset({"name": [row[0] for row in rows], "v": [round(row[1], 4) for row in rows]})
        },
    )
    table = Table(
        "importances",
        "Importance of settings on validation",
        [
            Column("setting", "setting"),
            Column("epsilon2", "explains", "number"),
            Column("p", "p", "number"),
            Column("spearman", "rank correlation", "number"),
            Column("values", "values", "count"),
        ],
        [[row[0], *(None if v is None else float(f"{v:.3g}") for v in row[1:4]), row[4]] for row in rows],
    )
    return [tag("p", text, class_="note"), chart, table]


def _importance_build(x: Axis, colour: Axis) -> alt.Chart:
    return (
        alt.Chart(alt.NamedData("bars"))
        .mark_bar(color="#0072b2")
        .encode(
            x=alt.X("v:Q", title="explains", scale=alt.Scale(domainMin=0)),
            y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=160)),
            tooltip=["name:N", alt.Tooltip("v:Q", format=".3f")],
        )
        .properties(width="container")
    )


def _parallel(gathered: Gathered, axes: list[str]) -> Chart:
    scores = {
        trial.number: round(100 * float(trial.row["val_score"]), 4)
        for trial in gathered.trials
        if trial.row.get("val_score") is not None
    }
    rows = []
    for axis in axes:
        places = _places(gathered, axis)
        for number, score in scores.items():
            value = gathered.value(gathered.trials[number], axis)
            if value is not None:
                rows.append((number, heading(axis), places[repr(value)], plain(value), score))
    ranks = pd.Series(scores).rank(pct=True).round(4)
    rows += [(n, "validation", ranks[n], f"{score:.1f} %", score) for n, score in scores.items()]
    return Chart(
        name="parallel",
        title="Settings of the trials side by side",
        caption=(
            "One line a trial; each setting from its lowest value, at the bottom, to its highest (words in "
            "the order of the alphabet), and last the rank on validation, whose score is the colour."
        ),
        summary="Parallel coordinates of all trials; the table of trials has the values.",
        build=_parallel_build,
        datasets={"lines": Dataset.of(("trial", "axis", "v", "value", "score"), rows, "shown")},
    )


def _places(gathered: Gathered, axis: str) -> dict[str, float]:
    values = {
        repr(value): value for trial in gathered.trials if (value := gathered.value(trial, axis)) is not None
    }
    kind = axis_of(gathered, axis)
    if kind.kind == "quantitative":
        numbers = {key: float(np.log(value)) if kind.log else float(value) for key, value in values.items()}
        low, high = min(numbers.values()), max(numbers.values())
        return {key: round((number - low) / (high - low), 4) for key, number in numbers.items()}
    ordered = sorted(
        values, key=lambda key: (0, values[key], "") if kind.kind == "ordinal" else (1, 0, str(values[key]))
    )
    return {key: round(place / max(1, len(ordered) - 1), 4) for place, key in enumerate(ordered)}


def _parallel_build(x: Axis, colour: Axis) -> alt.Chart:
    told = [
        alt.Tooltip("label:N", title="trial"),
        alt.Tooltip("score:Q", title="validation, %", format=".1f"),
    ]
    return (
        alt.Chart(alt.NamedData("lines"))
        .mark_line(opacity=0.5, strokeWidth=1.2)
        .encode(
            x=alt.X("axis:N", sort=None, title=None, axis=alt.Axis(labelAngle=0, labelLimit=90)),
            y=alt.Y("v:Q", title=None, axis=None),
            color=colour_of(Axis("validation, %", "quantitative"), "score"),
            detail="trial:N",
            tooltip=told,
        )
        .properties(width="container", height=300)
    )
