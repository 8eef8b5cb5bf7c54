"""The end of a trial: its row in ``trials``, once everything that is asked is there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ddsweep.catalog import NEIGHBOUR_BASELINES, SPEC_VERSION, EvaluationSpec, TrialSpec
from ddsweep.errors import ResultsError
from ddsweep.evaluation.units import parts_of
from ddsweep.results.coverage import (
    HOLDS,
    Held,
    described,
    each_once,
    holds_text,
    missing,
    newest_last,
    recorded_set,
)
from ddsweep.results.files import patiently
from ddsweep.results.keys import digest
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import part_metadata, read_parts, write_part
from ddsweep.results.schemas import EVALS, TRIALS
from ddsweep.results.statistics import mean_std_ci, paired_difference
from ddsweep.trial import checkpoint_provenance, is_distilled, read_distilled

__all__ = ["finish", "forget_stop", "record_stop", "settled", "trial_is_done", "trial_is_stopped"]

SUMS_UP = "sums_up"
"""The key in the metadata of a ``trials`` part for a digest over the inputs of its row."""


def trial_is_done(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    known: KnownParts | None = None,
    paths: Sequence[Path] | None = None,
) -> bool:
    """Whether the trial has its row, its evaluation has everything that is asked (or more), and all of its
    parts are whole.

    Parts that ``known`` has as whole, and that have not changed, are not read again. ``paths`` are its evals
    parts; without them the folder is listed.
    """
    known = known or KnownParts()
    row = known.metadata(directory.trials_part(spec.trial_id))
    if row is None or row.get("status") == "stopped":
        return False
    if not known.is_whole(directory.history_part(spec.trial_id)):
        return False
    distilled = recorded_set(directory, spec.trial_id, known)
    parts = parts_of(spec, evaluation, directory, distilled, paths, known)
    return not parts.torn and not missing(spec, evaluation, parts.held)


def settled(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    sweep: str,
    known: KnownParts | None = None,
    paths: Sequence[Path] | None = None,
) -> bool:
    """Whether nothing is left to compute of the trial. Then its row sums up the existing rows, and is written
    again if it did not."""
    known = known or KnownParts()
    if paths is None:
        paths = directory.evals_parts(spec.trial_id)
    if not trial_is_done(spec, evaluation, directory, known, paths):
        return is_distilled(spec, directory) and finish(spec, evaluation, directory, sweep, paths, known)
    row = known.metadata(directory.trials_part(spec.trial_id)) or {}
    if row.get(SUMS_UP) != _summed_up(sweep, paths, known) and is_distilled(spec, directory):
        finish(spec, evaluation, directory, sweep, paths, known)
    directory.failure_part(spec.trial_id).unlink(missing_ok=True)  # of an evaluation that is asked no more
    return True


def trial_is_stopped(spec: TrialSpec, directory: SweepDirectory, known: KnownParts | None = None) -> bool:
    """Whether a scheduler stopped the trial, and its row and history are whole (see `trial_is_done`)."""
    known = known or KnownParts()
    row = known.metadata(directory.trials_part(spec.trial_id))
    if row is None or row.get("status") != "stopped":
        return False
    return known.is_whole(directory.history_part(spec.trial_id))


def finish(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    sweep: str,
    paths: Sequence[Path] | None = None,
    known: KnownParts | None = None,
) -> bool:
    """Write the ``trials`` part once everything that is asked is there; True if it is. Idempotent.

    The row is over all networks that were judged, also those that are not asked for now. Wrong rows are
    removed: of an earlier set, under a name that means another protocol now, and in unreadable parts.
    ``paths`` are the trial's evals parts; without them the folder is listed.
    """
    known = known or KnownParts()
    distilled = read_distilled(spec, directory)
    if paths is None:
        paths = directory.evals_parts(spec.trial_id)
    parts = parts_of(spec, evaluation, directory, distilled.sha256, paths, known)
    if missing(spec, evaluation, parts.held):
        return False
    changes = {unit.protocol: unit.changes for unit in evaluation.units(spec)}
    renamed = [
        part.path
        for part in parts.held
        if (now := changes.get(part.protocol)) is not None and part.changes != now.changes()
    ]
    for path in (*parts.torn, *parts.foreign, *renamed):
        path.unlink(missing_ok=True)
    _drop_doubles(spec, parts.held, distilled.sha256, directory)
    own = [part.path for part in parts.held if part.protocol == "as_distilled"]
    rows = each_once(read_parts(newest_last(own), EVALS).to_pylist())
    row = {
        **_row(spec, distilled.provenance, sweep, "done", spec.outer_steps),
        **_tested(spec, rows),
        "distilled_bytes": directory.distilled(spec.trial_id).stat().st_size,
        "distilled_sha256": distilled.sha256,
        "evaluation_id": evaluation.evaluation_id(spec),
    }
    counts = {
        protocol: len({index for part in parts.held if part.protocol == protocol for index in part.steps})
        for protocol in ("as_distilled", "on_random")
    }
    metadata = {
        "evaluation_id": row["evaluation_id"],
        "distilled": distilled.sha256,
        "networks": json.dumps(counts),
        SUMS_UP: _summed_up(sweep, own, known),
    }
    path = directory.trials_part(spec.trial_id)
    patiently(lambda: write_part(path, [row], TRIALS, directory.temporary, metadata))
    directory.failure_part(spec.trial_id).unlink(missing_ok=True)
    return True


def _summed_up(sweep: str, paths: Iterable[Path], known: KnownParts) -> str:
    """A digest over the inputs of a row. The row is written again if it changes."""
    found = []
    for path in sorted(paths):
        try:
            content = described(path, known)
        except ResultsError:
            continue
        if content.get("protocol") == "as_distilled":
            found.append(content)
    return digest(sweep, found)


def _drop_doubles(spec: TrialSpec, held: Sequence[Held], distilled: str, directory: SweepDirectory) -> None:
    """Remove nearest-neighbour rows beside the known network of a trial if held-out networks have them too.
    The asked protocols decide where they are computed, and may have changed."""
    if spec.init != "fixed":
        return
    beside: set[tuple[str, int | None]] = {
        (source, index)
        for part in held
        if part.protocol == "on_random"
        for source in NEIGHBOUR_BASELINES
        if source in part.baselines
        for index in part.baselines[source].networks
    }
    for part in held:
        if part.protocol != "as_distilled":
            continue
        rows = read_parts([part.path], EVALS).to_pylist()
        kept = [row for row in rows if (row["source"], row["model_seed"]) not in beside]
        if len(kept) == len(rows):
            continue
        metadata = {name: text for name, text in part_metadata(part.path).items() if name != "unit"}
        metadata[HOLDS] = holds_text(
            kept,
            size=part.size,
            distilled=distilled,
            changes=None,
            settings={source: found.settings for source, found in part.baselines.items()},
        )
        write_part(part.path, kept, EVALS, directory.temporary, metadata)


def record_stop(spec: TrialSpec, directory: SweepDirectory, sweep: str) -> None:
    """Write the ``trials`` part of a trial that a scheduler stopped at its last checkpoint: settings, score
    and cost, without the test set. Raises `CheckpointError` if the checkpoint cannot be read."""
    step, provenance = checkpoint_provenance(spec, directory)
    row = _row(spec, provenance, sweep, "stopped", step)
    path = directory.trials_part(spec.trial_id)
    write_part(path, [row], TRIALS, directory.temporary, {"status": "stopped"})


def forget_stop(spec: TrialSpec, directory: SweepDirectory) -> None:
    """Remove the row of a stopped trial that goes on; any other row stays."""
    path = directory.trials_part(spec.trial_id)
    try:
        stopped = path.exists() and part_metadata(path).get("status") == "stopped"
    except ResultsError:
        return
    if stopped:
        path.unlink(missing_ok=True)


def _row(
    spec: TrialSpec, provenance: Mapping[str, Any], sweep: str, status: str, outer_steps_done: int
) -> dict[str, Any]:
    """The columns of every trial, evaluated or not."""
    absent = {"dataset", "pool", *spec.lacks}
    settings = {name: value for name, value in spec.to_dict().items() if name not in absent}
    if spec.pool is not None:
        settings["init_law"] = None  # that of the pool
        settings |= {
            "pool": spec.pool.name,
            "source_dataset": spec.pool.source_dataset,
            "pool_recipe": spec.pool.recipe,
            "pool_train": spec.pool.train,
        }
    times = {name: datetime.fromisoformat(provenance[name]) for name in ("started_at", "ended_at")}
    return {
        **settings,
        **provenance,
        **times,
        "trial_id": spec.trial_id,
        "sweep": sweep,
        "in_sweep": True,
        "dataset": spec.dataset.name,
        "images_per_class_per_step": spec.images_per_class_per_step,
        "status": status,
        "outer_steps_done": outer_steps_done,
        "spec_version": SPEC_VERSION,
    }


def _tested(spec: TrialSpec, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns from the ``as_distilled`` rows of a trial, over all their networks."""
    ours = [row for row in rows if (row["source"], row["protocol"]) == ("distilled", "as_distilled")]
    before = [row for row in ours if row["inner_step"] == 0]
    after = [row for row in ours if row["inner_step"] == spec.steps]
    random = [row for row in rows if (row["source"], row["protocol"]) == ("random_real", "as_distilled")]
    gain = paired_difference(after, random)
    return {
        **_measured("accuracy", before, after),
        **(_measured("attack_success", before, after) if spec.objective == "attack" else {}),
        **(_measured("accuracy_other", before, after) if spec.objective == "attack" else {}),
        "test_models": len(after),
        "n_diverged": sum(row["diverged"] for row in after),
        "gain_mean": gain.mean if gain else None,
        "gain_ci95": gain.ci95 if gain else None,
    }


def _measured(
    name: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Columns of the ``trials`` table for one measure, over networks, before and after training."""
    column = f"test_{name}"
    mean, std, ci95 = mean_std_ci([row[name] for row in after])
    first, spread, _ = mean_std_ci([row[name] for row in before])
    found = {f"{column}_mean": mean, f"{column}_std": std, f"{column}_ci95": ci95}
    found |= {f"{column}_before_mean": first, f"{column}_before_std": spread}
    return {key: value for key, value in found.items() if key in TRIALS.names}
