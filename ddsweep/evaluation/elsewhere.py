"""Takes over a trial that another sweep in the same folder has finished, instead of computing it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsweep.catalog import SPEC_VERSION, TrialSpec
from ddsweep.errors import CheckpointError, ResultsError, UnreadableError
from ddsweep.results.coverage import described
from ddsweep.results.elsewhere import OtherSweep, finished_in, other_sweeps
from ddsweep.results.files import write_atomic
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import is_whole, read_part
from ddsweep.trial import read_distilled

__all__ = ["TakenOver", "take_over", "take_over_all"]


@dataclass(frozen=True)
class TakenOver:
    """The sweep that finished a trial, and the evals parts that came from it."""

    source: SweepDirectory
    evals: tuple[Path, ...]


def take_over(
    spec: TrialSpec, fingerprint: str, directory: SweepDirectory, others: Sequence[OtherSweep]
) -> TakenOver | None:
    """Copy set, history, picture and evals parts of ``spec`` from the first of ``others`` that has finished
    it; None without one.

    The id stands for all science settings, so only the data can differ: ``fingerprint`` must be that of the
    data behind the set. The set is copied last, because it marks the trial as distilled.
    `ddsweep.evaluation.finish` writes the row in ``trials``, under the name of this sweep.
    """
    for other in finished_in(spec.trial_id, others):
        source = other.directory
        try:
            (row,) = read_part(source.trials_part(spec.trial_id)).to_pylist()
            distilled = read_distilled(spec, source)
            evals = [path for path in other.evals.get(spec.trial_id, []) if is_whole(path)]
            whole = is_whole(source.history_part(spec.trial_id))
        except (ResultsError, CheckpointError, UnreadableError, ValueError):
            continue
        made_from = (row["spec_version"], row["dataset_fingerprint"], row["distilled_sha256"])
        if made_from != (SPEC_VERSION, fingerprint, distilled.sha256):
            continue
        if whole:
            target = [directory.parts("evals") / path.name for path in evals]
            files = [
                *(pair for pair in zip(evals, target, strict=True) if not _judges(pair[1], distilled.sha256)),
                (source.history_part(spec.trial_id), directory.history_part(spec.trial_id)),
                (source.grid(spec.trial_id), directory.grid(spec.trial_id)),
                (source.distilled(spec.trial_id), directory.distilled(spec.trial_id)),
            ]
            for old, new in files:
                if old.exists():
                    write_atomic(new, old.read_bytes(), directory.temporary)
            return TakenOver(source, tuple(target))
    return None


def take_over_all(
    trials: Sequence[TrialSpec], fingerprints: Mapping[str, str], directory: SweepDirectory
) -> dict[str, TakenOver]:
    """By id, those of ``trials`` that sweeps beside this one have finished; see `take_over`."""
    others = other_sweeps(directory)
    taken = {
        trial.trial_id: take_over(trial, fingerprints[trial.trial_id], directory, others) for trial in trials
    }
    return {trial_id: found for trial_id, found in taken.items() if found is not None}


def _judges(part: Path, distilled: str) -> bool:
    """Whether such a part of exactly this set exists already."""
    try:
        return part.exists() and described(part, KnownParts()).get("distilled") == distilled
    except ResultsError:
        return False
