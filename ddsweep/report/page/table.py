"""A table of the report: as HTML that can be sorted, and as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddsweep.report.formats import NONE, duration, percent, plain, size
from ddsweep.report.page.markup import Markup, join, tag

__all__ = ["Column", "Table", "cell_text"]

_WORDS = ("text", "words")


@dataclass(frozen=True)
class Column:
    """``name`` heads it in CSV. ``kind`` says what its values are: ``text``, ``words`` (longer text),
    ``count``, ``number``, ``percent`` and ``gain`` (fractions), ``seconds``, ``bytes``."""

    name: str
    title: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """``rows`` are values as in the tables of results, None for null. ``trials`` are the numbers of the rows'
    trials, if each row belongs to one: such a table can be filtered."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    trials: Sequence[int] | None = None

    def without_empty(self) -> Table:
        """The table without empty columns."""
        kept = [n for n in range(len(self.columns)) if any(row[n] is not None for row in self.rows)]
        columns = [self.columns[n] for n in kept]
        return replace(self, columns=columns, rows=[[row[n] for n in kept] for row in self.rows])

    def first(self, count: int) -> Table:
        """The table with at most ``count`` rows."""
        trials = None if self.trials is None else self.trials[:count]
        return replace(self, rows=self.rows[:count], trials=trials)

    def html(self) -> Markup:
        heads = [
            tag("th", column.title, scope="col", class_=None if column.kind in _WORDS else "n")
            for column in self.columns
        ]
        body = []
        for number, row in enumerate(self.rows):
            cells = [
                _cell(column, value, first=not place)
                for place, (column, value) in enumerate(zip(self.columns, row, strict=True))
            ]
            body.append(tag("tr", *cells, data_trial=None if self.trials is None else self.trials[number]))
        return tag(
            "div",
            tag(
                "table",
                tag("caption", self.caption, id=f"{self.name}-caption"),
                tag("thead", tag("tr", *heads)),
                tag("tbody", *body),
                id=self.name,
            ),
            class_="scroll",
            role="region",
            tabindex="0",
            aria_labelledby=f"{self.name}-caption",
        )

    def csv(self) -> str:
        """With the values in full."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return buffer.getvalue()

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

        rule = "|" + "|".join("---" if column.kind in _WORDS else "---:" for column in self.columns) + "|"
        head = line([column.title for column in self.columns])
        return (
            "\n".join([self.caption, "", head, rule, *(line(self._texts(row)) for row in self.rows)]) + "\n"
        )

    def latex(self) -> str:
        """A ``table`` with the rules of the package booktabs."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(_latex, cells)) + r" \\"

        where = "".join("l" if column.kind in _WORDS else "r" for column in self.columns)
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(self.caption)}}}",
                rf"\begin{{tabular}}{{{where}}}",
                r"\toprule",
                line([column.title for column in self.columns]),
                r"\midrule",
                *(line(self._texts(row)) for row in self.rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def _texts(self, row: Sequence[Any]) -> list[str]:
        return [cell_text(column, value) for column, value in zip(self.columns, row, strict=True)]


def cell_text(column: Column, value: Any) -> str:
    """The text of a cell."""
    if value is None:
        return NONE
    if column.kind == "percent":
        return percent(value)
    if column.kind == "gain":
        return percent(value, sign=True)
    if column.kind == "seconds":
        return duration(value)
    if column.kind == "bytes":
        return size(value)
    return plain(value)


def _cell(column: Column, value: Any, *, first: bool) -> Markup:
    words = column.kind in _WORDS
    attributes = {"class_": column.kind if column.kind == "words" else None if words else "n"}
    if not words or isinstance(value, (int, float)):
        attributes["data_v"] = "" if value is None else repr(+value)  # of a flag a number
    inside = join(cell_text(column, value))
    return tag("th", inside, scope="row", **attributes) if first else tag("td", inside, **attributes)


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    **{
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
        "→": r"$\to$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    },
}


def _latex(value: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in value)
