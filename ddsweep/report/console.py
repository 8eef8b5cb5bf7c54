"""Where tables are printed to."""

from __future__ import annotations

import os
from typing import IO

from rich.console import Console

__all__ = ["MOST_LISTED", "PLAIN_WIDTH", "report_console"]

PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or pipe, where nobody says how wide it may be."""


MOST_LISTED = 1000
"""Trials that a table for people has a line for; of more it says how many. Laying out a line takes longer
than all else that is done for a trial."""


def report_console(file: IO[str] | None = None) -> Console:
    """A console on ``file`` (standard output by default): as wide as the terminal, or `PLAIN_WIDTH` columns
    where there is none. ``COLUMNS`` in the environment decides in both cases."""
    console = Console(file=file, highlight=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return Console(file=file, highlight=False, width=PLAIN_WIDTH)
