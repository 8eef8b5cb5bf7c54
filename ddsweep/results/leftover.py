"""Files of trials that the sweep file no longer has, and removing them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsweep.errors import ResultsError
from ddsweep.results.collect import compact
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_rows
from ddsweep.results.schemas import TRIALS

__all__ = ["Leftover", "leftovers", "remove"]


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
        files = [*self.parts, *(path for path in self.artifacts.rglob("*") if path.is_file())]
        total = 0
        for path in files:
            with suppress(OSError):  # gone meanwhile
                total += path.stat().st_size
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


def remove(directory: SweepDirectory, trials: Collection[Leftover]) -> None:
    """Remove all files of ``trials``; the caller holds the sweep's lock. Collected tables are made again.

    Raises `ResultsError` for a file that cannot be removed; the same call goes on.
    """
    try:
        for trial in trials:
            for path in trial.parts:
                path.unlink(missing_ok=True)
            if trial.artifacts.exists():
                shutil.rmtree(trial.artifacts)
    except OSError as error:
        raise ResultsError(f"{error.filename}: cannot be removed: {error.strerror or error}") from error
    if trials and any(directory.tables.glob("*.parquet")):
        compact(directory)
