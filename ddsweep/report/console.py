"""Where tables are printed to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import IO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

__all__ = ["MORE", "MOST_LISTED", "PLAIN_WIDTH", "Fitted", "add_headings", "report_console"]

MORE = "…"
"""The heading of a column that stands for those that are not shown."""

PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or pipe, where nobody says how wide it may be."""


MOST_LISTED = 1000
"""Trials that a table for people has a line for; of more it says how many. Laying out a line takes longer
than all else that is done for a trial."""


class Fitted:
    """A table with as many of its ``most`` settings as there is room for, the first ones: ``build(n, tall)``
    makes it with ``n`` of them, its headings on several lines if ``tall``. So no number is broken in two."""

    def __init__(self, build: Callable[[int, bool], Table], most: int) -> None:
        self._build, self._most = build, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        endless = Console(width=10_000)
        for shown, tall in [(self._most, False), *((n, True) for n in range(self._most, -1, -1))]:
            table = self._build(shown, tall)
            if Measurement.get(endless, endless.options, table).maximum <= options.max_width:
                break
        yield table


def add_headings(
    table: Table, titles: Sequence[str], *, tall: bool, right: bool = False, fold: bool = False
) -> None:
    """Columns with these headings, whose cells stay on a line unless they ``fold``."""
    for title in titles:
        broken = title.replace("/", "/\n").replace(" ", "\n") if tall else title
        table.add_column(broken, justify="right" if right else "left", no_wrap=not fold, overflow="fold")


def report_console(file: IO[str] | None = None) -> Console:
    """A console on ``file`` (standard output by default): as wide as the terminal, or `PLAIN_WIDTH` columns
    where there is none. ``COLUMNS`` in the environment decides in both cases."""
    console = Console(file=file, highlight=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return Console(file=file, highlight=False, width=PLAIN_WIDTH)
