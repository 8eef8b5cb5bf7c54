"""Other sweeps in the same folder of results, and which of them have a trial finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import part_metadata

__all__ = ["OtherSweep", "finished_in", "other_sweeps"]


@dataclass(frozen=True)
class OtherSweep:
    """Another sweep in the same folder of results."""

    directory: SweepDirectory

    @cached_property
    def evals(self) -> dict[str, list[Path]]:
        """Its evals parts by trial, listed once."""
        return self.directory.evals_by_trial()


def other_sweeps(directory: SweepDirectory) -> list[OtherSweep]:
    """The sweeps beside ``directory``, by name."""
    folders = sorted(path.parent for path in directory.root.parent.glob("*/sweep.yaml"))
    return [OtherSweep(SweepDirectory(folder)) for folder in folders if folder.name != directory.root.name]


def finished_in(trial_id: str, others: Sequence[OtherSweep]) -> list[OtherSweep]:
    """Those of ``others`` that have the trial done, by its row, and its distilled set."""
    found = []
    for other in others:
        row = other.directory.trials_part(trial_id)
        try:
            if row.exists() and part_metadata(row).get("status") != "stopped":
                found.append(other)
        except (ResultsError, UnreadableError):  # such a row counts as missing
            continue
    return [other for other in found if other.directory.distilled(trial_id).exists()]
