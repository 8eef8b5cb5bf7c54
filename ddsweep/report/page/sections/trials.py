"""All trials: a table to filter and sort, and accuracy over any setting with every network as a point."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import altair as alt
import numpy as np

from ddsweep.report.answers import PROTOCOL_TEXTS
from ddsweep.report.page.charts import colour_of, percent_axis, x_of
from ddsweep.report.page.gather import Gathered, Trial
from ddsweep.report.page.markup import tag
from ddsweep.report.page.measures import Spread, axis_of, spread_of
from ddsweep.report.page.networks import OWN
from ddsweep.report.page.payload import axes_of
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.page.table import Column, Table
from ddsweep.report.settings import heading
from ddsweep.report.summary_table import BASELINE_NAMES

__all__ = ["trials_section"]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def trials_section(gathered: Gathered, finals: Mapping[int, Spread]) -> Section:
    parts: list[Any] = []
    if finals:
        parts.append(accuracy_chart(gathered, finals))
    if gathered.trials:
        text = "A trial that is picked is drawn network by network in all charts. Headings sort."
        parts += [tag("p", text, class_="note"), _table(gathered, finals)]
    return Section("trials", f"{gathered.measure_heading} over the settings", parts)


def accuracy_chart(gathered: Gathered, finals: Mapping[int, Spread]) -> Chart:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("trial", "p5", "p25", "p50", "p75", "p95", "mean", "n")
    }
    for number, found in finals.items():
        percents = 100 * found.values
        columns["trial"].append(number)
        for name, value in zip(
            ("p5", "p25", "p50", "p75", "p95"), np.quantile(percents, _QUANTILES), strict=True
        ):
            columns[name].append(round(float(value), 3))
        columns["mean"].append(round(float(percents.mean()), 3))
        columns["n"].append(len(percents))
    return Chart(
        name="accuracy",
        title=f"{gathered.measure_words.capitalize()} over the settings",
        caption=(
            "A large dot is the mean over the networks of one trial; the thick bar holds the middle half of "
            "its networks, the thin one 90 % of them. Small dots are single held-out networks."
        ),
        summary=(
            f"{gathered.measure_words.capitalize()} of each trial over the chosen setting; the table of "
            "trials below has the numbers."
        ),
        build=partial(_build, gathered.measure_title),
        datasets={"bars": Dataset(columns, "shown")},
        x=axis_of(gathered, axes_of(gathered)[0]),
        axes=True,
        coloured=True,
        networks="last",
    )


def _build(title: str, x: Axis, colour: Axis) -> alt.LayerChart:
    along = x_of(x)
    offset = (
        {}
        if x.kind == "quantitative"
        else {"xOffset": alt.XOffset("o:Q", scale=alt.Scale(domain=[-1.2, 1.2]))}
    )
    told = [
        "label:N",
        alt.Tooltip("mean:Q", title="mean, %", format=".1f"),
        alt.Tooltip("n:Q", title="networks"),
    ]
    bars = alt.Chart(alt.NamedData("bars")).encode(x=along, color=colour_of(colour), **offset)
    thin = bars.mark_rule(strokeWidth=1, opacity=0.6).encode(y=percent_axis("p5", title), y2="p95:Q")
    thick = bars.mark_rule(strokeWidth=4, opacity=0.6).encode(y=percent_axis("p25", title), y2="p75:Q")
    means = bars.mark_point(filled=True, size=70, opacity=1).encode(
        y=percent_axis("mean", title), tooltip=told
    )
    points = (
        alt.Chart(alt.NamedData("networks"))
        .mark_circle(size=12, opacity=0.4)
        .encode(
            x=along,
            y=percent_axis("y", title),
            color=colour_of(colour),
            tooltip=[
                "label:N",
                alt.Tooltip("seed:Q", title="network"),
                alt.Tooltip("y:Q", title="%", format=".2f"),
            ],
            **offset,
        )
    )
    return alt.layer(thin, thick, points, means).properties(width="container", height=320)


def _table(gathered: Gathered, finals: Mapping[int, Spread]) -> Table:
    settings = list(gathered.axes)
    baselines = _baselines(gathered)
    present = [key for key in _baseline_keys() if any(key in found for found in baselines.values())]
    columns = [
        Column("trial_id", "trial"),
        *(Column(name, heading(name), _kind(gathered, name)) for name in settings),
        Column("status", "state"),
        Column("outer_steps_done", "outer steps done", "count"),
        Column("val_score", "validation", "percent"),
        Column("test_mean", "test", "percent"),
        Column("test_std", "±", "percent"),
        Column("test_ci95", "95 % ±", "percent"),
        Column("test_models", "networks", "count"),
        Column("n_diverged", "diverged", "count"),
        *(
            Column(f"{source}.{protocol}", _title(source, protocol), "percent")
            for source, protocol in present
        ),
        Column("wall_seconds", "time", "seconds"),
        Column("peak_memory_bytes", "memory", "bytes"),
    ]
    rows = []
    for trial in gathered.trials:
        own = finals.get(trial.number)
        test = spread_of(own.values) if own is not None else (None, None, None)
        rows.append(
            [
                trial.trial_id,
                *(gathered.value(trial, name) for name in settings),
                trial.state,
                trial.row.get("outer_steps_done"),
                trial.row.get("val_score"),
                *test,
                len(own.values) if own is not None else None,
                own.n_diverged if own is not None else None,
                *(baselines.get(trial.number, {}).get(key) for key in present),
                trial.row.get("wall_seconds"),
                trial.row.get("peak_memory_bytes"),
            ]
        )
    caption = (
        f"Trials. {gathered.measure_words.capitalize()} in %: mean over held-out networks, ± their standard "
        "deviation, 95 % ± the half-width of the interval of the mean over them; networks that diverged "
        "count. Baselines at the "
        "same number of steps, or tuned, on the networks that they were measured on"
    )
    numbers = [trial.number for trial in gathered.trials]
    return Table("all-trials", caption, columns, rows, trials=numbers).without_empty()


def _kind(gathered: Gathered, name: str) -> str:
    return "text" if axis_of(gathered, name).kind == "nominal" else "number"


def _baseline_keys() -> list[tuple[str, str]]:
    """And the set itself where it is tuned, which it is without learned rates."""
    baselines = [(source, protocol) for protocol in PROTOCOL_TEXTS for source in BASELINE_NAMES]
    return [("distilled", f"{OWN}_tuned"), *baselines]


def _title(source: str, protocol: str) -> str:
    return BASELINE_NAMES.get(source, "test") + (", tuned" if protocol == f"{OWN}_tuned" else "")


def _baselines(gathered: Gathered) -> dict[int, dict[tuple[str, str], float]]:
    """By trial and (source, protocol), the mean over networks."""
    networks, found = gathered.networks, dict[int, dict[tuple[str, str], float]]()
    wanted = {
        (networks.code("source", source), networks.code("protocol", protocol)): (source, protocol)
        for source, protocol in _baseline_keys()
    }
    for number, span in networks.spans():
        trial: Trial = gathered.trials[number]
        values = networks.measured(trial.measure)[span]
        for codes, key in wanted.items():
            if -2 in codes:
                continue
            mine = values[(networks.source[span] == codes[0]) & (networks.protocol[span] == codes[1])]
            mine = mine[~np.isnan(mine)]
            if len(mine):
                found.setdefault(number, {})[key] = float(mine.mean())
    return found
