"""The files of a trial in the folder of its sweep, and whether they are whole."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from ddsweep.catalog import TrialSpec
from ddsweep.core.execution import ExecutionPlan
from ddsweep.distilled import DistilledSet
from ddsweep.errors import CheckpointError, DivergedError, ResultsError, SettingError
from ddsweep.provenance import environment, utc_now
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import is_whole, write_part
from ddsweep.results.schemas import FAILURES

__all__ = ["is_distilled", "move_aside_if_torn", "read_distilled", "record_failure"]

_log = logging.getLogger(__name__)


def read_distilled(spec: TrialSpec, directory: SweepDirectory) -> DistilledSet:
    """The distilled set of ``spec``. Raises `CheckpointError` if it is missing, torn, or of another trial,
    and `UnreadableError`."""
    path = directory.distilled(spec.trial_id)
    distilled = DistilledSet.load(path)
    if distilled.spec.trial_id != spec.trial_id:
        raise CheckpointError(f"{path}: the distilled set of trial {distilled.spec.trial_id}")
    return distilled


def is_distilled(spec: TrialSpec, directory: SweepDirectory) -> bool:
    """Whether nothing is left to distil: the distilled set and its history exist and are whole.

    If only the history is torn, it is written again from the last checkpoint.
    """
    try:
        read_distilled(spec, directory)
    except CheckpointError:
        return False
    return is_whole(directory.history_part(spec.trial_id))


def move_aside_if_torn(path: Path, spec: TrialSpec, kind: str) -> None:
    """Rename a file that is damaged, of another trial, or of a run with a plan that this version cannot
    follow. Raises `UnreadableError` for a file that the system cannot read, and leaves it alone."""
    if not path.exists():
        return
    try:
        _, header = load_tensors(path)
        if (header.get("trial_id"), header.get("kind")) != (spec.trial_id, kind):
            raise CheckpointError(f"{path}: not the {kind} of trial {spec.trial_id}")
        if kind == "checkpoint":
            ExecutionPlan.from_dict(header["plan"])
    except (CheckpointError, SettingError) as error:
        number = 1
        while (aside := path.with_name(f"{path.name}.torn-{number}")).exists():
            number += 1
        path.rename(aside)
        _log.warning("trial %s starts again, %s is moved aside: %s", spec.trial_id, path.name, error)


def record_failure(
    directory: SweepDirectory, spec: TrialSpec, sweep: str, error: Exception, place: str, attempts: int
) -> None:
    """Leave a row in ``failures/``; it is removed when the trial succeeds. On a full disk there is no row:
    reporting a failure must not fail itself."""
    row = {
        "trial_id": spec.trial_id,
        "sweep": sweep,
        "status": "diverged" if isinstance(error, DivergedError) else "failed",
        "error_class": type(error).__name__,
        "message": str(error),
        "place": place,
        "host": environment()["host"],
        "attempts": attempts,
        "failed_at": utc_now(),
    }
    with suppress(ResultsError):  # a full disk, or one that does not answer: the next run tries it again
        write_part(directory.failure_part(spec.trial_id), [row], FAILURES, directory.temporary)
