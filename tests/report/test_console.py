"""Names and paths are printed as they are."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from ddsweep.report.console import bare_table, report_console, width_of


@pytest.mark.parametrize("name", ["img[old]", "a[/b]", "[red]x[/red]", "a:x:b"])
def test_brackets_and_colons_are_no_markup(name: str) -> None:
    file = io.StringIO()
    console = report_console(file)
    console.print(f"Tables: {name}/trials")
    table: Table = bare_table()
    table.add_column(name)
    table.add_row(name)
    table.caption = name
    assert width_of(table) == len(name)
    console.print(table)
    said = file.getvalue()
    assert f"Tables: {name}/trials" in said and said.count(name) == 4
