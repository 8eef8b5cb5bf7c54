"""The pieces of a report: sections of tables, charts and text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddsweep.report.page.markup import Markup
from ddsweep.report.page.table import Table

if TYPE_CHECKING:
    import altair

__all__ = ["Axis", "Chart", "Dataset", "Section"]


@dataclass(frozen=True)
class Axis:
    """An x axis or colour of a chart. ``kind`` is a type of Vega-Lite: ``quantitative``, ``ordinal`` or
    ``nominal``; ``log`` asks for a logarithmic scale."""

    title: str
    kind: str = "nominal"
    log: bool = False


@dataclass(frozen=True)
class Dataset:
    """Rows of a chart, column by column. With a column ``trial`` only rows of trials that are ``shown`` (all
    that pass the filters) or ``picked`` are drawn; ``all`` are always drawn."""

    columns: Mapping[str, Sequence[Any]]
    which: str = "all"

    @classmethod
    def of(cls, names: Sequence[str], rows: Iterable[Sequence[Any]], which: str = "all") -> Dataset:
        """From rows of values in the order of ``names``."""
        rows = list(rows)
        return cls({name: [row[place] for row in rows] for place, name in enumerate(names)}, which)

    def rows(self, trials: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The rows, of these trials only."""
        names = list(self.columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*self.columns.values(), strict=True)]
        if trials is None or self.which == "all" or "trial" not in self.columns:
            return rows
        wanted = set(trials)
        return [row for row in rows if row["trial"] in wanted]


@dataclass(frozen=True)
class Chart:
    """``build(x, colour)`` makes its description, in which data go by the names of ``datasets``.

    With ``axes`` a reader chooses what is along x, where it is ``coloured`` also the colour. ``networks``
    says that the dataset ``networks`` is made on the page of the accuracy of every network: at the ``last``
    inner step, or at ``every`` one. ``summary`` says in words what is drawn.
    """

    name: str
    title: str
    caption: str
    summary: str
    build: Callable[[Axis, Axis], altair.TopLevelMixin]
    datasets: Mapping[str, Dataset]
    x: Axis = field(default_factory=lambda: Axis("x"))
    colour: Axis = field(default_factory=lambda: Axis("trial"))
    axes: bool = False
    coloured: bool = False
    networks: str | None = None


@dataclass(frozen=True)
class Section:
    """``parts`` are in their order on the page."""

    name: str
    title: str
    parts: Sequence[Markup | Table | Chart]

    @property
    def tables(self) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def charts(self) -> list[Chart]:
        return [part for part in self.parts if isinstance(part, Chart)]
