"""The distilled sets themselves: their images, and the rates that belong to them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from ddsweep.catalog import METHODS
from ddsweep.report.page.charts import NUMBERS, colour_of, x_of
from ddsweep.report.page.gather import Gathered, Trial
from ddsweep.report.page.markup import Markup, tag
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.settings import lacks

__all__ = ["by_worth", "pictures_section", "rates_section"]

_MOST_PICTURES = 24
_MOST_BYTES = 5_000_000
_MOST_RATES = 100_000


def by_worth(gathered: Gathered) -> list[Trial]:
    """The trials of the answers, then the others, best on validation first."""
    others = sorted(gathered.trials, key=lambda trial: -(trial.row.get("val_score") or -1.0))
    return list({trial.number: trial for trial in [*gathered.best, *others]}.values())


def pictures_section(gathered: Gathered) -> Section:
    figures: list[Markup] = []
    spent, left = 0, 0
    for trial in by_worth(gathered):
        path = trial.directory.grid(trial.trial_id)
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if (
            not content.startswith(b"\x89PNG")
            or len(figures) >= _MOST_PICTURES
            or spent + len(content) > _MOST_BYTES
        ):
            left += 1
            continue
        spent += len(content)
        figures.append(_figure(trial, content))
    if not figures:
        return Section("pictures", "Distilled images", [])
    note = "A picture opens larger. The best sets come first."
    if left:
        note += f" {left} more are in artifacts/<trial>/grid.png of the results."
    return Section(
        "pictures",
        "Distilled images",
        [tag("p", note, class_="note"), tag("div", *figures, class_="pictures")],
    )


def _figure(trial: Trial, content: bytes) -> Markup:
    names = _header(trial).get("class_names") or []
    classes = f" Classes: {', '.join(map(str, names))}." if names else ""
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    picture = tag("img", src=source, alt=f"Distilled images of trial {trial.label}.{classes}", loading="lazy")
    button = tag(
        "button", picture, type="button", class_="zoom", aria_label=f"Enlarge the images of {trial.label}"
    )
    return tag("figure", button, tag("figcaption", f"{trial.label}.{classes}"), data_trial=trial.number)


def _header(trial: Trial) -> dict[str, Any]:
    """The header of the set's file; empty if it cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(str(trial.directory.distilled(trial.trial_id)), framework="np") as file:
            found = json.loads((file.metadata() or {}).get("ddsweep", "{}")).get("header")
            return found if isinstance(found, dict) else {}
    except Exception:  # safetensors raises its own of many kinds for a file that is torn or gone
        return {}


def rates_section(gathered: Gathered) -> Section:
    """The learned rate of every step, for as many sets as there is room for, the best first."""
    rows: list[tuple[int, int, float]] = []
    for trial in filter(_learns_rates, by_worth(gathered)):
        rates = _rates(trial)
        if len(rows) + len(rates) > _MOST_RATES:
            break
        rows += [(trial.number, step, float(f"{rate:.5g}")) for step, rate in enumerate(rates, start=1)]
    if not rows:
        return Section("rates", "Learned rates", [])
    chart = Chart(
        name="rates",
        title="Learned rates over the inner steps",
        caption="Of the trials that are picked: the rate of each inner step, as the distilled set has it.",
        summary="The learning rate that belongs to each inner step of the picked distilled sets.",
        build=_build,
        datasets={"rates": Dataset.of(("trial", "step", "rate"), rows, "picked")},
        x=Axis("inner step", "quantitative"),
    )
    return Section("rates", "Learned rates", [chart])


def _learns_rates(trial: Trial) -> bool:
    """A user's own method may learn them."""
    settings = trial.settings
    lacking = settings.get("method") in METHODS and lacks(settings, "inner_lr_mode")
    return not lacking and settings.get("inner_lr_mode") != "fixed"


def _rates(trial: Trial) -> Sequence[float]:
    from safetensors import safe_open

    try:
        with safe_open(str(trial.directory.distilled(trial.trial_id)), framework="np") as file:
            values: Iterable[float] = file.get_tensor("rates").reshape(-1).tolist()
            return [value for value in values if value == value]
    except Exception:  # as above
        return []


def _build(x: Axis, colour: Axis) -> alt.Chart:
    told = [alt.Tooltip("label:N", title="trial"), "step:Q", alt.Tooltip("rate:Q", format=".4g")]
    return (
        alt.Chart(alt.NamedData("rates"))
        .mark_line(point=True, interpolate="step-after")
        .encode(
            x=x_of(x, "step"),
            y=alt.Y("rate:Q", title="rate", scale=alt.Scale(zero=True), axis=NUMBERS),
            color=colour_of(colour),
            tooltip=told,
        )
        .properties(width="container", height=240)
    )
