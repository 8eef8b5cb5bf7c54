"""The data of a page's scripts: trials, axes, charts, and the accuracy of every network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddsweep.report.page.charts import COLOURS, DARK_COLOURS, described
from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.measures import Measured, axis_of
from ddsweep.report.page.section import Section
from ddsweep.report.settings import heading

__all__ = ["axes_of", "payload", "picked"]

_MOST_PICKED = 6


def payload(
    gathered: Gathered, measured: Measured, sections: Sequence[Section], renew: float | None
) -> dict[str, Any]:
    axes = gathered.axes
    along, colour = axes_of(gathered)
    return {
        "trials": [
            {
                "id": trial.trial_id,
                "label": trial.label,
                "sweep": trial.sweep,
                "state": trial.state,
                "values": {name: gathered.value(trial, name) for name in axes},
            }
            for trial in gathered.trials
        ],
        "axes": [
            {
                "name": name,
                "title": heading(name),
                "kind": (axis := axis_of(gathered, name)).kind,
                "log": axis.log,
            }
            for name in axes
        ],
        "x": along,
        "colour": colour,
        "colours": {"light": COLOURS, "dark": DARK_COLOURS},
        "picked": picked(gathered),
        "renew": renew,
        "networks": _networks(measured),
        "charts": {
            chart.name: {
                "title": chart.title,
                "spec": described(chart),
                "axes": chart.axes,
                "colour": chart.coloured,
                "networks": chart.networks,
                "datasets": {
                    name: {"which": data.which, "columns": data.columns}
                    for name, data in chart.datasets.items()
                },
            }
            for section in sections
            for chart in section.charts
        },
    }


def axes_of(gathered: Gathered) -> tuple[str, str]:
    """The settings along x and as colour before a reader chooses: not seeds."""
    told = gathered.settings or gathered.axes
    numbers = [name for name in told if axis_of(gathered, name).kind != "nominal"]
    along = (numbers or told)[0]
    return along, next((name for name in told if name != along), along)


def picked(gathered: Gathered) -> list[int]:
    """The trials that are drawn by network at first: those of the answers, or the first that ran."""
    best = [trial.number for trial in gathered.best]
    others = [trial.number for trial in gathered.trials if trial.state != "pending"]
    return list(dict.fromkeys([*best, *([] if best else others)]))[:_MOST_PICKED]


def _networks(measured: Measured) -> dict[str, Any]:
    """The accuracy of every network at every inner step, in hundredths of a percent, 16 bits each."""
    found: dict[str, list[Any]] = {name: [] for name in ("trial", "step", "start", "seeds", "last")}
    blobs: list[np.ndarray] = []
    seedsets: dict[tuple[int, ...], int] = {}
    start = 0
    for number, spreads in measured.steps.items():
        for spread in spreads:
            key = tuple(spread.seeds.tolist())
            place = seedsets.setdefault(key, len(seedsets))
            last = measured.finals.get(number)
            row = (number, spread.step, start, place, last is not None and last.step == spread.step)
            for name, value in zip(found, row, strict=True):
                found[name].append(value)
            blobs.append(np.round(10_000 * spread.values).astype("<u2"))
            start += len(spread.values)
    content = np.concatenate(blobs).tobytes() if blobs else b""
    return {
        **found,
        "seedsets": [list(key) for key in seedsets],
        "values": base64.b64encode(content).decode(),
    }
