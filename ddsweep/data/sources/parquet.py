"""Parquet files of encoded images and labels, of the user's own or in the catalog."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.catalog import MOST_EXAMPLES, DatasetSpec, Survey
from ddsweep.data.content import combined_digest, file_digest
from ddsweep.data.inline import described_items, text
from ddsweep.data.layout import PUT_THERE, MissingError, location
from ddsweep.data.sources import Looking, Part, Raw, Source
from ddsweep.errors import DataError

if TYPE_CHECKING:
    from ddsweep.data.survey import Item

__all__ = ["SOURCE"]

_ROLES = ("train", "test")
_MAGIC = b"PAR1"


class Parquet(Source):
    """``spec.train`` and ``spec.test`` are files in ``spec.path``, by name, pattern or number."""

    def described(self, value: Mapping[str, Any]) -> dict[str, Any]:
        columns = {key: text(value, key, "") for key in ("image_column", "label_column")}
        return {**described_items(value, "{}*.parquet", numbers=True), **columns}

    def recognises(self, folder: Path) -> bool:
        return next(folder.glob("*.parquet"), None) is not None

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        for path in (path for paths in _files(spec, root).values() for path in paths):
            with path.open("rb") as file:
                start, size = file.read(4), path.stat().st_size
                file.seek(max(0, size - 4))
                if size < 12 or start != _MAGIC or file.read(4) != _MAGIC:
                    raise DataError(
                        f"dataset {spec.name}: {path}: not a readable parquet file (truncated or damaged): "
                        f"{size} bytes, which do not begin and end as those of one"
                    )

    def survey(self, spec: DatasetSpec, root: Path | None, how: Looking) -> Survey | None:
        from ddsweep.data.survey import survey_once

        shards = _files(spec, root)
        paths = [(role, path) for role in _ROLES for path in shards[role]]
        folder = location(spec, root)
        return survey_once(spec, folder, paths, lambda: _look(spec, shards, how.sized), how)

    def content(self, spec: DatasetSpec, root: Path | None) -> str:
        shards = _files(spec, root)
        entries = ((role, "", file_digest(spec.name, path)) for role in _ROLES for path in shards[role])
        return combined_digest("parquet", entries)

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        from ddsweep.data.columns import decode_parquet, find_columns

        files = _files(spec, root)
        columns = find_columns(files["train"][0], spec.image_column, spec.label_column)
        classes: dict[int | str | None, int] = {
            (name if columns.text else spec.first_label + i): i for i, name in enumerate(spec.class_names)
        }

        def part(role: str) -> Part:
            where, chosen = ", ".join(map(str, files[role])), (columns.image, columns.label)
            read = decode_parquet(files[role], chosen, classes, spec.read_shape, resize=0 in spec.native)
            return Part(*read, where)

        return Raw(part("train"), part("test"), spec.class_names)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return f"put its parquet files into {spec.path}"


def _files(spec: DatasetSpec, root: Path | None) -> dict[str, tuple[Path, ...]]:
    """The files of a ``parquet`` source by role, ``{"train": (...), "test": (...)}``, in given order.

    A number means a place among the ``*.parquet`` files of the folder, and ``*``, ``?`` and ``[`` in a name
    all the files that match, both in `_natural` order. Raises `DataError` for a missing file, and for a file
    named twice: a test image seen in training would make every score void.
    """
    folder = location(spec, root)
    shards = sorted(
        (path for path in folder.glob("*.parquet") if not path.name.startswith(".")), key=_natural
    )
    chosen: dict[str, tuple[Path, ...]] = {}
    for role, wanted in (("train", spec.train), ("test", spec.test)):
        chosen[role] = tuple(
            path for item in wanted for path in _shards(spec.name, role, item, folder, shards)
        )
    seen: dict[Path, str] = {}
    for role, paths in chosen.items():
        for path in paths:
            before = seen.get(path.resolve())
            seen[path.resolve()] = role
            if before is not None:
                places = f"twice in {role}" if before == role else "in both train and test"
                raise DataError(f"dataset {spec.name}: {path} is {places}")
    return chosen


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their size: ``shard-2`` comes before ``shard-10``."""
    pieces = re.split(r"([0-9]+)", str(path))
    return [(1, int(piece), piece) if i % 2 else (0, 0, piece) for i, piece in enumerate(pieces)]


def _shards(name: str, role: str, item: str | int, folder: Path, shards: Sequence[Path]) -> list[Path]:
    if isinstance(item, int):
        if 0 <= item < len(shards):
            return [shards[item]]
        there = f" (0 to {len(shards) - 1})" if shards else ""
        what = f"{role} asks for shard {item}, but {folder} holds {len(shards)} *.parquet files{there}"
        raise MissingError(f"dataset {name}: {what}", what)
    path = folder / item
    if path.is_file():
        return [path]
    if not glob.has_magic(item):
        what = f"{role} file {path} is missing"
        raise MissingError(f"dataset {name}: {what}; {PUT_THERE}", what)
    matching = [folder / match for match in glob.glob(item, root_dir=folder, recursive=True)]
    files = sorted((match for match in matching if match.is_file()), key=_natural)
    if not files:
        there = ", ".join(shard.name for shard in shards[:MOST_EXAMPLES]) or "no *.parquet file"
        more = f" and {len(shards) - MOST_EXAMPLES} more" if len(shards) > MOST_EXAMPLES else ""
        what = f"no file in {folder} matches {role}: {item}; there is {there}{more}"
        remedy = f"give {role} as file names, patterns such as {role}-*.parquet, or numbers of shards"
        raise MissingError(f"dataset {name}: {what}; {remedy}", what)
    return files


def _look(spec: DatasetSpec, shards: dict[str, tuple[Path, ...]], sized: bool) -> Survey:
    from ddsweep.data.columns import IMAGE, LABEL, find_columns
    from ddsweep.data.labels import LabelColumn, label_parquet
    from ddsweep.data.survey import looked_at, summed_up
    from ddsweep.data.tally import Tally

    first_file = shards["train"][0]
    columns = find_columns(first_file, spec.image_column, spec.label_column)
    tally, entries = Tally(), []
    roles: dict[bytes, tuple[str, Path]] = {}
    every = [(role, path) for role in _ROLES for path in shards[role]]
    for role, path in every:
        digest = file_digest(spec.name, path)
        entries.append((role, "", digest))
        other, before = roles.setdefault(digest, (role, path))
        if other != role:
            raise DataError(f"dataset {spec.name}: {path} is in both train and test: it equals {before}")
        own = find_columns(path, columns.image, columns.label)
        if own.text != columns.text or (own.names and columns.names and own.names != columns.names):
            raise DataError(
                f"dataset {spec.name}: {path}: column {columns.label!r} has other classes than that of "
                f"{first_file}"
            )
        for item, _, seen in looked_at(_rows(role, path, (columns.image, columns.label))):
            tally.add(item.role, item.label, item.place, seen)
    column = LabelColumn(spec, columns.label, columns.names, tally.labels, tally.places)
    labels = label_parquet(column)
    read_as: dict[str, Any] = {}
    if (columns.image, columns.label) != (IMAGE, LABEL):
        read_as["columns"] = [columns.image, columns.label]
    if columns.text:
        read_as["classes"] = labels.names
    found = summed_up(spec, sized, tally, labels, combined_digest("parquet", entries), read_as)
    return replace(
        found,
        image_column="" if columns.image == IMAGE else columns.image,
        label_column="" if columns.label == LABEL else columns.label,
        first_label=labels.first,
    )


def _rows(role: str, path: Path, columns: tuple[str, str]) -> Iterator[Item]:
    from ddsweep.data.columns import read_rows
    from ddsweep.data.survey import Item

    row = itertools.count()
    for contents, labels in read_rows(path, *columns):
        for content, label in zip(contents, labels, strict=True):
            yield Item(role, label, (path, next(row)), content or b"")


SOURCE = Parquet()
