"""The trials that failed, stopped or were left out, and how to repeat everything."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.report.page.gather import Gathered, Sweep
from ddsweep.report.page.markup import Markup, tag
from ddsweep.report.page.section import Section
from ddsweep.report.page.sections.cost import together
from ddsweep.report.page.table import Column, Table

__all__ = ["again_section", "trouble_section"]

_REASONS = {
    "failed": "failed",
    "stopped": "stopped by the scheduler: its score was poor among similar settings",
    "running": "running",
    "evaluating": "distilled, being evaluated",
    "distilled": "distilled, not evaluated yet",
    "interrupted": "interrupted; running the sweep again goes on there",
    "pending": "not begun",
}


def trouble_section(gathered: Gathered) -> Section:
    parts: list[Markup | Table] = []
    rows, numbers = [], []
    for trial in gathered.trials:
        if trial.state == "done" or trial.state == "pending":
            continue
        step = trial.row.get("outer_steps_done")
        at = f" after {counted(step, 'outer step')}" if step else ""
        rows.append([trial.label, trial.state, trial.message or _REASONS.get(trial.state, trial.state) + at])
        numbers.append(trial.number)
    if rows:
        columns = [
            Column("trial", "trial", "words"),
            Column("state", "state"),
            Column("reason", "why", "words"),
        ]
        parts.append(Table("not-done", "Trials that are not done, and why", columns, rows, trials=numbers))
    pending = sum(trial.state == "pending" for trial in gathered.trials)
    if pending:
        parts.append(tag("p", f"{counted(pending, 'trial')} of the sweep file: not begun."))
    notes = [
        tag("li", f"{sweep.name}: {note}" if len(gathered.sweeps) > 1 else note)
        for sweep in gathered.sweeps
        for note in sweep.notes
    ]
    if notes:
        parts += [tag("h3", "Left out of this page"), tag("ul", *notes, id="left-out")]
    if not parts:
        parts.append(tag("p", "All trials are done, and nothing was left out."))
    return Section("trouble", "Failed, stopped, left out", parts)


def again_section(gathered: Gathered) -> Section:
    parts: list[Markup | Table] = []
    for sweep in gathered.sweeps:
        parts += [tag("h3", sweep.name), _table(gathered, sweep)]
        if sweep.text:
            parts.append(
                tag(
                    "details",
                    tag("summary", f"sweep.yaml of {sweep.name}"),
                    tag("pre", sweep.text, tabindex="0"),
                )
            )
    return Section("again", "How to do it again", parts)


def _table(gathered: Gathered, sweep: Sweep) -> Table:
    own = [trial for trial in gathered.trials if trial.sweep == sweep.name]
    rows = [trial.row for trial in own if trial.row]
    seeds = sorted({trial.settings["seed"] for trial in own if trial.settings.get("seed") is not None})
    said: list[tuple[str, Any]] = [
        ("command", "ddsweep run sweep.yaml (below), with the data under DDSWEEP_DATA"),
        ("commit", _counts(rows, "git_commit")),
        ("changes beyond the commit", _counts(rows, "git_dirty")),
        ("ddsweep", _counts(rows, "ddsweep_version")),
        ("Python", _counts(rows, "python_version")),
        ("torch", _counts(rows, "torch_version")),
        ("Ray", _counts(rows, "ray_version")),
        ("computed on", _counts(rows, "device_name")),
        ("threads a trial", _counts(rows, "threads")),
        ("seeds", _shortened([str(seed) for seed in seeds])),
        ("data", _counts(rows, "dataset_fingerprint")),
        ("stand-in data", _counts(rows, "dataset_stand_in")),
        ("test images in training data", _counts(rows, "n_test_in_train")),
        *([] if together(rows) else [("wall time of all trials", _hours(rows, "wall_seconds"))]),
        ("CPU time of all trials", _hours(rows, "cpu_seconds")),
        ("GPU time of all trials", _hours(rows, "gpu_seconds")),
    ]
    columns = [Column("what", "what"), Column("value", "value", "words")]
    name = f"again-{gathered.sweeps.index(sweep)}"
    return Table(name, f"How {sweep.name} was made", columns, [[key, value] for key, value in said if value])


def _counts(rows: list[dict[str, Any]], name: str) -> str | None:
    found = Counter(str(row[name]) for row in rows if row.get(name) is not None)
    if len(found) < 2:
        return next(iter(found), None)
    return _shortened([f"{value} ({counted(count, 'trial')})" for value, count in found.most_common()])


def _shortened(words: list[str]) -> str:
    more = f", and {len(words) - 20} more" if len(words) > 20 else ""
    return ", ".join(words[:20]) + more


def _hours(rows: list[dict[str, Any]], name: str) -> str | None:
    total = sum(row.get(name) or 0.0 for row in rows)
    return f"{json.dumps(round(total / 3600, 2))} h" if total else None
