"""Transfer: every set under every protocol. Attacks: every pair of classes."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from ddsweep.report.page.gather import Gathered
from ddsweep.report.page.measures import last_rows, spread_of
from ddsweep.report.page.section import Axis, Chart, Dataset, Section
from ddsweep.report.page.table import Column, Table

__all__ = ["attacks_section", "transfer_section"]


def transfer_section(gathered: Gathered) -> Section:
    networks = gathered.networks
    last = last_rows(gathered)
    rows, numbers = [], []
    cells = []
    for number, span in networks.spans():
        trial = gathered.trials[number]
        values = networks.measured(trial.measure)[span]
        for code in np.unique(networks.protocol[span][last[span]]):
            mask = last[span] & (networks.protocol[span] == code) & ~np.isnan(values)
            if not mask.any():
                continue
            mean, std, ci95 = spread_of(values[mask])
            name = networks.words["protocol"][code]
            diverged = int(networks.diverged[span][mask].sum())
            rows.append([trial.trial_id, name, mean, std, ci95, int(mask.sum()), diverged])
            numbers.append(number)
            cells.append((number, name, round(100 * mean, 2), f"{100 * mean:.1f}"))
    if len({row[1] for row in rows}) < 2:
        return Section("transfer", "Transfer", [])
    chart = Chart(
        name="transfer-matrix",
        title=f"{gathered.measure_words.capitalize()} of each set under each protocol",
        caption=(
            "In %, after the last epoch of the protocol: mean over its held-out networks. Of the "
            "trials picked."
        ),
        summary="A matrix of sets and protocols; the table below has the same numbers.",
        build=_transfer_build,
        datasets={"cells": Dataset.of(("trial", "x", "v", "text"), cells, "picked")},
        x=Axis("protocol"),
    )
    table = Table(
        "transfer",
        f"{gathered.measure_words.capitalize()} in % under each protocol after its last epoch; networks that "
        "diverged count",
        [
            Column("trial_id", "trial"),
            Column("protocol", "protocol"),
            Column("mean", "test", "percent"),
            Column("std", "±", "percent"),
            Column("ci95", "95 % ±", "percent"),
            Column("networks", "networks", "count"),
            Column("n_diverged", "diverged", "count"),
        ],
        rows,
        trials=numbers,
    )
    return Section("transfer", "Transfer to other networks and protocols", [chart, table])


def _transfer_build(x: Axis, colour: Axis) -> alt.LayerChart:
    return _matrix(
        alt.X("x:N", title=x.title, axis=alt.Axis(labelAngle=0)),
        alt.Y("label:N", title=None, axis=alt.Axis(labelLimit=260)),
        "v:Q",
    )


def _matrix(x: alt.X, y: alt.Y, value: str) -> alt.LayerChart:
    base = alt.Chart(alt.NamedData("cells")).encode(x=x, y=y)
    scale = alt.Scale(scheme="blues", domain=[0, 100])
    fields = base.mark_rect().encode(color=alt.Color(value, scale=scale, title="%"))
    ink = alt.condition(f"datum['{value[0]}'] > 55", alt.value("white"), alt.value("black"))
    words = base.mark_text(fontSize=11).encode(text="text:N", color=ink)
    return alt.layer(fields, words).properties(width="container")


def attacks_section(gathered: Gathered) -> Section:
    """Attacks: their success, and the accuracy on the other classes."""
    attacks = [
        trial for trial in gathered.trials if trial.measure == "attack_success" and trial.state == "done"
    ]
    if not attacks:
        return Section("attacks", "Attacks", [])
    rows, numbers = [], []
    networks = gathered.networks
    last = last_rows(gathered) & networks.distilled()
    before = networks.distilled() & (networks.inner_step == 0)
    pairs: dict[str, dict[tuple[int, int], list[float]]] = {}
    spans = dict(networks.spans())
    for trial in attacks:
        span = spans.get(trial.number)
        if span is None:
            continue
        pair = (int(trial.settings["attack_class"]), int(trial.settings["target_class"]))
        found: list[Any] = []
        for mask in (before[span], last[span]):
            for name in ("attack_success", "accuracy_other"):
                values = networks.measured(name)[span][mask]
                values = values[~np.isnan(values)]
                found += spread_of(values)[:2] if len(values) else (None, None)
        count = int(last[span].sum())
        rows.append([trial.trial_id, f"{pair[0]} → {pair[1]}", *found, count])
        numbers.append(trial.number)
        if found[4] is not None:
            told = (trial.settings.get(name) for name in ("dataset", "network", "pool"))
            question = ", ".join(str(value) for value in told if value)
            pairs.setdefault(question, {}).setdefault(pair, []).append(found[4])
    table = Table(
        "attack",
        "Fooled: the fraction of the attacked class that is called the target; others: accuracy on all other "
        "classes. In % of test images, before and after training on the set; ± over held-out networks",
        [
            Column("trial_id", "trial"),
            Column("attack", "attack"),
            *(
                Column(f"{name}_{when}{end}", f"{sign}{title} {words}", "percent")
                for when, words in (("before", "before"), ("after", "after"))
                for name, title in (("fooled", "fooled"), ("others", "others"))
                for end, sign in (("", ""), ("_std", "± "))
            ),
            Column("networks", "networks", "count"),
        ],
        rows,
        trials=numbers,
    )
    parts: list[Chart | Table] = [table]
    matrices = {question: found for question, found in pairs.items() if len(found) > 1}
    for place, (question, of_pairs) in enumerate(matrices.items()):
        means = {pair: sum(found) / len(found) for pair, found in of_pairs.items()}
        cells = [
            (target, attacked, round(100 * mean, 2), f"{100 * mean:.0f}")
            for (attacked, target), mean in means.items()
        ]
        chart = Chart(
            name="attack-matrix" if place == 0 else f"attack-matrix-{place + 1}",
            title="Fooled, by class" + (f": {question}" if len(pairs) > 1 else ""),
            caption="Mean over held-out networks, and over trials of the same pair, in %.",
            summary="A matrix of attacked and target classes; the table below has the numbers.",
            build=_attack_build,
            datasets={"cells": Dataset.of(("x", "y", "v", "text"), cells)},
        )
        parts.insert(place, chart)
    return Section("attacks", "Attacks", parts)


def _attack_build(x: Axis, colour: Axis) -> alt.LayerChart:
    along = alt.X("x:O", title="called (target class)", axis=alt.Axis(labelAngle=0))
    return _matrix(along, alt.Y("y:O", title="is (attacked class)"), "v:Q")
