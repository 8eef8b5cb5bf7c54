"""One style for all charts, on the page and in papers: Altair descriptions without data."""

from __future__ import annotations

from typing import Any

import altair as alt

from ddsweep.report.page.section import Axis, Chart

__all__ = ["COLOURS", "DARK_COLOURS", "NUMBERS", "colour_of", "described", "percent_axis", "x_of"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Colours that colour-blind people can tell apart (Okabe & Ito 2008, without yellow and black, which are lost
on a light or a dark page)."""

DARK_COLOURS = ("#4fb0ea", "#ff8a4c", "#2cc59b", "#e59fc4", "#f0bd4f", "#9ad7f7", "#b0b0b0")
"""The same, lighter."""


NUMBERS = alt.Axis(format=".6~g")
"""A y axis. By itself the only tick of a single value is rounded to a whole number."""

_WHOLE = alt.Axis(labelExpr="datum.value % 1 ? '' : format(datum.value, 'd')", tickMinStep=1)
"""An axis of steps. Where they are few there are ticks at halves in spite of the least step."""


def x_of(axis: Axis, field: str = "x") -> alt.X:
    """The x axis. The page replaces title, type and scale if a reader chooses another axis."""
    title = alt.X(field, type=axis.kind, title=axis.title)
    if axis.kind == "quantitative":
        title = title.scale(
            alt.Scale(type="log", nice=True) if axis.log else alt.Scale(zero=False, nice=True)
        )
        return title.axis(_WHOLE) if field == "step" else title
    return title.axis(alt.Axis(labelAngle=0, labelOverlap=True, labelLimit=120))


def colour_of(axis: Axis, field: str = "c") -> alt.Color:
    if axis.kind == "quantitative":
        scale = alt.Scale(scheme="viridis", type="log" if axis.log else "linear")
        return alt.Color(field, type="quantitative", title=axis.title, scale=scale)
    return alt.Color(
        field,
        type="nominal",
        title=axis.title,
        scale=alt.Scale(range=list(COLOURS)),
        legend=alt.Legend(orient="bottom", columns=1, labelLimit=600, symbolLimit=20, symbolOpacity=1),
    )


def percent_axis(field: str, title: str, **settings: Any) -> alt.Y:
    scale = alt.Scale(zero=False, nice=True)
    return alt.Y(field, type="quantitative", title=title, scale=scale, axis=NUMBERS, **settings)


def described(chart: Chart, x: Axis | None = None, colour: Axis | None = None) -> dict[str, Any]:
    """The description in Vega-Lite, without data and without colours of the page."""
    made = chart.build(x or chart.x, colour or chart.colour)
    content: dict[str, Any] = made.to_dict(validate=False)
    content.pop("config", None)
    content["autosize"] = {"type": "fit-x", "contains": "padding"}
    return content
