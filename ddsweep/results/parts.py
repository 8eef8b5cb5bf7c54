"""Parts: one small Parquet file per trial and table. Written atomically, read as one table."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ddsweep.errors import ResultsError
from ddsweep.results.files import names_in, unreadable_error, write_atomic

__all__ = [
    "GoneError",
    "OnTorn",
    "conform",
    "is_whole",
    "list_parts",
    "part_metadata",
    "read_part",
    "read_parts",
    "read_rows",
    "read_whole",
    "torn_error",
    "write_atomic",
    "write_part",
    "write_part_table",
]

T = TypeVar("T")

_SEAL = "part_sha256"
"""The key of the SHA-256 of a whole part, computed with zeros in its own place. Parquet has check sums of
pages and none of the footer. Parts of version 0.1 have no seal."""

_ZEROS = "0" * 64
_KEY = b"\x18\x0b" + _SEAL.encode()
_MARK = _KEY + b"\x18\x40"
"""What stands before the seal in a file: its key, and a string of 64 bytes, in Thrift's compact encoding."""

_NOT_OURS = (b"ARROW:schema", _SEAL.encode())

_TOGETHER = 1000
"""So many parts become one piece of memory: a table keeps some kilobytes for each piece."""


# ---------------------------------------------------------------------------------------- writing


def write_part(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    temporary: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``rows`` as one part, atomically. A column that a row leaves out is null.

    ``metadata`` goes into the file beside ``schema_version``. Raises ``ValueError`` for a column that the
    schema does not have, and `ResultsError` if the file cannot be written.
    """
    known = set(schema.names)
    unknown = sorted({name for row in rows for name in row if name not in known})
    if unknown:
        raise ValueError(f"{path.name}: columns that the schema does not have: {', '.join(unknown)}")
    write_part_table(
        path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary, metadata
    )


def write_part_table(
    path: Path, table: pa.Table, temporary: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """`write_part` for rows that are a table of the schema already."""
    merged = {**_text(table.schema.metadata), **(metadata or {}), _SEAL: _ZEROS}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(merged),
        buffer,
        # A part has many columns and a row or two, so the set-up of each column takes most of the time.
        compression="snappy",
        use_dictionary=table.num_rows > 1,
        write_statistics=False,
        write_page_checksum=True,  # so that altered bytes are noticed and not read as numbers
    )
    content = buffer.getvalue()
    start = content.rindex(_MARK + _ZEROS.encode()) + len(_MARK)
    seal = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content[:start] + seal + content[start + len(seal) :], temporary)


# ---------------------------------------------------------------------------------------- reading


class GoneError(ResultsError):
    """There is no such part, or no longer."""


def list_parts(directory: Path) -> list[Path]:
    """The Parquet files of a folder, sorted by name; dot files and other files are no parts. Raises
    `UnreadableError` for a folder that the system does not list."""
    names = names_in(directory)
    return [directory / name for name in names if name.endswith(".parquet") and name[0] not in "._"]


def read_part(path: Path) -> pa.Table:
    """One part as it was written. Errors are those of `read_whole`."""
    return read_whole(path)[0]


def read_whole(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """One part and its key-value metadata, every byte checked. Raises `ResultsError` if it is torn,
    `GoneError` if there is none, and `UnreadableError` if the system cannot read it."""

    # No threads: they cost more than they save on files this small.
    return _read(path, lambda file: file.read(use_threads=False))


def part_metadata(path: Path) -> dict[str, str]:
    """The key-value metadata of a part, ``schema_version`` included, without looking at its rows. Errors are
    those of `read_whole`."""
    return _read(path, lambda file: None)[1]


def _read(path: Path, take: Callable[[pq.ParquetFile], T]) -> tuple[T, dict[str, str]]:
    try:
        # One read instead of one for each of a hundred columns, which matters on a network file system.
        content = path.read_bytes()
    except FileNotFoundError:
        raise GoneError(f"{path}: no such part") from None
    except OSError as error:
        raise unreadable_error(error, path) from error
    if not _is_intact(content):
        raise torn_error([path], "altered: its check sum does not match")
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            return take(file), _text(file.metadata.metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise torn_error([path], str(error)) from error


def _is_intact(content: bytes) -> bool:
    """Whether the seal of a part is that of its bytes; true without a seal."""
    if (start := content.rfind(_KEY)) < 0:
        return True
    start += len(_MARK)
    seal, end = content[start : start + len(_ZEROS)], start + len(_ZEROS)
    return hashlib.sha256(content[:start] + _ZEROS.encode() + content[end:]).hexdigest().encode() == seal


def read_parts(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """These parts as one table of exactly ``schema``, in the order given.

    A column that an older file lacks is null; a column that only a newer file has is left out. A part that
    vanished since it was listed (a failure that succeeded) is skipped. ``pyarrow.dataset`` is not used: it
    imports pandas, and does not say which file is torn.
    """
    tables, few = [pa.Table.from_batches([], schema=schema)], []
    for path in paths:
        try:
            few.append(conform(read_part(path), schema, path))
        except GoneError:
            continue
        if len(few) == _TOGETHER:
            tables.append(pa.concat_tables(few).combine_chunks())
            few = []
    return pa.concat_tables([*tables, *few])


OnTorn = Callable[[Path], object]
"""Called with each part that cannot be read."""


def read_rows(paths: Iterable[Path], schema: pa.Schema, on_torn: OnTorn) -> list[dict[str, Any]]:
    """The rows of these parts, as `read_parts` does; parts that cannot be read are left out."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += read_parts([path], schema).to_pylist()
        except ResultsError:
            on_torn(path)
    return rows


def is_whole(path: Path) -> bool:
    """Whether the part exists and every byte of it can be read."""
    try:
        read_part(path)
    except ResultsError:
        return False
    return True


def conform(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """A part as a table of exactly ``schema`` (see `read_parts`). Raises `ResultsError` for another type."""
    if table.schema.equals(schema, check_metadata=False):
        return table.replace_schema_metadata(schema.metadata)
    names, columns = set(table.schema.names), []
    for field in schema:
        if field.name not in names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            raise ResultsError(
                f"{path}: column {field.name} is {column.type} and cannot be read as {field.type}: {error}"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema)


def torn_error(paths: Sequence[Path], reason: str) -> ResultsError:
    """The `ResultsError` that names torn parts, says why, and what to do."""
    what = "torn part" if len(paths) == 1 else f"{len(paths)} torn parts"
    where = ", ".join(str(path) for path in paths)
    return ResultsError(
        f"{what}: {where} ({reason.splitlines()[0] if reason else 'cannot be read'}); `ddsweep run` makes it "
        "again, `ddsweep collect` stops until then, `ddsweep status` and `show` leave it out"
    )


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    # ARROW:schema is pyarrow's own copy of the schema; readers of our keys need neither it nor the seal.
    items = (metadata or {}).items()
    return {key.decode(): value.decode() for key, value in items if key not in _NOT_OURS}
