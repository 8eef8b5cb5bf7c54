"""Many small parts become one file for each table. Memory is bounded: a stretch of trials is read at a
time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ddsweep.errors import ResultsError
from ddsweep.results.files import partial_path, results_error, write_atomic
from ddsweep.results.known import KnownParts, Stamp, stamp_of
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import GoneError, conform, list_parts, read_part, read_whole, torn_error
from ddsweep.results.schemas import SORT_KEYS, TABLES

__all__ = ["compact", "sorted_rows"]

_PARTS_TOGETHER = 1000
"""Parts that are read before their rows become one piece of memory."""

_ROWS_TOGETHER = 2**18
"""The least number of rows that are sorted and written together: some 100 MB of the largest table."""

_TRIAL = re.compile(r"part-([^-.]*)")

OnPart = Callable[[Path, Stamp, dict[str, str]], None]
OnTorn = Callable[[Path], None]


def compact(directory: SweepDirectory) -> dict[str, int]:
    """Write each table as one file, ``tables/<name>.parquet``; returns its number of rows.

    The parts stay; they are the source of truth. The same parts give the same bytes, in any order of writing.
    Every byte of every part is read and checked. A table whose folder of parts is away stays as it is: it is
    all that there is. Raises `ResultsError` naming every torn part, and `UnreadableError` for a folder or a
    part that the system cannot read; the previous tables then stay.
    """
    known, counts = KnownParts.load(directory), {}
    torn: list[Path] = []
    made_of: dict[str, list[tuple[Path, Stamp]]] = {name: [] for name in TABLES}
    with ExitStack() as afterwards:
        written = {}
        for name, schema in TABLES.items():
            if not directory.parts(name).is_dir() and directory.table(name).exists():
                counts[name] = read_part(directory.table(name)).num_rows
                continue
            written[name] = partial_path(directory.table(name), directory.temporary)
            afterwards.callback(written[name].unlink, missing_ok=True)

            def on_part(path: Path, stamp: Stamp, metadata: dict[str, str], name: str = name) -> None:
                known.note(path, stamp, metadata)
                made_of[name].append((path, stamp))

            tables = sorted_rows(directory, name, torn.append, on_part)
            counts[name] = _write(tables, schema, written[name])
        if torn:
            raise torn_error(torn, "truncated or altered")
        for name, path in written.items():
            table = directory.table(name)
            write_atomic(table, partial(os.replace, path), directory.temporary)
            known.note_collected(table, made_of[name])
    known.save(directory)
    return counts


def sorted_rows(
    directory: SweepDirectory, name: str, on_torn: OnTorn, on_part: OnPart = lambda *part: None
) -> Iterator[pa.Table]:
    """All rows of one table in the order of `SORT_KEYS`, some 100 MB of them at a time.

    ``on_part`` is called with every part that was read, ``on_torn`` with every part that cannot be read. A
    part that vanished since it was listed (a failure that succeeded) is skipped. Raises `ResultsError` for a
    part with a column of another type.
    """
    schema, rows = TABLES[name], 0
    waiting: list[pa.Table] = []
    few: list[pa.Table] = []
    keys = [(key, "ascending") for key in SORT_KEYS[name]]
    # The first key is the trial, and parts are listed by trial. So sorting stretches of trials sorts the
    # table.
    for _, parts in groupby(list_parts(directory.parts(name)), key=_trial_of):
        for path in parts:
            stamp = stamp_of(path)
            try:
                table, metadata = read_whole(path)
            except GoneError:
                continue
            except ResultsError:
                on_torn(path)
                continue
            if stamp is not None:
                on_part(path, stamp, metadata)
            few.append(conform(table, schema, path))
            rows += table.num_rows
        if len(few) >= _PARTS_TOGETHER:
            waiting, few = [*waiting, pa.concat_tables(few).combine_chunks()], []
        if rows >= _ROWS_TOGETHER:
            yield pa.concat_tables([*waiting, *few]).combine_chunks().sort_by(keys)
            waiting, few, rows = [], [], 0
    if waiting or few:
        yield pa.concat_tables([*waiting, *few]).combine_chunks().sort_by(keys)


def _trial_of(path: Path) -> str:
    found = _TRIAL.match(path.name)
    return found[1] if found else path.name


def _write(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Write ``tables`` as one file, a group of rows each; returns the number of rows."""
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table)
                count += table.num_rows
    except OSError as error:
        raise results_error(error, path) from error
    return count
