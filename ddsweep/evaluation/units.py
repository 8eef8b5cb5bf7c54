"""The units of a trial's evaluation: what is missing of them, computing one, and summing them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddsweep.catalog import SPEC_VERSION, EvaluationSpec, EvalUnit, NetworkSpec, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.execution import choose_plan
from ddsweep.core.graphs import has_recordings
from ddsweep.core.memory import is_out_of_memory, release_memory
from ddsweep.core.networks import build_network
from ddsweep.data.sources import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import ResultsError, TooLargeError
from ddsweep.evaluation.baseline_rows import baseline_rows
from ddsweep.evaluation.group import Group
from ddsweep.evaluation.keys import digest, is_current
from ddsweep.evaluation.protocol_rows import protocol_rows
from ddsweep.pools.imagenet import pool_of
from ddsweep.provenance import environment
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import part_metadata, read_parts, write_part
from ddsweep.results.schemas import EVALS, TRIALS
from ddsweep.results.statistics import mean_std_ci
from ddsweep.trial import checkpoint_provenance, read_distilled

__all__ = [
    "evaluate_unit",
    "finish",
    "forget_stop",
    "missing_units",
    "record_stop",
    "trial_is_done",
    "trial_is_stopped",
]

THREADS = 1
"""Evaluation always computes on this many CPU threads: float32 results change with it."""


# ------------------------------------------------------------------------------------ what is there


def trial_is_done(
    spec: TrialSpec, evaluation: EvaluationSpec, directory: SweepDirectory, known: KnownParts | None = None
) -> bool:
    """Whether the trial's row was made for this very evaluation and all of its parts are whole.

    Parts that ``known`` has as whole, and that are the same files still, are not read again.
    """
    known = known or KnownParts()
    row = known.metadata(directory.trials_part(spec.trial_id))
    if row is None or row.get("evaluation_id") != evaluation.evaluation_id(spec):
        return False
    evals = [_part(directory, spec, unit) for unit in evaluation.units(spec)]
    return all(map(known.is_whole, (directory.history_part(spec.trial_id), *evals)))


def trial_is_stopped(spec: TrialSpec, directory: SweepDirectory, known: KnownParts | None = None) -> bool:
    """Whether a scheduler stopped the trial, and its row and history are whole (see `trial_is_done`)."""
    known = known or KnownParts()
    row = known.metadata(directory.trials_part(spec.trial_id))
    if row is None or row.get("status") != "stopped":
        return False
    return known.is_whole(directory.history_part(spec.trial_id))


def _recorded(trial_id: str, directory: SweepDirectory) -> dict[str, str]:
    path = directory.trials_part(trial_id)
    if not path.exists():
        return {}
    try:
        return part_metadata(path)
    except ResultsError:
        return {}


def missing_units(spec: TrialSpec, evaluation: EvaluationSpec, directory: SweepDirectory) -> list[EvalUnit]:
    """The units of ``spec`` whose part is absent, torn, or of other settings than are asked for now."""
    distilled = read_distilled(spec, directory)
    return [
        unit
        for unit in evaluation.units(spec)
        if not is_current(_part(directory, spec, unit), _unit_key(distilled, evaluation, unit))
    ]


def _part(directory: SweepDirectory, spec: TrialSpec, unit: EvalUnit) -> Path:
    law = spec.pool.name if spec.pool else spec.init_law
    return directory.evals_part(spec.trial_id, unit.protocol, law, unit.group)


def _unit_key(distilled: DistilledSet, evaluation: EvaluationSpec, unit: EvalUnit) -> str:
    if unit.changes is not None:  # no baselines under this one
        return digest(
            distilled.sha256,
            evaluation.steps(distilled.spec, unit.changes),
            unit.changes.changes(),
            [unit.protocol, unit.group, unit.size, unit.indices],
            *([] if distilled.spec.pool is None else [distilled.spec.pool.heldout]),
        )
    settings = evaluation.baseline_settings()
    return digest(
        distilled.sha256,
        evaluation.steps(distilled.spec),
        sorted(evaluation.baselines),
        [unit.protocol, unit.group, unit.size, unit.indices],
        *([settings] if settings else []),
    )


# -------------------------------------------------------------------------------------- evaluating


@lru_cache(maxsize=8)
def _network(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The same module for all groups, since what a GPU records belongs to a module."""
    return build_network(spec, shape, classes)


def evaluate_unit(
    spec: TrialSpec,
    unit: EvalUnit,
    evaluation: EvaluationSpec,
    splits: Splits,
    directory: SweepDirectory,
    device: torch.device,
    *,
    compile: str = "auto",
) -> Path:
    """Compute one unit of a distilled trial, baselines included, and write its part. Under ``compile: off``
    the test pass is not compiled either.

    Returns the part's path; does nothing if the part is current. Raises `CheckpointError` if the
    distilled set is missing or torn, and `TooLargeError` if the group does not fit the memory there is:
    only its test pass can be taken in smaller pieces, for rows depend on who is trained together.
    """
    distilled = read_distilled(spec, directory)
    key, path = _unit_key(distilled, evaluation, unit), _part(directory, spec, unit)
    if is_current(path, key):
        return path
    torch.set_num_threads(THREADS)
    used = spec if unit.changes is None else unit.changes.applied_to(spec)
    network = _network(used.network_spec, used.dataset.shape, used.dataset.classes)
    plan = choose_plan(device, THREADS, network, graph=True, native=compile != "off")
    pool = pool_of(used, directory.pools)
    group = Group(used, unit, splits, plan, network, pool)
    rows: list[dict[str, Any]] | None = None
    while rows is None:
        try:
            rows = _rows(spec, group, distilled, evaluation, directory)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not has_recordings():
                raise TooLargeError(_too_large(spec, group, device, error)) from error
        if rows is None:  # what other groups were trained by may have been in the way
            release_memory()
    rows = [{**row, "trial_id": spec.trial_id} for row in rows]
    # Not columns: rows depend on them in the last digits of a loss at most.
    metadata = {"unit": key, "host": environment()["host"], "native": str(plan.native).lower()}
    write_part(path, rows, EVALS, directory.temporary, metadata)
    return path


def _too_large(spec: TrialSpec, group: Group, device: torch.device, error: Exception) -> str:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    more = "a larger evaluate.gpus" if device.type == "cuda" else "fewer evaluate.shards"
    return (
        f"evaluation of {spec.trial_id} under {group.unit.protocol}: "
        f"{counted(len(group.indices), 'network')} trained together do not fit the memory of {device.type}; "
        f"set {more} or a smaller evaluate.group_size ({said})"
    )


def _rows(
    spec: TrialSpec,
    group: Group,
    distilled: DistilledSet,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
) -> list[dict[str, Any]]:
    unit = group.unit
    if unit.changes is not None:
        return protocol_rows(group, unit.changes, distilled, evaluation.steps(spec, unit.changes))
    result = group.test_distilled(distilled, evaluation.steps(spec))
    rows = group.rows(result, "distilled", unit.protocol)
    for source in evaluation.baselines:
        rows += baseline_rows(group, source, evaluation, directory)
    return rows


# --------------------------------------------------------------------------------------- summing up


def finish(
    spec: TrialSpec,
    evaluation: EvaluationSpec,
    directory: SweepDirectory,
    sweep: str,
    earlier: Sequence[Path] | None = None,
) -> bool:
    """Write the ``trials`` part once all wanted evaluations are there; True if they are. Idempotent.

    Evaluation parts of groups and protocols that are no longer wanted go: readers of the folder would
    count their rows. ``earlier`` are those that the trial had before its evaluation began; left out, the
    folder is listed, which takes longer the more trials there are.
    """
    if missing_units(spec, evaluation, directory):
        return False
    wanted = {_part(directory, spec, unit) for unit in evaluation.units(spec)}
    for path in directory.evals_parts(spec.trial_id) if earlier is None else earlier:
        if path not in wanted:
            path.unlink(missing_ok=True)
    row = _done_row(spec, evaluation, directory, sweep)
    metadata = {"evaluation_id": row["evaluation_id"]}
    write_part(directory.trials_part(spec.trial_id), [row], TRIALS, directory.temporary, metadata)
    directory.failure_part(spec.trial_id).unlink(missing_ok=True)
    return True


def record_stop(spec: TrialSpec, directory: SweepDirectory, sweep: str) -> None:
    """Write the ``trials`` part of a trial that a scheduler stopped at its last checkpoint: settings, score
    and cost, and nothing of the test set. Raises `CheckpointError` if the checkpoint cannot be read."""
    step, provenance = checkpoint_provenance(spec, directory)
    row = _row(spec, provenance, sweep, "stopped", step)
    path = directory.trials_part(spec.trial_id)
    write_part(path, [row], TRIALS, directory.temporary, {"status": "stopped"})


def forget_stop(spec: TrialSpec, directory: SweepDirectory) -> None:
    """Remove the row of a stopped trial that is to go on; any other row stays."""
    if _recorded(spec.trial_id, directory).get("status") == "stopped":
        directory.trials_part(spec.trial_id).unlink(missing_ok=True)


def _row(
    spec: TrialSpec, provenance: Mapping[str, Any], sweep: str, status: str, outer_steps_done: int
) -> dict[str, Any]:
    """The columns that every trial has, evaluated or not."""
    settings = {name: value for name, value in spec.to_dict().items() if name not in ("dataset", "pool")}
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
        "dataset": spec.dataset.name,
        "images_per_class_per_step": spec.images_per_class_per_step,
        "status": status,
        "outer_steps_done": outer_steps_done,
        "spec_version": SPEC_VERSION,
    }


def _done_row(
    spec: TrialSpec, evaluation: EvaluationSpec, directory: SweepDirectory, sweep: str
) -> dict[str, Any]:
    distilled = read_distilled(spec, directory)
    paths = [_part(directory, spec, unit) for unit in evaluation.units(spec)]
    rows = [row for row in read_parts(paths, EVALS).to_pylist() if row["source"] == "distilled"]
    own = [row for row in rows if row["protocol"] == "as_distilled"]
    before = [row for row in own if row["inner_step"] == 0]
    after = [row for row in own if row["inner_step"] == spec.steps]
    return {
        **_row(spec, distilled.provenance, sweep, "done", spec.outer_steps),
        **_measured("accuracy", before, after),
        **(_measured("attack_success", before, after) if spec.objective == "attack" else {}),
        **(_measured("accuracy_other", before, after) if spec.objective == "attack" else {}),
        "test_models": len(after),
        "n_diverged": sum(row["diverged"] for row in after),
        "distilled_bytes": directory.distilled(spec.trial_id).stat().st_size,
        "distilled_sha256": distilled.sha256,
        "evaluation_id": evaluation.evaluation_id(spec),
    }


def _measured(
    name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> dict[str, float | None]:
    """Columns of the ``trials`` table for one measure, over networks, before and after training."""
    column = f"test_{name}"
    mean, std, ci95 = mean_std_ci([row[name] for row in after])
    first, spread, _ = mean_std_ci([row[name] for row in before])
    found = {f"{column}_mean": mean, f"{column}_std": std, f"{column}_ci95": ci95}
    found |= {f"{column}_before_mean": first, f"{column}_before_std": spread}
    return {key: value for key, value in found.items() if key in TRIALS.names}
