"""Takes over a trial that another sweep in the same folder has finished, instead of computing it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsweep.catalog import SPEC_VERSION, TrialSpec
from ddsweep.errors import ResultsError, UserError
from ddsweep.pools.imagenet import pool_of
from ddsweep.pools.judged import is_of_others, note_networks
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
    """The sweep that finished a trial, and the evals parts that the trial has now."""

    source: SweepDirectory
    evals: tuple[Path, ...]


def take_over(
    spec: TrialSpec,
    fingerprint: str,
    directory: SweepDirectory,
    others: Sequence[OtherSweep],
    paths: Sequence[Path] | None = None,
) -> TakenOver | None:
    """Copy set, history, picture and evals parts of ``spec`` from the first of ``others`` that has finished
    it; None without one. ``paths`` are the trial's evals parts here; without them the folder is listed.

    A part with a network that was judged here already is not copied, because other groups of the same
    networks may be there: what is then missing is computed.

    The id stands for all science settings, so only the data can differ: ``fingerprint`` must be that of the
    data behind the set. The set is copied last, because it marks the trial as distilled.
    `ddsweep.evaluation.finish` writes the row in ``trials``, under the name of this sweep.
    """
    found = finished_in(spec.trial_id, others)
    pool = pool_of(spec, directory.pools) if found else None
    for other in found:
        source = other.directory
        try:
            (row,) = read_part(source.trials_part(spec.trial_id)).to_pylist()
            distilled = read_distilled(spec, source)
            evals = [path for path in other.evals.get(spec.trial_id, []) if is_whole(path)]
            whole = is_whole(source.history_part(spec.trial_id))
            same_networks = pool is None or not is_of_others(source, pool)
        except (UserError, ValueError):
            continue
        made_from = (row["spec_version"], row["dataset_fingerprint"], row["distilled_sha256"])
        if made_from != (SPEC_VERSION, fingerprint, distilled.sha256) or not same_networks:
            continue
        if whole:
            here = directory.evals_parts(spec.trial_id) if paths is None else paths
            judged = {network for path in here for network in _judged(path, distilled.sha256)}
            parts = directory.parts("evals")
            copied = [
                (path, parts / path.name)
                for path in evals
                if not judged or judged.isdisjoint(_judged(path, distilled.sha256))
            ]
            files = [
                *copied,
                (source.history_part(spec.trial_id), directory.history_part(spec.trial_id)),
                (source.grid(spec.trial_id), directory.grid(spec.trial_id)),
                (source.distilled(spec.trial_id), directory.distilled(spec.trial_id)),
            ]
            if pool is not None:
                note_networks(pool, directory)
            for old, new in files:
                if old.exists():
                    write_atomic(new, old.read_bytes(), directory.temporary)
            return TakenOver(source, tuple(dict.fromkeys([*here, *(new for _, new in copied)])))
    return None


def take_over_all(
    trials: Sequence[TrialSpec], fingerprints: Mapping[str, str], directory: SweepDirectory
) -> dict[str, TakenOver]:
    """By id, those of ``trials`` that sweeps beside this one have finished; see `take_over`."""
    others, here = other_sweeps(directory), directory.evals_by_trial()
    taken = {
        trial.trial_id: take_over(
            trial, fingerprints[trial.trial_id], directory, others, here.get(trial.trial_id, [])
        )
        for trial in trials
    }
    return {trial_id: found for trial_id, found in taken.items() if found is not None}


def _judged(part: Path, distilled: str) -> set[tuple[str, int]]:
    """The protocols and networks that a part has of exactly this set."""
    try:
        content = described(part, KnownParts())
    except ResultsError:
        return set()
    if content.get("distilled") != distilled:
        return set()
    return {(content["protocol"], index) for _, indices in content["steps"] for index in indices}
