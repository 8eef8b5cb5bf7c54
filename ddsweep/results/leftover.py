"""Files of trials that the sweep file no longer has, copies of code and sets that it no longer names, and
removing them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsweep.errors import ResultsError
from ddsweep.results.collect import compact
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_rows
from ddsweep.results.schemas import TRIALS

__all__ = ["Leftover", "leftover_copies", "leftovers", "remove", "size_of"]


@dataclass(frozen=True)
class Leftover:
    """One trial: its row in ``trials`` (None if it has no readable row), and its files."""

    trial_id: str
    row: Mapping[str, Any] | None
    parts: tuple[Path, ...]
    artifacts: Path

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return size_of([*self.parts, self.artifacts])


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files, and of those in folders."""
    total = 0
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            with suppress(OSError):  # gone meanwhile
                total += file.stat().st_size if file.is_file() else 0
    return total


def leftovers(directory: SweepDirectory, current: Collection[str]) -> list[Leftover]:
    """The trials with files in ``directory`` that are not ``current``, by id."""
    evals, kept = directory.evals_by_trial(), set(current)
    found = evals.keys() | directory.seen_trials()
    return [_leftover(directory, trial_id, evals.get(trial_id, [])) for trial_id in sorted(found - kept)]


def _leftover(directory: SweepDirectory, trial_id: str, evals: list[Path]) -> Leftover:
    # In the order of removal: once its summary is gone, no table of the sweep shows a trial's other rows.
    one_each = (directory.trials_part, directory.failure_part, directory.history_part)
    parts = [path for path in (part(trial_id) for part in one_each) if path.exists()]
    rows = read_rows([directory.trials_part(trial_id)], TRIALS, lambda path: None)
    return Leftover(trial_id, rows[0] if rows else None, (*parts, *evals), directory.artifacts(trial_id))


def leftover_copies(directory: SweepDirectory) -> list[Path]:
    """The copies in ``code`` and ``sets`` whose hash does not stand in the sweep file, nor in that of a
    launch, whose jobs may still wait."""
    files = (directory.sweep_file, *directory.root.glob("jobs/*/sweep.yaml"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    found = [path for folder in (directory.code, directory.sets) for path in folder.glob("*")]
    return sorted(path for path in found if path.stem not in text)


def remove(directory: SweepDirectory, trials: Collection[Leftover], copies: Iterable[Path]) -> None:
    """Remove all files of ``trials``, and ``copies``; the caller holds the sweep's lock. Collected tables are
    made again.

    Raises `ResultsError` for a file that cannot be removed; the same call goes on.
    """
    try:
        for trial in trials:
            for path in trial.parts:
                path.unlink(missing_ok=True)
            if trial.artifacts.exists():
                shutil.rmtree(trial.artifacts)
        for copy in copies:
            if copy.is_dir():
                shutil.rmtree(copy)
            else:
                copy.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(f"{error.filename}: cannot be removed: {error.strerror or error}") from error
    if trials and any(directory.tables.glob("*.parquet")):
        compact(directory)
