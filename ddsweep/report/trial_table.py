"""The table of trials that `plan` and `status` print: settings, as many as fit, and what is told of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ddsweep.report.console import MORE, Fitted, add_headings, bare_table
from ddsweep.report.settings import setting_cells, setting_headings

__all__ = ["trial_table"]


def trial_table(
    settings: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    headings: Sequence[str],
    told: Mapping[str, Sequence[str | Text]],
) -> RenderableType:
    """A line for each trial of ``settings`` (by id) with those of ``names``; then what is ``told`` of it, its
    state first, and ``headings`` over the rest."""
    own = list(settings.values())
    titles, cells = setting_headings(own, names), setting_cells(own, names)
    fold = len(titles) < len(names)  # one column for all settings

    def build(shown: int, tall: bool, wide: int | None) -> Table:
        table = bare_table()
        rest = [MORE] if shown < len(titles) else []
        add_headings(table, ["trial"], tall=tall)
        add_headings(table, [*titles[:shown], *rest], tall=tall, fold=fold, wide=wide)
        add_headings(table, ["state"], tall=tall)
        add_headings(table, headings, tall=tall, right=True)
        for trial_id, values in zip(settings, cells, strict=True):
            table.add_row(trial_id, *values[:shown], *[""] * len(rest), *told[trial_id])
        return table

    return build(1, False, None) if fold else Fitted(build, len(titles))
