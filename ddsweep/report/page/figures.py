"""``ddsweep report --figures``: charts as PDF, SVG and PNG, tables as LaTeX, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddsweep.report.page.charts import described
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.measures import Measured, axis_of, place_of
from ddsweep.report.page.payload import axes_of, picked
from ddsweep.report.page.section import Chart
from ddsweep.report.page.write import sections_of
from ddsweep.results.files import write_atomic

__all__ = ["figure_of", "left_out", "write_figures"]

_MOST_POINTS = 6000
_WIDTH, _ROW = 480, 22
_CONFIG = {
    "font": "DejaVu Sans",
    "background": "white",
    "view": {"stroke": None},
    "axis": {"titleFontWeight": "normal"},
    "legend": {"titleFontWeight": "normal"},
}


def write_figures(gathered: Gathered, out: Path) -> Iterator[str]:
    """Write every chart and table of the report below ``out``, and yield what was written, a line each.

    ``figures/captions.md`` says what bars and bands are. Charts have the settings with which the page opens.
    """
    import vl_convert

    measured = Measured.of(gathered)
    captions = ["Picked are the trials of the best settings; with no answer yet, the first that ran.\n"]
    charts = tables = 0
    for section in sections_of(gathered, measured):
        for chart in section.charts:
            description = figure_of(gathered, measured, chart)
            svg = vl_convert.vegalite_to_svg(description)
            contents = {
                "svg": svg.encode(),
                "pdf": vl_convert.svg_to_pdf(svg),
                "png": vl_convert.svg_to_png(svg, scale=3),
            }
            for ending, content in contents.items():
                write_atomic(out / "figures" / f"{chart.name}.{ending}", content, out)
            text = f"{chart.title}. {chart.caption}"
            if left := left_out(description):
                text += f" Not drawn: {left} of these trials, without a number along x or for the colour."
            captions.append(f"## {chart.name}\n\n{text}\n")
            charts += 1
        for table in section.tables:
            texts = {"tex": table.latex(), "md": table.markdown(), "csv": table.csv()}
            for ending, text in texts.items():
                write_atomic(out / "tables" / f"{table.name}.{ending}", text.encode(), out)
            tables += 1
    write_atomic(out / "figures" / "captions.md", "\n".join(captions).encode(), out)
    yield f"{out / 'figures'}: {charts} figures as PDF, SVG and PNG, and captions.md"
    yield f"{out / 'tables'}: {tables} tables as LaTeX, Markdown and CSV"


def figure_of(gathered: Gathered, measured: Measured, chart: Chart) -> dict[str, Any]:
    """The description of ``chart`` with its data, as the page draws it when it is opened."""
    along, by = axes_of(gathered)
    numbers = picked(gathered)
    x = axis_of(gathered, along) if chart.axes else chart.x
    colour = axis_of(gathered, by) if chart.coloured else chart.colour
    datasets = {
        name: data.rows(numbers if data.which == "picked" else None) for name, data in chart.datasets.items()
    }
    if chart.networks:
        datasets["networks"] = _networks(measured, numbers, chart.networks)
    places = place_of(gathered, gathered.trials, along)
    for rows in datasets.values():
        for row in rows:
            if "trial" not in row:
                continue
            trial = gathered.trials[row["trial"]]
            row["label"] = trial.label
            value = gathered.value(trial, by) if chart.coloured else trial.label
            row["c"] = "–" if value is None else value
            if chart.axes:
                value = gathered.value(trial, along)
                row["x"] = "–" if value is None else value
                row["o"] = places[trial.number]
    description = described(chart, x, colour)
    if "layer" in description:
        description["layer"] = [
            layer
            for layer in description["layer"]
            if datasets[layer.get("data", description.get("data"))["name"]]
        ]
    if description.get("width") == "container":
        description["width"] = _WIDTH
    if "height" not in description:
        first = description["layer"][0] if "layer" in description else description
        field = first["encoding"]["y"]["field"]
        description["height"] = _ROW * len({row[field] for row in next(iter(datasets.values()))})
    return {**description, "config": _CONFIG, "datasets": datasets}


def left_out(description: dict[str, Any]) -> int:
    """The number of trials that a scale of numbers has no place for, in what `figure_of` made."""
    layers = [layer.get("encoding", {}) for layer in description.get("layer", [description])]
    named = [encoding.get(name, {}) for encoding in layers for name in ("x", "color")]
    numeric = {one.get("field") for one in named if one.get("type") == "quantitative"} & {"x", "c"}
    rows = (row for rows in description["datasets"].values() for row in rows if "trial" in row)
    return len({row["trial"] for row in rows if any(isinstance(row.get(name), str) for name in numeric)})


def _networks(measured: Measured, numbers: list[int], which: str) -> list[dict[str, Any]]:
    every = which == "every"
    spreads = (
        [spread for number in numbers for spread in measured.steps.get(number, [])]
        if every
        else list(measured.finals.values())
    )
    if not every and sum(len(spread.values) for spread in spreads) > _MOST_POINTS:
        spreads = [spread for spread in spreads if spread.trial in numbers]
    return [
        {"trial": spread.trial, "step": spread.step, "seed": int(seed), "y": round(100 * float(value), 2)}
        for spread in spreads
        for seed, value in zip(spread.seeds, spread.values, strict=True)
    ]
