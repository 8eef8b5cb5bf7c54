"""Parts that were verified once, so that a sweep of many trials resumes in seconds.

Each part is verified once by reading all of it, and again if its size or times change. These are kept in
``.cache/parts.parquet`` with the key-value metadata of each part. The file may be removed at any time: then
all parts are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import part_metadata, read_whole, write_part_table

__all__ = ["KnownParts", "Stamp", "is_collected", "stamp_of"]

Stamp = tuple[int, int, int]
"""Size, and the times in ns of the last change of content (mtime) and of anything (ctime, which no program
can set)."""

_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("size", pa.int64()),
        ("modified", pa.int64()),
        ("changed", pa.int64()),
        ("metadata", pa.string()),
    ]
)


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file; None without the file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class KnownParts:
    """The metadata of the whole parts of one sweep. Empty until `load` fills it from an earlier `save`."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Stamp, str]] = {}
        self._collected: dict[str, str] = {}
        self._changed = False

    @classmethod
    def load(cls, directory: SweepDirectory) -> KnownParts:
        """What was saved; empty if it cannot be read."""
        known = cls()
        try:
            table, metadata = read_whole(_file(directory))
            columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
        except (ResultsError, UnreadableError, KeyError):
            return known
        known._collected = metadata
        for part, size, modified, changed, text in zip(*columns, strict=True):
            known._parts[part] = ((size, modified, changed), text)
        return known

    def save(self, directory: SweepDirectory) -> None:
        """Save what is new, if anything is. Raises `ResultsError` if the file cannot be written."""
        if not self._changed:
            return
        rows = [(part, *stamp, text) for part, (stamp, text) in self._parts.items()]
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in _SCHEMA]
        table = pa.table(columns, schema=_SCHEMA.with_metadata(self._collected))
        write_part_table(_file(directory), table, directory.temporary)
        self._changed = False

    def note(self, path: Path, stamp: Stamp, metadata: dict[str, str]) -> None:
        """Record that the part was whole at this stamp, which was taken before reading it. Notes beside its
        own metadata stay."""
        self._parts[_key(path)] = (stamp, json.dumps({**(self._same(path, stamp) or {}), **metadata}))
        self._changed = True

    def metadata(self, path: Path) -> dict[str, str] | None:
        """The key-value metadata of a whole part; None if it is torn or missing. Raises `UnreadableError`."""
        try:
            return self.whole(path)
        except ResultsError:
            return None

    def whole(self, path: Path) -> dict[str, str]:
        """The key-value metadata of a whole part. Errors are those of `read_whole`."""
        stamp = stamp_of(path)
        if stamp is not None and (found := self._same(path, stamp)) is not None:
            return found
        _, metadata = read_whole(path)
        if stamp is not None:
            self.note(path, stamp, metadata)
        return metadata

    def is_whole(self, path: Path) -> bool:
        """Whether the part exists and every byte of it could be read."""
        return self.metadata(path) is not None

    def footer(self, path: Path) -> dict[str, str]:
        """The metadata of a part, without looking at its rows. Errors are those of `read_whole`."""
        stamp = stamp_of(path)
        found = None if stamp is None else self._same(path, stamp)
        return part_metadata(path) if found is None else found

    def is_same(self, path: Path) -> bool:
        """Whether the part was verified and is still the same file."""
        entry = self._parts.get(_key(path))
        return entry is not None and entry[0] == stamp_of(path)

    def _same(self, path: Path, stamp: Stamp) -> dict[str, str] | None:
        entry = self._parts.get(_key(path))
        if entry is None or entry[0] != stamp:
            return None
        metadata: dict[str, str] = json.loads(entry[1])
        return metadata

    def note_collected(self, table: Path, parts: Iterable[tuple[Path, Stamp]]) -> None:
        """Record that ``tables/<name>.parquet`` was made from these parts."""
        self._collected[table.stem] = _digest([*parts, (table, stamp_of(table))])
        self._changed = True


def is_collected(directory: SweepDirectory, table: str, parts: Iterable[Path]) -> bool:
    """Whether ``tables/<table>.parquet`` was made from exactly these parts, and none of the files has changed
    since."""
    try:
        recorded = part_metadata(_file(directory)).get(table)
    except (ResultsError, UnreadableError):
        return False
    paths = [*parts, directory.table(table)]
    return recorded is not None and recorded == _digest([(path, stamp_of(path)) for path in paths])


def _digest(stamps: Iterable[tuple[Path, Stamp | None]]) -> str:
    found = hashlib.sha256()
    for path, stamp in stamps:
        found.update(f"{_key(path)} {stamp}\n".encode())
    return found.hexdigest()[:16]


def _file(directory: SweepDirectory) -> Path:
    return directory.cache / "parts.parquet"


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
