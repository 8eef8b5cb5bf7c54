"""Read the results of a sweep into pandas frames."""

from __future__ import annotations

import html
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.paths import user_path
from ddsweep.results.collect import sorted_rows
from ddsweep.results.current import is_in_sweep
from ddsweep.results.html_table import trials_html
from ddsweep.results.known import is_collected
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import conform, list_parts, read_part
from ddsweep.results.schemas import TABLES

__all__ = ["Results", "load_results", "only_in_sweep"]

_NULLABLE: dict[pa.DataType, pd.api.extensions.ExtensionDtype] = {
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


@dataclass(frozen=True)
class Results:
    """The tables of one sweep; columns and types as in `ddsweep.results.schemas`.

    Whole numbers and flags have pandas' nullable types, so a null does not turn counts into fractions. In
    columns of fractions null is NaN. ``torn`` are the unreadable parts that were left out.
    """

    trials: pd.DataFrame
    evals: pd.DataFrame
    history: pd.DataFrame
    failures: pd.DataFrame
    torn: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        """How many rows each table has."""
        counts = [f"{len(getattr(self, name))} {name}" for name in TABLES]
        if self.torn:
            counts.append(f"{len(self.torn)} torn files left out")
        return f"Results({', '.join(counts)})"

    def _repr_html_(self) -> str:
        """In a notebook: the same, and a table of the trials with the settings that vary and their
        accuracy."""
        return f"<div>{html.escape(repr(self))}</div>{trials_html(self.trials)}"


def load_results(directory: str | os.PathLike[str], *, all_trials: bool = False) -> Results:
    """The results of one sweep, ``results/<sweep>``, as pandas frames: of the trials in its sweep file or,
    with ``all_trials``, of all trials. ``trials["in_sweep"]`` tells them apart.

    Reads the parts, the source of truth. If ``ddsweep collect`` has seen exactly these parts, or their folder
    is gone, it reads ``tables/<name>.parquet``, with the same rows in the same order (`SORT_KEYS`). Each torn
    part is left out, with a warning. Raises `ResultsError` for a folder that does not exist or holds no
    sweep, and `UnreadableError` for a file that the system cannot read.
    """
    root = user_path(directory)
    if not root.is_dir():
        raise ResultsError(f"{root}: no such results folder; give the folder of one sweep, results/<sweep>")
    sweep = SweepDirectory(root)
    if not sweep.sweep_file.exists() and not any(_sources(sweep, name) for name in TABLES):
        inside = sorted(p.parent.name for p in root.glob("*/sweep.yaml"))
        hint = f"give one of the sweeps in it: {', '.join(inside)}" if inside else "it holds no tables"
        raise ResultsError(f"{root}: not the results of one sweep; {hint}")
    frames: dict[str, pd.DataFrame] = {}
    torn: list[Path] = []
    for name, schema in TABLES.items():
        frames[name] = _read(sweep, name, schema, torn).to_pandas(types_mapper=_NULLABLE.get)
    frames["trials"]["in_sweep"] = frames["trials"]["in_sweep"].fillna(True)
    for path in torn:
        warnings.warn(f"{path} is torn and left out; `ddsweep run` makes it again", stacklevel=2)
    results = Results(**frames, torn=tuple(torn))
    return results if all_trials else only_in_sweep(sweep, results)


def only_in_sweep(directory: SweepDirectory, results: Results) -> Results:
    """Of the tables of all trials, the rows of those in the sweep file."""
    trials = results.trials
    frames: dict[str, Any] = {}
    flags = dict(zip(trials["trial_id"], trials["in_sweep"].astype(bool), strict=True))
    current = is_in_sweep(directory, flags)
    for name in TABLES:
        frame: pd.DataFrame = getattr(results, name)
        others = [trial_id for trial_id in frame["trial_id"].unique() if not current(trial_id)]
        if others:
            frame = frame[~frame["trial_id"].isin(others)].reset_index(drop=True)
        frames[name] = frame
    return replace(results, **frames)


def _sources(sweep: SweepDirectory, name: str) -> list[Path]:
    if sweep.parts(name).is_dir():
        return list_parts(sweep.parts(name))
    return [sweep.table(name)] if sweep.table(name).exists() else []


def _read(sweep: SweepDirectory, name: str, schema: pa.Schema, torn: list[Path]) -> pa.Table:
    parts, collected = _sources(sweep, name), sweep.table(name)
    if parts == [collected] or (parts and is_collected(sweep, name, parts)):
        try:
            table = read_part(collected)
        except UnreadableError:
            if parts == [collected]:
                raise
        except ResultsError:
            if parts == [collected]:
                torn.append(collected)
        else:
            return conform(table, schema, collected)
    return pa.concat_tables([schema.empty_table(), *sorted_rows(sweep, name, torn.append)])
