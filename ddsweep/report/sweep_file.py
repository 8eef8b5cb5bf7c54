"""What the ``sweep.yaml`` of a results folder asks for: its trials, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddsweep.catalog import DatasetSpec, EvaluationSpec, TrialSpec, parse_dataset
from ddsweep.errors import DataError, ResultsError, SettingError
from ddsweep.results.layout import SweepDirectory

if TYPE_CHECKING:
    from ddsweep.spec import AshaSpec

__all__ = ["Asked", "Resolve", "asked_of", "from_catalog", "require_sweep"]

Resolve = Callable[[str | dict[str, Any]], DatasetSpec]
"""From the data set of a sweep file to its spec, as `ddsweep.data.files.resolve_dataset` does."""


@dataclass(frozen=True)
class Asked:
    """The trials of the sweep file and their evaluation.

    ``trials`` is None without the file, or without data whose content enters the ids; ``note`` then says why.
    ``evaluation`` is None without the file. ``to_propose`` is the number of trials that guided searches are
    still to propose.
    """

    trials: tuple[TrialSpec, ...] | None
    evaluation: EvaluationSpec | None
    note: str | None = None
    scheduler: AshaSpec | None = None
    to_propose: int = 0


def from_catalog(value: str | dict[str, Any]) -> DatasetSpec:
    """A data set that the catalog alone describes. Raises `DataError` for one that is read from the user's
    files."""
    spec = None
    if isinstance(value, str):
        with suppress(SettingError):
            spec = parse_dataset(value)
    if spec is None or isinstance(spec.identity(), list):
        raise DataError(f"the content of {value!r} enters the trial ids")
    return spec


def asked_of(directory: SweepDirectory, resolve: Resolve = from_catalog) -> Asked:
    """What the sweep in ``directory`` asks for.

    Raises `ResultsError` for a folder that is not there or holds no sweep, `SettingError` for a
    ``sweep.yaml`` that cannot be read.
    """
    from ddsweep.pools.file import resolve_pool
    from ddsweep.results.proposals import read_proposals
    from ddsweep.spec import expand, load_sweep

    require_sweep(directory)
    if not directory.sweep_file.exists():
        return Asked(None, None, "no sweep.yaml here: only trials with files are listed")
    sweep = load_sweep(directory.sweep_file)
    try:
        proposed = read_proposals(directory)
    except ResultsError as error:
        return Asked(None, sweep.evaluate.spec(), f"only trials with files are listed: {error}")
    try:
        plan = expand(sweep, resolve, lambda value: resolve_pool(value, directory.pools, resolve), proposed)
        asked = (plan.trials, sweep.evaluate.spec(), None, sweep.scheduler)
        return Asked(*asked, to_propose=plan.to_propose)
    except DataError as error:
        note = f"only trials with files are listed, because the data are not here: {error}"
        return Asked(None, sweep.evaluate.spec(), note)
    except SettingError as error:  # a file of another version, which this one would not run
        note = f"only trials with files are listed, because this version refuses the sweep: {error}"
        return Asked(None, sweep.evaluate.spec(), note)


def require_sweep(directory: SweepDirectory) -> None:
    """Raises `ResultsError` for a folder that does not exist, or holds neither a sweep file nor results."""
    root = directory.root
    if not root.is_dir():
        raise ResultsError(f"{root}: no such results folder; give the folder of one sweep, results/<sweep>")
    if not directory.sweep_file.exists() and not directory.seen_trials():
        inside = sorted(path.parent.name for path in root.glob("*/sweep.yaml"))
        hint = f"give one of the sweeps in it: {', '.join(inside)}" if inside else "it holds no results"
        raise ResultsError(f"{root}: not the results of one sweep; {hint}")
