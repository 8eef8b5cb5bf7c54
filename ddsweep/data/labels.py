"""From labels in files to classes 0, 1, ...: by folder, by number, or by text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ddsweep.catalog import MOST_EXAMPLES, DatasetSpec, Remark
from ddsweep.catalog.numbers import counted
from ddsweep.data.folders import Listing, class_order, printable

__all__ = [
    "ROLES",
    "Label",
    "LabelColumn",
    "Labelled",
    "Place",
    "label_folder",
    "label_parquet",
    "listed",
    "place_text",
    "too_small",
]

ROLES = ("train", "test")
Label = int | str | None
Place = tuple[Path, int | None]
"""The place of an image: a file, and its row if the file has several."""

_MANY_TEXTS = 20
_LEAST = {"train": 2, "test": 1}
"""The least number of images of a class: of two training images one goes to validation."""


@dataclass(frozen=True)
class Labelled:
    """The classes, the class of each image by role (-1 for a label without a class), and the number of class
    0 in the files."""

    names: tuple[str, ...]
    classes: dict[str, list[int]]
    first: int
    remarks: tuple[Remark, ...]
    problems: tuple[str, ...]

    def counts(self, role: str) -> tuple[int, ...]:
        """Images of each class."""
        counts = Counter(self.classes[role])
        return tuple(counts[label] for label in range(len(self.names)))


def place_text(place: Place) -> str:
    path, row = place
    return printable(str(path)) if row is None else f"{printable(str(path))}: row {row}"


def listed(many: str, items: Sequence[str], count: int) -> str:
    """One sentence about ``count`` things. ``items`` are the first of them, each in its own words."""
    if count == 1:
        return items[0]
    more = f"; and {count - len(items):,} more" if count > len(items) else ""
    return f"{count:,} {many}: {'; '.join(items)}{more}"


# ------------------------------------------------------------------------------------- class folders


def label_folder(spec: DatasetSpec, listing: Listing) -> Labelled:
    """Classes by the folder of an image."""
    names, problems = listing.names, []
    if len(names) < 2:
        where = " and ".join(map(str, spec.train))
        problems.append(f"{where} holds {counted(len(names), 'class folder')}, at least 2 needed")
    if spec.classes and spec.classes != len(names):
        problems.append(f"classes is {spec.classes}, but there are {len(names)} class folders")
    classes = {role: [label for label, _ in listing.files[role]] for role in ROLES}
    out = Labelled(names, classes, 0, (), ())
    return Labelled(names, classes, 0, (), (*problems, *too_small(out)))


# ------------------------------------------------------------------------------------- label columns


@dataclass(frozen=True)
class LabelColumn:
    """A column of the files of ``spec``: the labels, whole numbers or text, and the places of the images, by
    role. ``named`` are the classes in the files' metadata."""

    spec: DatasetSpec
    name: str
    named: tuple[str, ...]
    labels: Mapping[str, list[Label]]
    places: Mapping[str, list[Place]]

    def told(self, rows: Sequence[tuple[str, int]], what: Callable[[Label], str]) -> list[str]:
        """The first of ``rows`` (role and number), each with its place and the text ``what(label)``."""
        return [
            f"{place_text(self.places[role][i])}: {what(self.labels[role][i])}"
            for role, i in rows[:MOST_EXAMPLES]
        ]


def label_parquet(column: LabelColumn) -> Labelled:
    """Classes by a column of labels.

    Numbers count from 0, or from 1 if none is 0 and the known number of classes fits. The classes of text are
    those in train, in the order of `class_order`, or ``spec.class_names``. Nothing is allocated by a number,
    in a file or a setting, that is larger than the number of training images.
    """
    labels = column.labels
    missing = [(role, i) for role in ROLES for i, label in enumerate(labels[role]) if label is None]
    problems: list[str] = []
    if missing:
        told = column.told(missing, lambda label: "the label is null")
        problems.append(listed("labels are null", told, len(missing)))
    texts = any(isinstance(label, str) for role in ROLES for label in labels[role])
    found = (_by_text if texts else _by_number)(column)
    known: dict[Label, int] = {(name if texts else found.first + i): i for i, name in enumerate(found.names)}
    classes = {role: [known.get(label, -1) for label in labels[role]] for role in ROLES}
    problems += found.problems
    if found.names:
        out = Labelled(found.names, classes, found.first, (), ())
        problems += _unknown(out, column, texts) + too_small(out)
    return Labelled(found.names, classes, found.first, found.remarks, tuple(problems))


def _unknown(found: Labelled, column: LabelColumn, texts: bool) -> list[str]:
    wrong = [
        (role, i)
        for role in ROLES
        for i, label in enumerate(found.classes[role])
        if label < 0 and column.labels[role][i] is not None
    ]
    if not wrong:
        return []
    last = found.first + len(found.names) - 1
    allowed = (
        f"none of the classes ({_few(found.names)})" if texts else f"out of range ({found.first} to {last})"
    )
    told = column.told(wrong, lambda label: f"label {label} is {allowed}")
    return [listed("labels are not classes", told, len(wrong))]


class _Named(NamedTuple):
    """Names of the classes, the number of class 0 in the files, and remarks."""

    names: tuple[str, ...]
    first: int
    remarks: tuple[Remark, ...]
    problems: tuple[str, ...]


def _by_number(column: LabelColumn) -> _Named:
    spec, named, labels = column.spec, column.named, column.labels
    found = {label for role in ROLES for label in labels[role] if isinstance(label, int)}
    images = len(labels["train"])
    if spec.classes > images:
        told = (
            f"classes is {spec.classes:,}, but train has {images:,} images, and each class needs at least 2"
        )
        return _Named((), 0, (), (told,))
    low, high = min(found, default=0), max(found, default=-1)
    begins = low == 1 and (spec.classes or high) == high and (not named or len(named) == high)
    first = 1 if begins else 0
    count = spec.classes or max(0, high + 1 - first)
    if count > images:
        return _Named((), 0, (), (_too_large(column, images),))
    if count < 2:
        told = f"column {column.name!r} has {counted(count, 'class', 'classes')}; at least 2 are needed"
        return _Named((), 0, (), (told,))
    remarks = [Remark("labels begin at 1, so label 1 is class 0", 0)] if begins else []
    if named and len(named) < count:
        what = f"names of classes in the metadata, not used because labels go up to {high}"
        remarks.append(Remark(what, len(named)))
        named = ()
    elif len(named) > count:
        left = named[count:]
        what = f"classes of the metadata, left out because labels only go up to {high}"
        remarks.append(Remark(what, len(left), left[:MOST_EXAMPLES]))
    names = spec.class_names or named[:count] or tuple(str(i + first) for i in range(count))
    return _Named(names, first, tuple(remarks), ())


def _too_large(column: LabelColumn, images: int) -> str:
    """The problem of labels so large that their classes cannot all have images."""
    labels = column.labels
    rows = [
        (role, i)
        for role in ROLES
        for i, label in enumerate(labels[role])
        if isinstance(label, int) and label > images
    ] or [("train", max(range(images), key=lambda i: labels["train"][i] or 0))]
    what = f"is out of range: classes count from 0 and train has {images:,} images"
    told = column.told(rows, lambda label: f"label {label} {what}")
    return listed("labels are out of range", told, len(rows))


def _by_text(column: LabelColumn) -> _Named:
    spec, labels, what = column.spec, column.labels, f"column {column.name!r}"
    found = {label for label in labels["train"] if isinstance(label, str)}
    images = len(labels["train"])
    if len(found) > max(_MANY_TEXTS, images // 2):
        told = (
            f"{what} has {len(found):,} different texts in {images:,} training images, too many "
            "to be classes; label_column names another column"
        )
        return _Named((), 0, (), (told,))
    names = spec.class_names or class_order(found)
    if spec.classes and spec.classes != len(names):
        told = f"classes is {spec.classes}, but {what} has {len(names)} different labels in train"
        return _Named((), 0, (), (told,))
    if len(names) < 2:
        told = f"{what} has {counted(len(names), 'class', 'classes')}; at least 2 are needed"
        return _Named((), 0, (), (told,))
    return _Named(names, 0, (), ())


# ---------------------------------------------------------------------------------- sizes of classes


def too_small(found: Labelled) -> list[str]:
    """Problems with the numbers of images."""
    problems = []
    for role in ROLES:
        counts = found.counts(role)
        empty = [name for name, count in zip(found.names, counts, strict=True) if count == 0]
        single = [name for name, count in zip(found.names, counts, strict=True) if 0 < count < _LEAST[role]]
        if len(empty) == 1:
            problems.append(f"class {empty[0]!r} has no images in {role}")
        elif empty:
            problems.append(
                f"{len(empty):,} of {len(counts):,} classes have no images in {role}: {_few(empty)}"
            )
        if len(single) == 1:
            problems.append(
                f"class {single[0]!r} has 1 training image; at least 2 are needed, because one goes to "
                "validation"
            )
        elif single:
            problems.append(
                f"{len(single):,} classes have 1 training image; at least 2 are needed, because one goes to "
                f"validation: {_few(single)}"
            )
    return problems


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_EXAMPLES:,} more" if len(names) > MOST_EXAMPLES else ""
    return ", ".join(names[:MOST_EXAMPLES]) + more
