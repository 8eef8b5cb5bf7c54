"""How accuracy grows with the inner steps, and how distilling went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ddsweep.report.page.charts import NUMBERS, colour_of, percent_axis, x_of
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.measures import Spread, spread_of
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.page.table import Column, Table

__all__ = ["curves_section", "steps_section"]

_MOST_POINTS, _ALL_POINTS = 60, 100_000
"""Logged outer steps that are drawn of one trial, and of all together; of more, some evenly."""


def steps_section(gathered: Gathered, steps: Mapping[int, Sequence[Spread]]) -> Section:
    """Accuracy at each inner step that was measured."""
    measured = {number: found for number, found in steps.items() if len(found) > 1}
    if not measured:
        return Section("steps", f"{gathered.measure_heading} at each inner step", [])
    rows, numbers, drawn = [], [], []
    for number, found in measured.items():
        for spread in found:
            mean, std, ci95 = spread_of(spread.values)
            rows.append([gathered.trials[number].trial_id, spread.step, mean, std, ci95, len(spread.values)])
            numbers.append(number)
            band = (round(100 * (mean + side * (std or 0.0)), 3) for side in (0, -1, 1))
            drawn.append((number, spread.step, *band, len(spread.values)))
    chart = Chart(
        name="inner-steps",
        title=f"{gathered.measure_words.capitalize()} at each inner step",
        caption=(
            "Of the trials that are picked: the mean over held-out networks, in a band of one standard "
            "deviation over them to either side. Small dots are single networks."
        ),
        summary=(
            f"{gathered.measure_words.capitalize()} of picked trials after each inner step; the table below "
            "has the numbers."
        ),
        build=partial(_steps_build, gathered.measure_title),
        datasets={"means": Dataset.of(("trial", "step", "mean", "low", "high", "n"), drawn, "picked")},
        x=Axis("inner step", "quantitative"),
        networks="every",
    )
    table = Table(
        "inner-step-numbers",
        f"{gathered.measure_words.capitalize()} in % at each inner step: mean, standard deviation and 95 % ± "
        "over held-out networks",
        [
            Column("trial_id", "trial"),
            Column("inner_step", "inner step", "count"),
            Column("mean", "test", "percent"),
            Column("std", "±", "percent"),
            Column("ci95", "95 % ±", "percent"),
            Column("networks", "networks", "count"),
        ],
        rows,
        trials=numbers,
    )
    return Section("steps", f"{gathered.measure_heading} at each inner step", [chart, table])


def _steps_build(title: str, x: Axis, colour: Axis) -> alt.LayerChart:
    along = x_of(x, "step")
    told = [
        alt.Tooltip("label:N", title="trial"),
        "step:Q",
        alt.Tooltip("mean:Q", title="mean, %", format=".1f"),
    ]
    base = alt.Chart(alt.NamedData("means")).encode(x=along, color=colour_of(colour))
    band = base.mark_area(opacity=0.18).encode(y=percent_axis("low", title), y2="high:Q")
    line = base.mark_line(point=True).encode(y=percent_axis("mean", title), tooltip=told)
    points = (
        alt.Chart(alt.NamedData("networks"))
        .mark_circle(size=8, opacity=0.3)
        .encode(x=along, y=percent_axis("y", title), color=colour_of(colour))
    )
    return alt.layer(band, points, line).properties(width="container", height=280)


def curves_section(gathered: Gathered) -> Section:
    """Outer loss and validation score over outer steps."""
    frame = gathered.history
    charts = []
    score = gathered.measure_words.removeprefix("test ")
    for name, column, title, text in (
        (
            "loss",
            "outer_loss",
            "Outer loss",
            "loss on real images after the inner steps, mean over networks of the step",
        ),
        ("validation", "val_score", "Score on validation", f"{score} on validation images, %"),
    ):
        own = frame[frame[column].notna()]
        if own.empty:
            continue
        methods = {trial.number: str(trial.settings.get("method")) for trial in gathered.trials}
        own = own.assign(method=own["trial"].map(methods))
        # Losses of different methods have nothing in common; scores have.
        apart = name == "loss" and own["method"].nunique() > 1
        of = " of the same method" if apart else ""
        own = own.assign(v=own[column] * (100 if column == "val_score" else 1))
        most = max(10, min(_MOST_POINTS, _ALL_POINTS // own["trial"].nunique()))
        lines = pd.concat([_thinned(rows, most) for _, rows in own.groupby("trial")])
        drawn: dict[str, list[Any]] = {
            "trial": [int(value) for value in lines["trial"]],
            "step": [int(value) for value in lines["outer_step"]],
            "v": [float(f"{value:.5g}") for value in lines["v"]],
        }
        charts.append(
            Chart(
                name=name,
                title=f"{title} over outer steps",
                caption=(
                    f"Of the trials that are picked. The grey line is the median of all trials{of} at that "
                    f"step, its band holds the middle 80 % of them. What is drawn: {text}"
                    f"{', the loss of each method' if apart else ''}."
                ),
                summary=(
                    f"{title} of picked trials over outer steps; the last values are in the table of trials."
                ),
                build=partial(_curves, _scale(own["v"]), apart),
                datasets={"lines": Dataset(drawn, "picked"), "all": Dataset(_bands(own, apart), "all")},
                x=Axis("outer step", "quantitative"),
            )
        )
    return Section("curves", "How distilling went", charts)


def _scale(values: pd.Series) -> alt.Scale:
    wide = (values > 0).all() and values.quantile(0.99) > 30 * values.quantile(0.01)
    return alt.Scale(type="log", nice=True) if wide else alt.Scale(zero=False, nice=True)


def _thinned(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    if len(rows) <= most:
        return rows
    return rows.iloc[np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]


def _bands(frame: pd.DataFrame, apart: bool) -> dict[str, list[Any]]:
    """`_band` of all trials or, where methods are ``apart``, of those of each method."""
    if not apart:
        return _band(frame)
    found: dict[str, list[Any]] = {}
    for method, own in frame.groupby("method"):
        band = _band(own)
        for name, values in {**band, "method": [method] * len(band["step"])}.items():
            found.setdefault(name, []).extend(values)
    return found


def _band(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Statistics over all trials, at outer steps that at least two of them logged."""
    found = frame.groupby("outer_step")["v"].quantile(np.array([0.1, 0.5, 0.9])).unstack()
    found = found[frame.groupby("outer_step")["v"].size() > 1]
    values = {
        name: [float(f"{v:.5g}") for v in found[q]] for name, q in (("low", 0.1), ("mid", 0.5), ("high", 0.9))
    }
    return {"step": [int(step) for step in found.index], **values}


def _curves(scale: alt.Scale, apart: bool, x: Axis, colour: Axis) -> alt.LayerChart:
    along = x_of(x, "step")
    everything = alt.Chart(alt.NamedData("all")).encode(x=along, **({"detail": "method:N"} if apart else {}))
    band = everything.mark_area(opacity=0.15, color="#8c8c8c").encode(
        y=alt.Y("low:Q", title=None, scale=scale, axis=NUMBERS), y2="high:Q"
    )
    middle = everything.mark_line(color="#8c8c8c", strokeDash=[4, 3]).encode(
        y=alt.Y("mid:Q", title=None, scale=scale, axis=NUMBERS)
    )
    lines = (
        alt.Chart(alt.NamedData("lines"))
        .mark_line(point=alt.OverlayMarkDef(size=14))
        .encode(
            x=along,
            y=alt.Y("v:Q", title=None, scale=scale, axis=NUMBERS),
            color=colour_of(colour),
            tooltip=[
                alt.Tooltip("label:N", title="trial"),
                "step:Q",
                alt.Tooltip("v:Q", title="value", format=".4g"),
            ],
        )
    )
    return alt.layer(band, middle, lines).properties(width="container", height=240)
