"""The data sets of a sweep, in lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ddsweep.catalog import DatasetSpec
from ddsweep.catalog.numbers import counted
from ddsweep.data.files import DatasetStatus, dataset_status
from ddsweep.report.formats import NONE, shape_text, size

__all__ = ["data_lines", "dataset_table", "remark_lines"]

_LISTED = 10
"""Up to so many classes, images are counted class by class."""
_LARGE = 10**9
"""From so many bytes on, the size of the images is shown."""


def data_lines(datasets: Iterable[DatasetSpec], root: Path | None) -> list[str]:
    """Shape and classes of each data set, and what is missing or damaged of its files in ``root``; of one's
    own also how many images, and what was found."""
    lines = []
    for spec in dict.fromkeys(datasets):
        status = dataset_status(spec, root).status
        wrong = "" if status in ("present", "embedded") else f"; {status}"
        lines += [f"{spec.name}: {_about(spec)}{wrong}", *(f"  {remark}" for remark in _remarks(spec))]
    return lines


def remark_lines(datasets: Iterable[DatasetSpec]) -> list[str]:
    """Remarks on each of the user's own data sets."""
    return [f"{spec.name}: {remark}" for spec in dict.fromkeys(datasets) for remark in _remarks(spec)]


def dataset_table(rows: Iterable[DatasetStatus]) -> Table:
    """What ``ddsweep data list`` shows."""
    table = Table(box=None, pad_edge=False)
    for heading in ("data set", "images", "classes", "here", "where"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        several = f"{row.shape[0]} channels, several sizes"
        shape = NONE if not row.shape[0] else several if 0 in row.shape else shape_text(row.shape)
        table.add_row(*map(Text, (row.name, shape, str(row.classes or NONE), row.status, row.where)))
    return table


def _remarks(spec: DatasetSpec) -> list[str]:
    return [str(remark) for remark in spec.survey.remarks] if spec.survey else []


def _about(spec: DatasetSpec) -> str:
    files = ""
    if spec.native:
        own = "several sizes" if 0 in spec.native else shape_text(spec.native)
        files = f" (files: {own})"
    about = f"images {shape_text(spec.shape)}{files}, {counted(spec.classes, 'class', 'classes')}"
    if spec.survey is None:
        return about
    found = spec.survey
    roles = (("train", found.train), ("test", found.test))
    parts = [_images(role, counts, found.class_names) for role, counts in roles]
    bytes_ = (sum(found.train) + sum(found.test)) * math.prod(spec.shape)
    return "; ".join([about, *parts]) + (f"; {size(bytes_)} in memory" if bytes_ > _LARGE else "")


def _images(role: str, counts: Sequence[int], names: Sequence[str]) -> str:
    total = f"{role} {sum(counts):,}"
    if len(names) <= _LISTED:
        return (
            f"{total} ({', '.join(f'{name} {count:,}' for name, count in zip(names, counts, strict=True))})"
        )
    low, high = min(counts), max(counts)
    return f"{total} ({low:,} of each)" if low == high else f"{total} ({low:,} to {high:,} of each)"
