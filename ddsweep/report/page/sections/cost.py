"""The cost of accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt

from ddsweep.report.page.charts import colour_of, percent_axis, x_of
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.markup import tag
from ddsweep.report.page.measures import Spread
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.page.table import Column, Table
from ddsweep.report.settings import KIND, values_told

__all__ = ["cost_section", "front_of", "together"]


def front_of(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """The trials whose (cost, worth) no other one beats in both, the cheapest first."""
    found: list[int] = []
    best = float("-inf")
    for number, (_, worth) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if worth > best:
            found.append(number)
            best = worth
    return found


_ALL = "all trials"


def _fronts(gathered: Gathered, points: Mapping[int, tuple[float, float]]) -> dict[str, list[int]]:
    """The front of each kind of trials, by what tells it from others. Those with more images are of one kind
    with those with fewer: images cost, and are worth it or not."""
    names = [
        name
        for name in KIND
        if name != "images_per_class"
        and len({repr(gathered.trials[number].settings.get(name)) for number in points}) > 1
    ]
    kinds: dict[str, dict[int, tuple[float, float]]] = {}
    for number, point in points.items():
        settings = gathered.trials[number].settings
        said = ", ".join(values_told(settings, names)) or _ALL
        kinds.setdefault(said, {})[number] = point
    return {said: front_of(own) for said, own in kinds.items()}


def together(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some trials were distilled in a cohort: then their ``wall_seconds`` overlap."""
    return any((row.get("cohort_size") or 1) > 1 for row in rows)


def _cost_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The column that tells what each trial cost."""
    if not together(rows):
        return "wall_seconds"
    return "gpu_seconds" if all(row.get("gpu_seconds") for row in rows) else "cpu_seconds"


_COSTS = {
    "wall_seconds": "wall seconds of distilling",
    "gpu_seconds": "GPU seconds of distilling",
    "cpu_seconds": "CPU seconds of distilling",
}


def cost_section(gathered: Gathered, finals: Mapping[int, Spread]) -> Section:
    timed = {number: gathered.trials[number].row for number in finals}
    cost = _cost_of(list(timed.values()))
    points = {
        number: (row[cost], float(finals[number].values.mean()))
        for number, row in timed.items()
        if row.get(cost)
    }
    if not points:
        return Section("cost", "Cost", [])
    fronts = _fronts(gathered, points)
    columns: dict[str, list[Any]] = {
        "trial": list(points),
        "x": [float(f"{cost:.5g}") for cost, _ in points.values()],
        "y": [round(100 * worth, 3) for _, worth in points.values()],
    }
    front = [number for own in fronts.values() for number in own]
    line: dict[str, list[Any]] = {
        "x": [float(f"{points[number][0]:.5g}") for number in front],
        "y": [round(100 * points[number][1], 3) for number in front],
        "of": [of for of, own in fronts.items() for _ in own],
    }
    costs = [cost for cost, _ in points.values()]
    chart = Chart(
        name="cost-front",
        title=f"{gathered.measure_words.capitalize()} against the time of distilling",
        caption=(
            "A line is a front: no trial is both cheaper and better than one on it"
            + (", of those with the same data, network and question" if fronts.keys() - {_ALL} else "")
            + ". Filters do not move it. Test images chose it, which flatters it."
            + (" Some were distilled together, so the time is the share of each." * together(timed.values()))
        ),
        summary=(
            f"{gathered.measure_words.capitalize()} of each trial over {_COSTS[cost]}; the table below has "
            "the trials on the fronts."
        ),
        build=partial(_build, gathered.measure_title),
        datasets={"points": Dataset(columns, "shown"), "front": Dataset(line)},
        x=Axis(_COSTS[cost], "quantitative", log=max(costs) > 10 * min(costs)),
        coloured=True,
    )
    rows = []
    for of, number in ((of, number) for of, own in fronts.items() for number in own):
        row = gathered.trials[number].row
        rows.append(
            [
                gathered.trials[number].label,
                None if of == _ALL else of,
                points[number][1],
                *(
                    row.get(name)
                    for name in ("wall_seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes")
                ),
                row.get("distilled_bytes"),
            ]
        )
    table = Table(
        "front",
        "Trials on a front, of each the cheapest first. Cost is that of distilling; test images chose them",
        [
            Column("trial", "trial", "words"),
            Column("of", "among", "words"),
            Column("test_mean", "test, %", "percent"),
            Column("wall_seconds", "time", "seconds"),
            Column("cpu_seconds", "CPU time", "seconds"),
            Column("gpu_seconds", "GPU time", "seconds"),
            Column("peak_memory_bytes", "memory", "bytes"),
            Column("distilled_bytes", "size of the set", "bytes"),
        ],
        rows,
        trials=front,
    ).without_empty()
    note = tag("p", "Energy is not measured.", class_="note")
    return Section("cost", "Cost", [chart, table, note])


def _build(title: str, x: Axis, colour: Axis) -> alt.LayerChart:
    told = [alt.Tooltip("label:N", title="trial"), alt.Tooltip("y:Q", title="%", format=".1f"), "x:Q"]
    points = (
        alt.Chart(alt.NamedData("points"))
        .mark_circle(size=60, opacity=0.7)
        .encode(x=x_of(x), y=percent_axis("y", title), color=colour_of(colour), tooltip=told)
    )
    front = (
        alt.Chart(alt.NamedData("front"))
        .mark_line(interpolate="step-after", color="#8c8c8c", strokeDash=[4, 3])
        .encode(x=x_of(x), y=percent_axis("y", title), detail="of:N")
    )
    return alt.layer(front, points).properties(width="container", height=300)
