"""Which trials the sweep file has now. Rows of others stay: they are marked, and readers leave them out.

Each row of ``trials`` has the flag ``in_sweep``. An unfinished trial has no row yet. So
``.cache/current.json`` keeps the ids of all trials, with the hash of their ``sweep.yaml``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import pyarrow as pa

from ddsweep.errors import ResultsError
from ddsweep.results.files import write_atomic
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import list_parts, read_whole, write_part_table
from ddsweep.results.schemas import TRIALS

__all__ = ["IN_SWEEP", "add_current", "current_ids", "is_in_sweep", "mark_current", "write_sweep_file"]

IN_SWEEP = "in_sweep"
"""The column, and the key in the metadata of a ``trials`` part that says the same. A part without it counts
as true."""


def write_sweep_file(directory: SweepDirectory, content: bytes, trial_ids: Iterable[str]) -> None:
    """Write ``sweep.yaml``, which has the trials ``trial_ids``, and mark the rows accordingly."""
    write_atomic(directory.sweep_file, content, directory.temporary)
    mark_current(directory, trial_ids)


def mark_current(directory: SweepDirectory, trial_ids: Iterable[str]) -> None:
    """Mark the rows of ``trials`` as in the sweep if they are of ``trial_ids``, the trials of ``sweep.yaml``;
    all others as not in it. Parts with the right flag, and torn ones, are left alone."""
    ids, known = set(trial_ids), KnownParts.load(directory)
    for path in list_parts(directory.parts("trials")):
        wanted = path.stem.removeprefix("part-") in ids
        try:
            if (known.footer(path).get(IN_SWEEP) != "false") == wanted:
                continue
            table, metadata = read_whole(path)
        except ResultsError:
            continue
        flags = pa.array([wanted] * table.num_rows, TRIALS.field(IN_SWEEP).type)
        place = table.schema.get_field_index(IN_SWEEP)
        if place < 0:
            table = table.append_column(TRIALS.field(IN_SWEEP), flags)
        else:
            table = table.set_column(place, TRIALS.field(IN_SWEEP), flags)
        flag = {IN_SWEEP: "true" if wanted else "false"}
        write_part_table(path, table, directory.temporary, {**metadata, **flag})
    _record(directory, ids)


def add_current(directory: SweepDirectory, trial_ids: Iterable[str]) -> None:
    """Record trials that a search has added to those of ``sweep.yaml``. Without a record there is nothing to
    do: then all trials count."""
    ids = current_ids(directory)
    if ids is not None and not ids.issuperset(trial_ids):
        _record(directory, ids.union(trial_ids))


def _record(directory: SweepDirectory, ids: Iterable[str]) -> None:
    content = {"sweep": _hash(directory), "trials": sorted(ids)}
    write_atomic(directory.cache / "current.json", json.dumps(content).encode(), directory.temporary)


def current_ids(directory: SweepDirectory) -> frozenset[str] | None:
    """The ids of the trials of ``sweep.yaml``, as recorded when it was written; None without a record."""
    try:
        content = json.loads((directory.cache / "current.json").read_bytes())
        return frozenset(content["trials"]) if content["sweep"] == _hash(directory) else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, torn, or not ours
        return None


def is_in_sweep(directory: SweepDirectory, flags: dict[str, bool | None]) -> Callable[[str], bool]:
    """Whether a trial is in the sweep, by its id; ``flags`` are those of the existing rows."""
    ids = current_ids(directory)

    def current(trial_id: str) -> bool:
        if trial_id in flags:
            return flags[trial_id] is not False
        return ids is None or trial_id in ids

    return current


def _hash(directory: SweepDirectory) -> str:
    return hashlib.sha256(directory.sweep_file.read_bytes()).hexdigest()
