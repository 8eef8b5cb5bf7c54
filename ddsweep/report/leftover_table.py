"""A table of the trials that a sweep file no longer has, to look at before removing them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from ddsweep.catalog.numbers import counted
from ddsweep.report.console import MOST_LISTED, bare_table
from ddsweep.report.formats import NONE, percent, size
from ddsweep.report.settings import setting_cells, setting_headings, settings_of_row, varying
from ddsweep.results.leftover import Leftover

__all__ = ["leftover_table"]


def leftover_table(trials: Sequence[Leftover]) -> Group:
    """A line for each of ``trials``, and a total."""
    listed = trials[:MOST_LISTED]
    settings = [settings_of_row(trial.row) if trial.row else {} for trial in listed]
    names = varying([item for item in settings if item])
    table = bare_table()
    table.add_column("trial", no_wrap=True)
    for title in setting_headings(settings, names):
        table.add_column(title, overflow="fold")
    table.add_column("state", no_wrap=True)
    for title in ("test accuracy", "files", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for trial, cells in zip(listed, setting_cells(settings, names), strict=True):
        row = trial.row or {}
        table.add_row(
            trial.trial_id,
            *cells,
            row.get("status") or "unfinished",
            percent(row.get("test_accuracy_mean"), row.get("test_accuracy_std")) if row else NONE,
            str(len(trial.parts)),
            size(trial.size),
        )
    more = [Text(f"and {hidden} more")] if (hidden := len(trials) - len(listed)) else []
    total = size(sum(trial.size for trial in trials))
    return Group(
        table, *more, Text(f"{counted(len(trials), 'trial')} that sweep.yaml no longer has, {total}")
    )
