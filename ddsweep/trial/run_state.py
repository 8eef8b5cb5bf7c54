"""The content of a checkpoint: the state of a trial, its logged rows, and its provenance."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.outer import DistillState
from ddsweep.data.splits import Splits
from ddsweep.errors import UserError
from ddsweep.own_code import version_of
from ddsweep.pools.imagenet import pool_of
from ddsweep.provenance import Meter, device_name, environment, utc_now
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import HISTORY
from ddsweep.trial.files import move_aside_if_torn
from ddsweep.trial_plan import TrialSettings

__all__ = [
    "RunState",
    "TrialJob",
    "checkpoint_provenance",
    "load_run",
    "provenance",
    "save_run",
    "saved_steps",
    "write_history",
]

_HISTORY_COLUMNS = tuple(name for name in HISTORY.names if name != "trial_id")


@dataclass(frozen=True)
class TrialJob:
    """A trial to distil: its settings, its data, the folder of its sweep, and how it runs."""

    spec: TrialSpec
    splits: Splits
    directory: SweepDirectory
    settings: TrialSettings


@dataclass
class RunState:
    """The progress of a trial, with its plan; the costs are those of earlier processes. ``cohort_size`` is
    the greatest number of trials that were distilled together, this one included."""

    state: DistillState
    history: list[dict[str, Any]]
    plan: ExecutionPlan
    started_at: str
    wall: float = 0.0
    cpu: float = 0.0
    n_skipped: int = 0
    peak: int | None = None
    n_resumed: int = 0
    n_replans: int = 0
    seconds_of_others: float = 0.0
    cohort_size: int = 1


def _history_to_tensor(history: list[dict[str, Any]]) -> Tensor:
    """Logged rows as float64 ``[rows, columns]``, null as NaN: a number in a history is never NaN."""
    rows = [[math.nan if row[c] is None else float(row[c]) for c in _HISTORY_COLUMNS] for row in history]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(_HISTORY_COLUMNS))


def _history_from_tensor(rows: Tensor) -> list[dict[str, Any]]:
    whole = {"outer_step", "n_skipped", "n_rollbacks"}
    return [
        {
            name: None if math.isnan(value) else int(value) if name in whole else value
            for name, value in zip(_HISTORY_COLUMNS, row, strict=True)
        }
        for row in rows.tolist()
    ]


def save_run(run: RunState, job: TrialJob, meter: Meter) -> None:
    """Write the checkpoint and its history part (readers may look at any time)."""
    spec, directory = job.spec, job.directory
    header = {
        "kind": "checkpoint",
        "trial_id": spec.trial_id,
        "data": job.splits.fingerprint,
        "networks": _learned_from(spec, directory),
        "plan": run.plan.to_dict(),
        "counters": run.state.counters(),
        "started_at": run.started_at,
        "wall": meter.wall_seconds(),
        "cpu": meter.cpu_seconds(),
        "seconds_of_others": meter.seconds_of_others,
        "cohort_size": run.cohort_size,
        "n_skipped": run.n_skipped,
        "n_resumed": run.n_resumed,
        "n_replans": run.n_replans,
        "peak": meter.peak_memory_bytes(),
        "provenance": provenance(run, job, meter),
    }
    tensors = {**run.state.tensors(), "history": _history_to_tensor(run.history)}
    save_tensors(directory.checkpoint(spec.trial_id), tensors, header, directory.temporary)
    write_history(run, spec, directory)


def write_history(run: RunState, spec: TrialSpec, directory: SweepDirectory) -> None:
    rows = [{"trial_id": spec.trial_id, **row} for row in run.history]
    write_part(directory.history_part(spec.trial_id), rows, HISTORY, directory.temporary)


def saved_steps(directory: SweepDirectory, trial_id: str) -> int:
    """The outer steps of a trial's checkpoint; 0 without a readable one."""
    try:
        return int(load_tensors(directory.checkpoint(trial_id))[1]["counters"]["step"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0


def load_run(job: TrialJob) -> RunState | None:
    """The checkpointed run, if there is one. A torn checkpoint is moved aside."""
    spec, splits = job.spec, job.splits
    path = job.directory.checkpoint(spec.trial_id)
    move_aside_if_torn(path, spec, "checkpoint")
    if not path.exists():
        return None
    tensors, header = load_tensors(path)
    if header["data"] != splits.fingerprint:
        raise UserError(
            f"{path}: made from other images than {splits.name!r} holds now; put the data back, or remove "
            f"{path.parent} to start trial {spec.trial_id} again"
        )
    now = _learned_from(spec, job.directory)
    if header.get("networks", now) != now:  # older checkpoints do not say
        assert spec.pool is not None
        raise UserError(
            f"{path}: the networks of pool {spec.pool.name} were trained anew since then; put those of "
            f"before back, or remove {path.parent} to start trial {spec.trial_id} again"
        )
    history = _history_from_tensor(tensors.pop("history"))
    return RunState(
        state=DistillState.of(tensors, header["counters"]),
        history=history,
        plan=ExecutionPlan.from_dict(header["plan"]),
        started_at=header["started_at"],
        wall=header["wall"],
        cpu=header["cpu"],
        n_skipped=header["n_skipped"],
        peak=header["peak"],
        n_resumed=header["n_resumed"] + 1,
        # Older checkpoints have none of these.
        n_replans=header.get("n_replans", 0),
        seconds_of_others=header.get("seconds_of_others", 0.0),
        cohort_size=header.get("cohort_size", 1),
    )


def _learned_from(spec: TrialSpec, directory: SweepDirectory) -> str | None:
    pool = pool_of(spec, directory.pools)
    return None if pool is None else pool.learned_from


def checkpoint_provenance(spec: TrialSpec, directory: SweepDirectory) -> tuple[int, dict[str, Any]]:
    """Outer steps done at the checkpoint of ``spec``, and its columns of the ``trials`` table: cost so far,
    provenance, last loss and score. Raises `CheckpointError` if it cannot be read."""
    _, header = load_tensors(directory.checkpoint(spec.trial_id))
    return header["counters"]["step"], header["provenance"]


def provenance(run: RunState, job: TrialJob, meter: Meter) -> dict[str, Any]:
    """Columns of the ``trials`` table that are known where the trial is distilled."""
    spec, splits, directory = job.spec, job.splits, job.directory
    wall, pool = meter.wall_seconds(), pool_of(spec, directory.pools)
    scores = [row["val_score"] for row in run.history if row["val_score"] is not None]
    if run.state.best_score is not None:
        scores.append(run.state.best_score)
    return {
        **environment(),
        "dataset_fingerprint": splits.fingerprint,
        "dataset_stand_in": splits.stand_in or (pool is not None and pool.stand_in),
        "pool_networks": None if pool is None else pool.learned_from,
        "network_version": None if (own := spec.network_spec.code) is None else version_of(own),
        "dataset_shape": "x".join(map(str, spec.dataset.shape)),
        "n_test_in_train": splits.test_in_train,
        "val_score": scores[-1] if scores else None,
        "outer_loss": run.history[-1]["outer_loss"] if run.history else None,
        "wall_seconds": wall,
        "cpu_seconds": meter.cpu_seconds(),
        "gpu_seconds": job.settings.gpus * (wall - meter.seconds_of_others),
        "peak_memory_bytes": meter.peak_memory_bytes(),
        "n_skipped": run.n_skipped,
        "n_rollbacks": run.state.rollbacks,
        "n_resumed": run.n_resumed,
        "n_torn_checkpoints": len(list(directory.artifacts(spec.trial_id).glob("*.torn-*"))),
        "device": run.plan.device,
        "device_name": device_name(run.plan.device),
        "threads": run.plan.threads,
        "memory_mode": run.plan.memory_mode,
        "execution_plan": json.dumps(run.plan.to_dict()),
        "n_replans": run.n_replans,
        "cohort_size": run.cohort_size,
        "started_at": run.started_at,
        "ended_at": utc_now().isoformat(),
    }
