"""The console that prints tables, and tables that fit it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import IO

from rich.console import Console, ConsoleOptions, JustifyMethod, OverflowMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table

__all__ = [
    "MORE",
    "MOST_LISTED",
    "PLAIN_WIDTH",
    "Fitted",
    "add_headings",
    "bare_table",
    "report_console",
    "width_of",
]

MORE = "…"
"""The heading of a column that stands for hidden ones."""

PLAIN_WIDTH = 160
"""The width of a table in a file or pipe, which has no width of its own."""


MOST_LISTED = 1000
"""A table for people has a line for so many trials, and counts the rest. Laying out a line takes longer than
all other work on a trial."""


def bare_table(*, gap: int = 2, header_style: str = "bold") -> Table:
    """A table without lines, ``gap`` blanks between its columns."""
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style=header_style)


def width_of(table: Table) -> int:
    """The width that a table takes if nothing is broken."""
    endless = Console(width=10_000, markup=False, emoji=False)
    return Measurement.get(endless, endless.options, table).maximum


_NAME_WIDTHS = (28, 20, 14)
"""Widths at which long names are broken, before a setting is left out. No number is as long as the least."""


class Fitted:
    """A table with the first of its ``most`` settings, as many as fit: ``build(n, tall, wide)`` makes it with
    ``n`` of them, its headings on several lines if ``tall``, and names that are longer than ``wide`` broken.
    So no number is broken over two lines."""

    def __init__(self, build: Callable[[int, bool, int | None], Table], most: int) -> None:
        self._build, self._most = build, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = [(self._most, False, None), (self._most, True, None)]
        broken = [(self._most, True, wide) for wide in _NAME_WIDTHS]
        for how in (*whole, *broken, *((n, True, _NAME_WIDTHS[-1]) for n in range(self._most - 1, -1, -1))):
            table = self._build(*how)
            if width_of(table) <= options.max_width:
                break
        yield table


def add_headings(
    table: Table,
    titles: Sequence[str],
    *,
    tall: bool,
    right: bool = False,
    fold: bool = False,
    wide: int | None = None,
) -> None:
    """Columns with these headings. Their cells stay on one line unless they ``fold``, or are longer than
    ``wide``."""
    for title in titles:
        broken = title.replace("/", "/\n").replace(" ", "\n") if tall else title
        # What is cut because nothing more can be left out says so: half a number is a wrong one.
        breaks = fold or wide is not None
        cut: OverflowMethod = "fold" if breaks else "ellipsis"
        side: JustifyMethod = "right" if right else "left"
        table.add_column(broken, justify=side, no_wrap=not breaks, overflow=cut, max_width=wide)


def report_console(file: IO[str] | None = None) -> Console:
    """A console on ``file`` (standard output by default): as wide as the terminal, or `PLAIN_WIDTH` columns
    without one. ``COLUMNS`` in the environment overrides both. Text is printed as it is: brackets and colons,
    which names and paths may have, are no markup."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return Console(file=file, highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)
