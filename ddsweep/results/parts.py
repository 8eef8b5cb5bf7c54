"""Parts: one small Parquet file per trial and table. Written atomically, read as one table."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddsweep.errors import ResultsError
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.schemas import SORT_KEYS, TABLES

__all__ = [
    "compact",
    "list_parts",
    "part_metadata",
    "read_part",
    "read_parts",
    "read_table",
    "torn_parts",
    "write_atomic",
    "write_part",
]


# ---------------------------------------------------------------------------------------- writing


def write_part(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    temporary: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``rows`` as one part, atomically. A column that a row leaves out is null.

    ``metadata`` goes into the file beside ``schema_version``. Raises ``ValueError`` for a column
    that the schema does not have and `ResultsError` where the file cannot be written.
    """
    known = set(schema.names)
    unknown = sorted({name for row in rows for name in row if name not in known})
    if unknown:
        raise ValueError(f"{path.name}: columns that the schema does not have: {', '.join(unknown)}")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    _write_table(path, table, temporary, metadata or {})


def _write_table(path: Path, table: pa.Table, temporary: Path, metadata: Mapping[str, str]) -> None:
    merged = {**_text(table.schema.metadata), **metadata}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(merged),
        buffer,
        compression="zstd",
        write_page_checksum=True,  # so that altered bytes are seen and not read as numbers
    )
    write_atomic(path, buffer.getvalue(), temporary)


# ---------------------------------------------------------------------------------------- reading


def list_parts(directory: Path) -> list[Path]:
    """The Parquet files of a folder, sorted by name; dot files and other files are no parts."""
    return sorted(p for p in directory.glob("*.parquet") if not p.name.startswith((".", "_")))


def read_part(path: Path) -> pa.Table:
    """One part as it was written. Raises `ResultsError` if it is torn or gone."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(use_threads=False)  # threads cost more than they save on files this small
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such part") from None
    except (pa.ArrowException, OSError) as error:
        raise _torn([path], str(error)) from error


def part_metadata(path: Path) -> dict[str, str]:
    """The key-value metadata of a part, ``schema_version`` included; reads the footer only."""
    try:
        return _text(pq.read_metadata(path).metadata)
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such part") from None
    except (pa.ArrowException, OSError) as error:
        raise _torn([path], str(error)) from error


def read_parts(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """These parts as one table of exactly ``schema``, in the order given.

    A column that an older file lacks is null, one that only a newer file has is left out. A part
    that vanished since it was listed (a failure that succeeded) is skipped. File by file and not
    through ``pyarrow.dataset``: that imports pandas, and does not say which file is torn.
    """
    tables = [pa.Table.from_batches([], schema=schema)]
    for path in paths:
        try:
            tables.append(_conform(read_part(path), schema, path))
        except ResultsError:
            if path.exists():
                raise
    return pa.concat_tables(tables)


def read_table(directory: Path, schema: pa.Schema) -> pa.Table:
    """All parts of a folder as one table of exactly ``schema``; a missing folder is an empty table."""
    return read_parts(list_parts(directory), schema)


def is_whole(path: Path) -> bool:
    """Whether the part is there and every byte of it can be read."""
    try:
        read_part(path)
    except ResultsError:
        return False
    return True


def torn_parts(directory: Path) -> list[Path]:
    """The parts of a folder that cannot be read in full, sorted by name."""
    torn = []
    for path in list_parts(directory):
        try:
            read_part(path)
        except ResultsError:
            if path.exists():
                torn.append(path)
    return torn


def _conform(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
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


def _torn(paths: Sequence[Path], reason: str) -> ResultsError:
    what = "torn part" if len(paths) == 1 else f"{len(paths)} torn parts"
    where = ", ".join(str(path) for path in paths)
    return ResultsError(
        f"{what}: {where} ({reason.splitlines()[0] if reason else 'cannot be read'}); `ddsweep run` makes it "
        "again, `ddsweep collect` stops until then, `ddsweep report` leaves it out"
    )


def _text(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    # ARROW:schema is pyarrow's own copy of the schema, of no use to a reader of our keys.
    items = (metadata or {}).items()
    return {key.decode(): value.decode() for key, value in items if key != b"ARROW:schema"}


# ------------------------------------------------------------------------------------- compaction


def compact(sweep_dir: SweepDirectory) -> dict[str, int]:
    """Write each table as one file, ``tables/<name>.parquet``; returns its number of rows.

    The parts stay: they are the truth, and the same parts give the same bytes whatever the order in
    which they were written. Raises `ResultsError` naming every torn part before anything is written.
    """
    torn = [path for name in TABLES for path in torn_parts(sweep_dir.parts(name))]
    if torn:
        raise _torn(torn, "truncated or altered")
    counts = {}
    for name, schema in TABLES.items():
        table = read_table(sweep_dir.parts(name), schema).combine_chunks()
        table = table.sort_by([(key, "ascending") for key in SORT_KEYS[name]])
        _write_table(sweep_dir.table(name), table, sweep_dir.temporary, {})
        counts[name] = table.num_rows
    return counts
